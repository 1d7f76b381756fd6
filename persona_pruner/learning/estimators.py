"""From scores to masks: exactly k channels per layer, and how the gradient passes.

Shapes: L layers, I channels. Every function maps scores [L, I] (float32) to a mask [L, I].
"""

from typing import Literal

import torch
from torch import Tensor

Method = Literal["ste", "gumbel", "soft_topk"]


def kept_channels(channels: int, ratio: float, multiple: int) -> int:
    """k = round((1 - ratio) * channels) to the next multiple of `multiple`, at least one multiple, at most all."""
    multiple = min(multiple, channels)
    return min(max(round((1 - ratio) * channels / multiple), 1) * multiple, channels)


def topk_mask(scores_LI: Tensor, k: int) -> Tensor:
    """Bool mask of the k largest scores of each layer; among equal scores the lower channel wins."""
    order = scores_LI.sort(dim=-1, descending=True, stable=True).indices
    return torch.zeros_like(scores_LI, dtype=torch.bool).scatter_(-1, order[..., :k], True)


def relaxed_mask(
    scores_LI: Tensor, k: int, method: Method = "ste", temperature: float = 1.0, noise: torch.Generator | None = None
) -> Tensor:
    """The mask of a training step, float32 with a gradient for the scores.

    ste: hard top-k forward, identity backward (Bengio et al. 2013). gumbel: hard top-k of scores + Gumbel noise drawn
    from `noise`, backward of k * softmax((scores + noise) / temperature). soft_topk: sigmoid((scores - t) /
    temperature) both ways, with the threshold t of each layer such that the mask sums to k.
    """
    if method == "ste":
        return topk_mask(scores_LI.detach(), k).float() + (scores_LI - scores_LI.detach())
    if method == "gumbel":
        uniform = torch.rand(scores_LI.shape, generator=noise).clamp_(1e-9, 1 - 1e-7).to(scores_LI.device)
        noisy = scores_LI - (-uniform.log()).log()
        soft = k * torch.softmax(noisy / temperature, -1)
        return topk_mask(noisy.detach(), k).float() + (soft - soft.detach())
    return _SoftTopK.apply(scores_LI / temperature, k)


class _SoftTopK(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, logits_LI: Tensor, k: int) -> Tensor:
        exact = logits_LI.double()
        low, high = exact.amin(-1, keepdim=True) - 40, exact.amax(-1, keepdim=True) + 40
        for _ in range(60):
            middle = (low + high) / 2
            above = torch.sigmoid(exact - middle).sum(-1, keepdim=True) > k
            low, high = torch.where(above, middle, low), torch.where(above, high, middle)
        mask_LI = torch.sigmoid(exact - (low + high) / 2)
        ctx.save_for_backward(mask_LI)
        return mask_LI.to(logits_LI.dtype)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[Tensor, None]:
        """The threshold moves with the scores so that the sum stays k: s * (g - <s, g> / <s, 1>), s = m (1 - m)."""
        (mask_LI,) = ctx.saved_tensors  # type: ignore[attr-defined]
        grad = grads[0].double()
        slope = mask_LI * (1 - mask_LI)
        mean = (slope * grad).sum(-1, keepdim=True) / slope.sum(-1, keepdim=True).clamp_min(1e-12)
        return (slope * (grad - mean)).to(grads[0].dtype), None
