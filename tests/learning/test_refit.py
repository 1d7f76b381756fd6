import pytest
import torch
from tiny_models import persona_data, tiny, tiny_config

from persona_pruner.backbone.forward import BackboneRunner
from persona_pruner.learning.batches import MicroBatchConfig
from persona_pruner.learning.encoding import encode
from persona_pruner.learning.refit import MaskedRows, _LeastSquares, refit_outputs

KEEP_LI = torch.rand(3, 64, generator=torch.Generator().manual_seed(0)) > 0.4


def masked_rows(backbone, name, keep_LI=KEEP_LI):
    encoded = encode(backbone.tokenizer, tiny_config().prompt, persona_data(name, rows=40), 512)
    return MaskedRows(encoded.prefixes[0], encoded.train, keep_LI)


def weights(backbone):
    return {name: weight.clone() for name, weight in backbone.model.state_dict().items()}


def test_the_update_is_the_least_squares_solution(tmp_path):
    """Against torch.linalg.lstsq on the rows themselves, the ridge as rows of its own."""
    torch.manual_seed(0)
    hidden, wanted, state = torch.randn(2, 50, 8), torch.randn(2, 50, 4), torch.randn(2, 50, 4)
    hidden[..., 3] = 0  # a channel that no mask leaves
    weight = torch.ones(2, 50)
    weight[1, 40:] = 0  # padding
    layer = type("Ffn", (), {"channels": 8, "output": torch.nn.Linear(8, 4)})()
    fit = _LeastSquares(layer)
    fit.add(hidden, wanted, state, weight)
    update = fit.solve(0.1)

    counted = weight.flatten() > 0
    scale = 1 / wanted.flatten(0, 1)[counted].norm(dim=1, keepdim=True)
    rows = hidden.flatten(0, 1)[counted] * scale
    targets = (wanted - state).flatten(0, 1)[counted] * scale
    ridge = (0.1 * rows.square().sum(0)).sqrt().diag()
    expected = torch.linalg.lstsq(
        torch.cat([rows, ridge]), torch.cat([targets, torch.zeros(8, 4)]), driver="gelsd"
    ).solution
    assert torch.allclose(update, expected.T, atol=1e-4)
    assert update[:, 3].abs().max() == 0
    before, after = fit.errors(update)
    assert before == pytest.approx(float(targets.square().sum() / counted.sum()), rel=1e-4)
    assert after == pytest.approx(float((targets - rows @ update.T).square().sum() / counted.sum()), rel=1e-4)


@pytest.mark.parametrize("family", ["llama", "opt", "gpt_neox"])
def test_masked_models_come_nearer_to_the_unpruned_one_on_rows_that_were_not_fitted(tmp_path, family):
    backbone = tiny(tmp_path, family)
    settings = MicroBatchConfig.of(tiny_config(), backbone.device)
    new = masked_rows(backbone, "Eve")
    prompts = [torch.tensor([(*new.prefix, *row.tokens)]) for row in new.rows]
    with BackboneRunner(backbone) as runner, torch.no_grad():
        unpruned = [runner.hidden(prompt) for prompt in prompts]

        def distance():
            runner.masks.set(KEEP_LI.float())
            return sum(float((runner.hidden(p) - state).norm()) for p, state in zip(prompts, unpruned, strict=True))

        first, other = distance(), torch.rand(3, 64, generator=torch.Generator().manual_seed(1)) > 0.4
        people = [masked_rows(backbone, "Ann"), masked_rows(backbone, "Bo", KEEP_LI | other)]
        errors = list(refit_outputs(runner, people, settings))
        assert len(errors) == 3
        assert all(after < before for before, after in errors)
        assert distance() < 0.9 * first


def test_nothing_changes_under_masks_that_leave_everything(tmp_path):
    backbone = tiny(tmp_path)
    before = weights(backbone)
    with BackboneRunner(backbone) as runner:
        settings = MicroBatchConfig.of(tiny_config(), backbone.device)
        list(refit_outputs(runner, [masked_rows(backbone, "Ann", torch.ones(3, 64, dtype=torch.bool))], settings))
        assert runner.masks.active is None
    assert all(torch.allclose(weight, before[name], atol=1e-6) for name, weight in weights(backbone).items())


@pytest.mark.parametrize("family", ["gemma2", "granite"])
def test_a_model_that_does_more_than_add_its_ffn_is_left_as_it_is(tmp_path, family):
    changes = {"residual_multiplier": 0.5} if family == "granite" else {}
    backbone = tiny(tmp_path, family, **changes)
    before = weights(backbone)
    with BackboneRunner(backbone) as runner:
        settings = MicroBatchConfig.of(tiny_config(), backbone.device)
        assert list(refit_outputs(runner, [masked_rows(backbone, "Ann")], settings)) == []
    assert all(torch.equal(weight, before[name]) for name, weight in weights(backbone).items())
