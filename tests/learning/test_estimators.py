import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from persona_pruner.learning.estimators import relaxed_mask, topk_mask


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 8), st.lists(st.integers(-2, 2), min_size=8, max_size=8))
def test_exactly_k_are_kept_and_ties_go_to_the_lower_channel(k, values):
    mask = topk_mask(torch.tensor([values, values[::-1]], dtype=torch.float32), k)
    assert mask.sum(1).tolist() == [k, k]
    best = sorted(range(8), key=lambda i: (-values[i], i))[:k]
    assert mask[0].nonzero().flatten().tolist() == sorted(best)


@pytest.mark.parametrize("method", ["ste", "gumbel", "soft_topk"])
def test_every_layer_sums_to_k(method):
    scores = torch.randn(4, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
    mask = relaxed_mask(scores, 12, method, 0.5, torch.Generator().manual_seed(1))
    assert torch.allclose(mask.sum(1), torch.full((4,), 12.0), atol=1e-4)
    if method != "soft_topk":
        assert set(mask.unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("method", ["ste", "gumbel", "soft_topk"])
def test_layers_may_keep_different_numbers(method):
    scores = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    widths = torch.tensor([32, 5, 12])
    assert topk_mask(scores, widths).sum(1).tolist() == [32, 5, 12]
    mask = relaxed_mask(scores[1:], widths[1:], method, 0.5, torch.Generator().manual_seed(1))
    assert torch.allclose(mask.sum(1), widths[1:].float(), atol=1e-4)


def test_straight_through_passes_the_gradient_as_it_is():
    scores = torch.randn(2, 8, requires_grad=True)
    weights = torch.randn(2, 8)
    (relaxed_mask(scores, 3) * weights).sum().backward()
    assert torch.equal(scores.grad, weights)


def test_gumbel_noise_comes_from_its_generator_alone():
    scores = torch.zeros(2, 16)
    draws = [relaxed_mask(scores, 4, "gumbel", 1.0, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_gumbel_gradient_is_that_of_the_softmax():
    scores = torch.randn(1, 16, requires_grad=True)
    weights = torch.randn(1, 16)
    (relaxed_mask(scores, 4, "gumbel", 0.7, torch.Generator().manual_seed(0)) * weights).sum().backward()
    uniform = torch.rand(1, 16, generator=torch.Generator().manual_seed(0)).clamp_(1e-9, 1 - 1e-7)
    again = scores.detach().requires_grad_()
    (4 * torch.softmax((again - (-uniform.log()).log()) / 0.7, -1) * weights).sum().backward()
    assert torch.allclose(scores.grad, again.grad, atol=1e-6)


def test_soft_topk_gradient_is_right():
    scores = torch.randn(2, 6, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: relaxed_mask(z, 2, "soft_topk", 0.8), (scores,), atol=1e-6)
