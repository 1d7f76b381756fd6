"""From scores to masks: exactly so many channels per layer, and how the gradient passes.

Shapes: L layers, I channels. Every function maps scores [L, I] (float32) to a mask [L, I].
"""

import torch
from torch import Tensor

from persona_pruner.config.learning import Method


def topk_mask(scores_LI: Tensor, widths_L: Tensor | int) -> Tensor:
    """Bool mask of each layer's largest scores, as many as its width; among equal scores the lower channel wins."""
    order_LI = scores_LI.sort(dim=-1, descending=True, stable=True).indices
    rank_I = torch.arange(scores_LI.shape[-1], device=scores_LI.device)
    kept_LI = rank_I < torch.as_tensor(widths_L, device=scores_LI.device).reshape(-1, 1)
    return torch.zeros_like(scores_LI, dtype=torch.bool).scatter_(-1, order_LI, kept_LI.expand_as(order_LI))


def with_core(scores_LI: Tensor, core_LI: Tensor | None) -> Tensor:
    """The scores with those of the core above all others."""
    return scores_LI if core_LI is None else scores_LI.masked_fill(core_LI, float("inf"))


def relaxed_mask(
    scores_LI: Tensor,
    widths_L: Tensor | int,
    method: Method = "ste",
    temperature: float = 1.0,
    noise: torch.Generator | None = None,
    core_LI: Tensor | None = None,
) -> Tensor:
    """The mask of a training step, float32 with a gradient for the scores. `method` is one of those that learn.

    ste: hard top-k forward, identity backward (Bengio et al. 2013). gumbel: hard top-k of scores + Gumbel noise drawn
    from `noise`, backward of width * softmax((scores + noise) / temperature). soft_topk: sigmoid((scores - t) /
    temperature) both ways, with the threshold t of each layer such that the mask sums to its width.
    ste, gumbel: channels of the bool mask `core_LI` are always kept.
    """
    width_L1 = torch.as_tensor(widths_L, device=scores_LI.device).reshape(-1, 1)
    if method == "ste":
        return topk_mask(with_core(scores_LI.detach(), core_LI), widths_L).float() + (scores_LI - scores_LI.detach())
    if method == "gumbel":
        uniform = torch.rand(scores_LI.shape, generator=noise).clamp_(1e-9, 1 - 1e-7).to(scores_LI.device)
        noisy = scores_LI - (-uniform.log()).log()
        soft = width_L1 * torch.softmax(noisy / temperature, -1)
        return topk_mask(with_core(noisy.detach(), core_LI), widths_L).float() + (soft - soft.detach())
    return _SoftTopK.apply(scores_LI / temperature, width_L1)


class _SoftTopK(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, logits_LI: Tensor, width_L1: Tensor) -> Tensor:
        exact = logits_LI.double()
        low, high = exact.amin(-1, keepdim=True) - 40, exact.amax(-1, keepdim=True) + 40
        for _ in range(60):
            middle = (low + high) / 2
            above = torch.sigmoid(exact - middle).sum(-1, keepdim=True) > width_L1
            low, high = torch.where(above, middle, low), torch.where(above, high, middle)
        mask_LI = torch.sigmoid(exact - (low + high) / 2)
        ctx.save_for_backward(mask_LI)
        return mask_LI.to(logits_LI.dtype)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[Tensor, None]:
        """The threshold moves with the scores so that the sum stays: s * (g - <s, g> / <s, 1>), s = m (1 - m)."""
        (mask_LI,) = ctx.saved_tensors  # type: ignore[attr-defined]
        grad = grads[0].double()
        slope = mask_LI * (1 - mask_LI)
        mean = (slope * grad).sum(-1, keepdim=True) / slope.sum(-1, keepdim=True).clamp_min(1e-12)
        return (slope * (grad - mean)).to(grads[0].dtype), None
