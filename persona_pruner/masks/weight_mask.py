"""The mask of one persona over single weights: which ones of the backbone's attention and FFN matrices it keeps.

Nothing gets smaller by such a mask; it is what training-free methods are published with, and is applied to the backbone
as it is. Format: docs/mask-format.md. Shapes: O output rows, I input columns of a matrix, N bytes (ceil(I / 8)).
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import pydantic.dataclasses
import torch
from pydantic import ConfigDict, Field, TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from persona_pruner.errors import MaskError
from persona_pruner.masks.format import Mask
from persona_pruner.masks.header import (
    CommonMetadata,
    checked,
    is_sealed,
    is_weight_level,
    read_header,
    seal,
    to_header,
)

if TYPE_CHECKING:
    from persona_pruner.backbone.apply_weights import AppliedWeightMask

Size = Annotated[int, Field(ge=1)]
_PREFIX = "keep."


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=ConfigDict(use_attribute_docstrings=True))
class WeightMaskMetadata(CommonMetadata):
    kind: Literal["weights"] = "weights"
    matrices: dict[str, tuple[Size, Size, Size]]
    """Name of each matrix's module in the model: output rows, input columns, and weights that every row keeps."""
    gate: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """What a dropped weight is multiplied by."""


@dataclass(frozen=True)
class WeightMask:
    packed: Mapping[str, Tensor]
    """uint8 [O, N] by the name of the matrix's module: bit j of byte i is column 8i+j, 1 = kept."""
    metadata: WeightMaskMetadata

    def to_bytes(self) -> bytes:
        """safetensors; the same mask gives the same bytes."""
        tensors = {_PREFIX + name: bits_ON.contiguous() for name, bits_ON in sorted(self.packed.items())}
        return seal(tensors, to_header(self.metadata))

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> "WeightMask":
        """Read and verify. Raises MaskError, which names `where`."""
        header = read_header(data, where)
        if not is_weight_level(header):
            raise MaskError(f"{where}: is a mask of FFN channels, not of single weights")
        if not is_sealed(data, header):
            raise MaskError(f"{where}: does not match the sha256 in its header; pull or make it again")
        try:
            tensors = load(data)
            values = {name: json.loads(text) for name, text in header.items() if name in _FIELDS}
        except (SafetensorError, ValueError, RuntimeError, RecursionError) as error:
            raise MaskError(f"{where}: not a whole mask: {str(error).splitlines()[0]}") from None
        metadata = checked(_ADAPTER, values, where)
        packed = {name: tensors.get(_PREFIX + name) for name in metadata.matrices}
        return cls({name: _verified(name, bits, metadata, where) for name, bits in packed.items()}, metadata)

    def check(self, where: str, persona_id: str | None = None, backbone_fingerprint: str | None = None) -> None:
        """Raise MaskError where the mask belongs to another persona or backbone."""
        self.metadata.check(where, persona_id, backbone_fingerprint)

    def keep(self, name: str) -> Tensor:
        """bool [O, I] of one matrix."""
        return unpack(self.packed[name], self.metadata.matrices[name][1])

    def similarity(self, other: "WeightMask", containing: str = "") -> float:
        """Jaccard index of the kept weights, over the matrices whose names hold `containing`."""
        names = [name for name in self.packed if containing in name]
        both = sum((self.keep(name) & other.keep(name)).sum().item() for name in names)
        return both / sum((self.keep(name) | other.keep(name)).sum().item() for name in names)

    def apply(self, model: Any, *, check_backbone: bool = True) -> "AppliedWeightMask":
        """Multiply the mask into the weights of a loaded transformers model, instead of what is on; the handle's
        `remove()` gives the weights back. Errors and `check_backbone`: see `apply_weight_mask`."""
        from persona_pruner.backbone.apply_weights import apply_weight_mask

        return apply_weight_mask(model, self, check_backbone=check_backbone)

    on = apply
    """`with mask.on(model): ...` is unpruned again at the end."""


_ADAPTER = TypeAdapter(WeightMaskMetadata)
_FIELDS = {field.name for field in dataclasses.fields(WeightMaskMetadata)}


def read_mask(data: bytes, where: str) -> Mask | WeightMask:
    """A mask of either kind, verified. Raises MaskError, which names `where`."""
    if is_weight_level(read_header(data, where)):
        return WeightMask.from_bytes(data, where)
    return Mask.from_bytes(data, where)


def pack(keep_OI: Tensor) -> Tensor:
    """uint8 [O, N] of bool [O, I]."""
    return torch.from_numpy(np.packbits(keep_OI.cpu().numpy(), axis=1, bitorder="little"))


def unpack(packed_ON: Tensor, columns: int) -> Tensor:
    """bool [O, I] of uint8 [O, N]."""
    bits = np.unpackbits(packed_ON.numpy(), axis=1, bitorder="little", count=columns)
    return torch.from_numpy(bits.astype(bool))


def _verified(name: str, packed_ON: Tensor | None, metadata: WeightMaskMetadata, where: str) -> Tensor:
    rows, columns, kept = metadata.matrices[name]
    shape = (rows, (columns + 7) // 8)
    if packed_ON is None or packed_ON.dtype != torch.uint8 or packed_ON.shape != shape:
        raise MaskError(f"{where}: {name}: bits are not uint8 {list(shape)}")
    bits = np.unpackbits(packed_ON.numpy(), axis=1, bitorder="little")
    if bits[:, columns:].any():
        raise MaskError(f"{where}: {name}: bits beyond its {columns} columns are set")
    counts = bits.sum(1, dtype=np.int64)
    if (counts != kept).any():
        raise MaskError(f"{where}: {name}: a row keeps {counts[counts != kept][0]} weights, the header says {kept}")
    return packed_ON
