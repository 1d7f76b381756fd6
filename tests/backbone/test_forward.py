import pytest
import torch
from tiny_models import FAMILIES, tiny

from persona_pruner.backbone.forward import BackboneRunner, pad_rows
from persona_pruner.errors import BackboneError

LONGROPE = {
    "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 24,
        "short_factor": [1.0] * 4, "long_factor": [4.0, 8.0, 16.0, 32.0],
    },
    "original_max_position_embeddings": 24, "max_position_embeddings": 96,
}  # fmt: skip
DYNAMIC = {
    "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
    "max_position_embeddings": 24,
}  # fmt: skip
PREFIX = list(range(40, 52))


def rows(*lengths):
    return [list(range(60 + n, 60 + n + length)) for n, length in enumerate(lengths)]


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_behind_a_shared_prefix_have_the_plain_hidden_states(tmp_path, family):
    with BackboneRunner(tiny(tmp_path, family)) as runner, torch.no_grad():
        prefixes, suffixes = [PREFIX, PREFIX[:7]], rows(5, 3)
        assert runner.can_share(prefixes, 5)
        shared = runner.hidden(pad_rows(suffixes, 0), runner.prefix(prefixes), torch.tensor([0, 1]))
        for row, (prefix, suffix) in enumerate(zip(prefixes, suffixes, strict=True)):
            plain = runner.hidden(torch.tensor([prefix + suffix]))[0, len(prefix) :]
            assert torch.allclose(shared[row, : len(suffix)], plain, atol=1e-5)


@pytest.mark.parametrize(("family", "rope"), [("phi3", LONGROPE), ("llama", DYNAMIC)])
def test_a_prefix_is_shared_up_to_the_length_where_the_rope_changes(tmp_path, family, rope):
    with BackboneRunner(tiny(tmp_path, family, **rope)) as runner, torch.no_grad():
        assert runner.length_dependent
        assert runner.can_share([PREFIX], 12)
        assert not runner.can_share([PREFIX], 13)
        suffix = rows(12)
        shared = runner.hidden(pad_rows(suffix, 0), runner.prefix([PREFIX]), torch.tensor([0]))
        plain = runner.hidden(torch.tensor([PREFIX + suffix[0]]))[:, len(PREFIX) :]
        assert torch.allclose(shared, plain, atol=1e-5)
        longer = runner.hidden(torch.tensor([PREFIX + rows(16)[0]]))[:, len(PREFIX) :]
        assert not torch.allclose(longer[:, :12], plain, atol=1e-3), "the rope does change"


def test_a_growing_rope_forgets_what_ran_before(tmp_path):
    with BackboneRunner(tiny(tmp_path, "llama", **DYNAMIC)) as runner, torch.no_grad():
        tokens = torch.tensor(rows(30))
        fresh = runner.hidden(tokens)
        short = runner.hidden(tokens[:, :20])
        runner.hidden(torch.tensor(rows(60)))
        assert torch.equal(runner.hidden(tokens), fresh)
        assert torch.equal(runner.hidden(tokens[:, :20]), short)


def test_windows_share_padded_prefixes_only_below_the_window(tmp_path):
    with BackboneRunner(tiny(tmp_path, "gemma2", sliding_window=16)) as runner:
        assert runner.can_share([PREFIX, PREFIX[:7]], 4)
        assert not runner.can_share([PREFIX, PREFIX[:7]], 5)
        assert runner.can_share([PREFIX, PREFIX], 50)
        assert not runner.can_share([[], PREFIX], 1)


@pytest.mark.parametrize("family", ["gemma2", "cohere", "granite"])
def test_the_head_gives_the_models_own_logits(tmp_path, family):
    backbone = tiny(tmp_path, family)
    tokens = torch.tensor(rows(9))
    with BackboneRunner(backbone) as runner, torch.no_grad():
        runner.check_head()
        logits = runner.logits(runner.hidden(tokens)[0])
    assert torch.allclose(logits, backbone.model(tokens).logits[0], atol=1e-5)


def test_a_head_that_is_more_than_an_output_layer_is_refused(tmp_path):
    backbone = tiny(tmp_path)
    backbone.model.lm_head.register_forward_hook(lambda module, inputs, out: out * torch.linspace(1, 2, 261))
    backbone.model.get_output_embeddings = lambda: torch.nn.Linear(32, 261)
    with BackboneRunner(backbone) as runner, pytest.raises(BackboneError, match="cannot be trained"):
        runner.check_head()


def test_recomputed_layers_give_the_same_gradient(tmp_path):
    backbone = tiny(tmp_path)
    grads = []
    for recompute in (False, True):
        mask = torch.full((3, 64), 0.5, requires_grad=True)
        with BackboneRunner(backbone, checkpoint_layers=recompute) as runner:
            runner.masks.set(mask)
            hidden = runner.hidden(torch.tensor(rows(9)))
            runner.masks.set(None)
            hidden.square().sum().backward()
        grads.append(mask.grad)
    assert torch.allclose(grads[0], grads[1], rtol=1e-5)
    assert torch.isfinite(backbone.model(torch.tensor(rows(4))).logits).all()
