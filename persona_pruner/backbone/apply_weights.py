"""A committed mask of single weights, multiplied into a loaded transformers model."""

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from persona_pruner.backbone.apply import check_fingerprint
from persona_pruner.errors import MaskError
from persona_pruner.masks.weight_mask import WeightMask

_APPLIED: "WeakKeyDictionary[nn.Module, AppliedWeightMask]" = WeakKeyDictionary()


class AppliedWeightMask:
    """A mask that is on in a model, until `remove`. A context manager; leaving it removes the mask.

    Holds the matrices as they were, so that they come back bit by bit: the model takes twice the memory meanwhile.
    """

    def __init__(self, model: nn.Module, weights: dict[nn.Linear, Tensor]) -> None:
        self._model, self._weights = model, weights

    def remove(self) -> None:
        """Give the unpruned model back. Nothing happens where another mask has replaced this one."""
        if _APPLIED.get(self._model) is self:
            del _APPLIED[self._model]
            for linear, weight in self._weights.items():
                linear.weight.data = weight

    def __enter__(self) -> "AppliedWeightMask":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


@torch.no_grad()
def apply_weight_mask(model: Any, mask: WeightMask, *, check_backbone: bool = True) -> AppliedWeightMask:
    """Multiply every dropped weight by the mask's gate, instead of what is on.

    `check_backbone` as in `apply_masks`. Raises MaskError where the mask is of another backbone or its matrices are not
    those of this model; what was on stays on.
    """
    name = f"mask of {mask.metadata.persona_id}"
    linears = {}
    modules = dict(model.named_modules())
    for matrix, (rows, columns, _) in mask.metadata.matrices.items():
        linear = modules.get(matrix)
        if not isinstance(linear, nn.Linear) or linear.weight.shape != (rows, columns):
            raise MaskError(
                f"{name}: {matrix} [{rows}, {columns}] is no matrix of this {type(model).__name__}; "
                "use the backbone it was made for"
            )
        linears[matrix] = linear
    if check_backbone:
        check_fingerprint(mask.metadata, model)
    if model in _APPLIED:
        _APPLIED[model].remove()
    weights = {}
    for matrix, linear in linears.items():
        weight = weights[linear] = linear.weight.data
        dropped = ~mask.keep(matrix).to(weight.device)
        linear.weight.data = torch.where(dropped, weight * mask.metadata.gate, weight)
    applied = _APPLIED[model] = AppliedWeightMask(model, weights)
    return applied
