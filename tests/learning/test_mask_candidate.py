import pytest
import torch

from persona_pruner.config.schema import LearningConfig
from persona_pruner.errors import PersonaError
from persona_pruner.learning.mask_candidate import MaskCandidate, from_bytes, to_bytes

CONFIG = LearningConfig(channel_multiple=4, steps=4, average=0.5, learning_rate=0.1)


def candidate():
    scores = torch.rand(2, 16, generator=torch.Generator().manual_seed(0))
    return MaskCandidate(CONFIG, "ada", scores, 16, 0.5, 0.1, "one")


def grads(count):
    draw = torch.Generator().manual_seed(1)
    return [torch.randn(2, 16, generator=draw) for _ in range(count)]


def test_the_mask_keeps_the_channels_of_the_ratio():
    assert candidate().mask().sum(1).tolist() == [8, 8]


def test_an_update_is_adam_with_one_second_moment_per_layer():
    trained, scores = candidate(), candidate().scores_LI
    first, second = torch.zeros(2, 16), torch.zeros(2, 1)
    for count, grad in enumerate(grads(2), 1):
        grad = grad / max(grad.norm().item(), 1.0)
        first = 0.9 * first + 0.1 * grad
        second = 0.99 * second + 0.01 * grad.square().mean(1, keepdim=True)
        scores = scores - 0.1 * (first / (1 - 0.9**count)) / (second / (1 - 0.99**count)).sqrt()
    for grad in grads(2):
        trained.update(grad)
    assert torch.allclose(trained.scores_LI, scores, atol=1e-6)


def test_the_mask_is_made_of_the_mean_of_the_last_scores():
    trained, seen = candidate(), []
    for grad in grads(4):
        trained.update(grad)
        seen.append(trained.scores_LI)
    assert torch.allclose(trained.learned(), (seen[2] + seen[3]) / 2)


def test_a_gradient_that_is_not_finite_changes_nothing():
    trained = candidate()
    with pytest.raises(PersonaError) as caught:
        trained.update(torch.full((2, 16), float("nan")))
    assert caught.value.cause == "not_finite"
    assert trained.step == 0
    assert torch.equal(trained.scores_LI, candidate().scores_LI)


def test_a_checkpoint_gives_everything_back():
    trained = candidate()
    for grad in grads(3):
        trained.update(grad)
    trained.stopper.see(1.5, trained.mask())
    trained.heldout, trained.rung, trained.accepted_LI = 1.5, 1, torch.ones(2, 16)
    (again,) = from_bytes(to_bytes([trained], "data"), CONFIG, "data", torch.device("cpu"))
    for grad in grads(1):
        trained.update(grad)
        again.update(grad)
    for name, value in vars(trained).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, getattr(again, name)), name
        elif name != "stopper":
            assert value == getattr(again, name), name
    assert (again.stopper.best, again.stopper.stale) == (1.5, 0)
    assert torch.equal(again.stopper.last_LI, trained.stopper.last_LI)


@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b[:40], lambda b: b[:-8], lambda b: b"\xff" * 200])
def test_damaged_bytes_and_other_data_are_no_checkpoint(damage):
    data = to_bytes([candidate()], "data")
    assert from_bytes(damage(data), CONFIG, "data", torch.device("cpu")) is None
    assert from_bytes(data, CONFIG, "other", torch.device("cpu")) is None


def test_a_value_step_moves_the_scores_towards_fisher_and_what_the_gradient_adds():
    config = LearningConfig(
        channel_multiple=4, steps=4, init="fisher", optimizer="value", budget="free", value_gradient=0.1
    )
    draw = torch.Generator().manual_seed(0)
    fisher, (grad,) = torch.rand(2, 16, generator=draw) ** 4, grads(1)
    trained = MaskCandidate(config, "ada", fisher / 2, 16, 0.5, 0.1, fisher_LI=fisher)
    kept = torch.zeros(2, 16)
    kept.view(-1)[fisher.flatten().topk(16).indices] = 1
    assert torch.equal(trained.mask().float(), kept)
    trained.update(grad)
    value = fisher / 2 + 0.1 * (-grad - fisher * (1 - kept))
    assert torch.allclose(trained.scores_LI, 0.9 * fisher / 2 + 0.1 * value)
