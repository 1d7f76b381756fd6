"""Committed masks, switched on in a loaded transformers model.

Shapes: B rows of a batch, L layers, I FFN channels.
"""

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from persona_pruner.backbone.channels import ChannelMasks
from persona_pruner.backbone.files import fingerprint_of
from persona_pruner.errors import MaskError
from persona_pruner.masks.format import Mask
from persona_pruner.masks.header import CommonMetadata

_APPLIED: "WeakKeyDictionary[nn.Module, ChannelMasks]" = WeakKeyDictionary()


class AppliedMasks:
    """Masks that are on in a model, until `remove`. A context manager; leaving it removes them."""

    def __init__(self, model: nn.Module, masks: ChannelMasks) -> None:
        self._model, self._masks = model, masks

    def remove(self) -> None:
        """Give the unpruned model back. Nothing happens where other masks have replaced these."""
        if _APPLIED.get(self._model) is self._masks:
            remove_masks(self._model)

    def __enter__(self) -> "AppliedMasks":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def apply_masks(model: Any, masks: "Mask | Sequence[Mask | None]", *, check_backbone: bool = True) -> AppliedMasks:
    """Switch a mask on for all rows, or one mask for each row of the batch (None: unpruned), instead of what is on.

    A batch must then have as many rows as there are masks. The first call for a model reads the files that it was
    loaded from, for their fingerprint; a model that was not loaded from files needs `check_backbone=False`.
    Raises MaskError where a mask is of another backbone or shape (what was on stays on), BackboneError for an
    architecture that cannot be masked.
    """
    channel_masks = ChannelMasks(model)
    shape = (channel_masks.layers, channel_masks.channels)
    for mask in [masks] if isinstance(masks, Mask) else masks:
        if mask is not None:
            _check(mask, model, shape, check_backbone)
    if isinstance(masks, Mask):
        keep = masks.keep_LI
    elif masks:
        keep = torch.stack([torch.ones(shape, dtype=torch.bool) if m is None else m.keep_LI for m in masks])
    else:
        raise MaskError("no masks to apply: give one, or one for each row (None for an unpruned row)")
    remove_masks(model)
    channel_masks.attach().set(keep.to(device=model.device, dtype=model.dtype))
    _APPLIED[model] = channel_masks
    return AppliedMasks(model, channel_masks)


def remove_masks(model: nn.Module) -> None:
    """Switch off what `apply_masks` has switched on, if anything."""
    masks = _APPLIED.pop(model, None)
    if masks is not None:
        masks.detach()


def _check(mask: Mask, model: Any, shape: tuple[int, int], check_backbone: bool) -> None:
    name = f"mask of {mask.metadata.persona_id}"
    if tuple(mask.keep_LI.shape) != shape:
        raise MaskError(
            f"{name}: has {mask.keep_LI.shape[0]} layers of {mask.keep_LI.shape[1]} channels, this "
            f"{type(model).__name__} {shape[0]} of {shape[1]}; use the backbone it was made for"
        )
    if check_backbone:
        check_fingerprint(mask.metadata, model)


def check_fingerprint(metadata: CommonMetadata, model: Any) -> None:
    """Raise MaskError where a mask was not made for the weights that this model was loaded from."""
    name = f"mask of {metadata.persona_id}"
    own = fingerprint_of(model)
    if own is None:
        raise MaskError(
            f"{name}: was made for fingerprint {metadata.backbone_fingerprint[:16]}, and this model was not "
            "loaded from files that have one; say check_backbone=False where it is the same model"
        )
    metadata.check(name, backbone_fingerprint=own)
