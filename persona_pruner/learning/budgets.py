"""How many channels each layer keeps of the same total.

Shapes: L layers, I channels.
"""

import torch
from torch import Tensor


def kept_channels(channels: int, ratio: float, multiple: int) -> int:
    """k = round((1 - ratio) * channels) to the next multiple of `multiple`, at least one multiple, at most all."""
    multiple = min(multiple, channels)
    return min(max(round((1 - ratio) * channels / multiple), 1) * multiple, channels)


def free_widths(scores_LI: Tensor, total: int, floor: int) -> Tensor:
    """int64 [L]: channels per layer when the `total` largest scores of all layers are kept, `floor` in each at least.

    Scores must compare across layers. Among equal scores the earlier layer and the lower channel win.
    """
    layers, channels = scores_LI.shape
    floor = min(floor, channels, total // layers)
    order_LI = scores_LI.sort(dim=-1, descending=True, stable=True).indices
    wanted_LI = scores_LI.double().scatter(1, order_LI[:, :floor], float("inf"))
    best = wanted_LI.flatten().sort(descending=True, stable=True).indices[:total]
    return torch.bincount(best // channels, minlength=layers)


def rounded_widths(widths_L: Tensor, channels: int, multiple: int) -> Tensor:
    """int64 [L]: widths as multiples of `multiple` with nearly the same sum (rounded to a multiple as well).

    Each layer keeps a multiple at least; layers with the largest remainders are rounded up.
    """
    if channels < multiple:
        return torch.full_like(widths_L, channels)
    most = channels // multiple
    units_L = (widths_L // multiple).clamp(1, most)
    total = min(max(round(int(widths_L.sum()) / multiple), len(widths_L)), most * len(widths_L))
    while (missing := total - int(units_L.sum())) != 0:
        step = 1 if missing > 0 else -1
        room_L = units_L < most if step > 0 else units_L > 1
        remainder_L = (widths_L - units_L * multiple) * step
        chosen = remainder_L.masked_fill(~room_L, torch.iinfo(torch.int64).min).argmax()
        units_L[chosen] += step
    return units_L * multiple
