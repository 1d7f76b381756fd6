"""The mask of one persona: which FFN channels of the backbone it keeps. One object, packed bits, verified on reading.

Format: docs/mask-format.md. Shape suffixes: L layers, I FFN channels, K kept channels, N bytes (ceil(I / 8)).
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from persona_pruner.errors import MaskError
from persona_pruner.masks.header import (
    MaskMetadata,
    is_sealed,
    is_weight_level,
    parse_header,
    read_header,
    seal,
    to_header,
)

if TYPE_CHECKING:
    from persona_pruner.backbone.apply import AppliedMasks

__all__ = ["Mask", "MaskMetadata"]


@dataclass(frozen=True)
class Mask:
    keep_LI: Tensor
    """bool [L, I]."""
    metadata: MaskMetadata
    scores_LI: Tensor | None = None
    """float16 [L, I], for warm starts."""

    def to_bytes(self) -> bytes:
        """safetensors; the same mask gives the same bytes."""
        tensors = {"keep": torch.from_numpy(self._pack())}
        if self.scores_LI is not None:
            tensors["scores"] = self.scores_LI.to(torch.float16).contiguous()
        return seal(tensors, to_header(self.metadata))

    def packed(self) -> bytes:
        """The bits alone, L x N bytes."""
        return self._pack().tobytes()

    def _pack(self) -> np.ndarray:
        return np.packbits(self.keep_LI.numpy(), axis=1, bitorder="little")

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> "Mask":
        """Read and verify. Raises MaskError, which names `where`."""
        header = read_header(data, where)
        if is_weight_level(header):
            raise MaskError(
                f"{where}: is a mask of single weights ({header.get('method', '?')}): no matrix gets smaller by it, so "
                "that it is neither exported nor served; apply it to the backbone (MaskStore(...).load(...).apply), or "
                "choose channels (learning.method: ste)"
            )
        sealed = header["format_version"] != "1"
        if sealed and not is_sealed(data, header):
            raise MaskError(f"{where}: does not match the sha256 in its header; pull or make it again")
        try:
            tensors = load(data)
            packed_LN = tensors["keep"]
        except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
            raise MaskError(f"{where}: not a whole mask: {str(error).splitlines()[0]}") from None
        if not sealed and header.get("keep_sha256") != _digest(packed_LN):
            raise MaskError(f"{where}: the bits do not match the sha256 in the header; pull or make it again")
        metadata = parse_header(header, len(packed_LN) if packed_LN.dim() else 0, where)
        keep_LI = _unpack(packed_LN, metadata, where)
        scores_LI = tensors.get("scores")
        if scores_LI is not None and (scores_LI.shape != keep_LI.shape or scores_LI.dtype != torch.float16):
            raise MaskError(f"{where}: scores are {_kind(scores_LI)}, not float16 {list(keep_LI.shape)}")
        return cls(keep_LI, metadata, scores_LI)

    def check(self, where: str, persona_id: str | None = None, backbone_fingerprint: str | None = None) -> None:
        """Raise MaskError where the mask belongs to another persona or backbone."""
        self.metadata.check(where, persona_id, backbone_fingerprint)

    def keep_indices(self) -> list[Tensor]:
        """For each layer the kept channels, int64, ascending."""
        return [row_I.nonzero().flatten() for row_I in self.keep_LI]

    def save_keep_indices(self, path: str | Path | BinaryIO) -> None:
        """Write the index file that the published exporter of Persona-Pruner reads: int64 [layers, kept].

        Raises MaskError where layers keep different numbers of channels, which that form cannot say.
        """
        if len(set(self.metadata.kept)) > 1:
            raise MaskError(
                f"mask of {self.metadata.persona_id}: its layers keep {min(self.metadata.kept)} to "
                f"{max(self.metadata.kept)} channels; an index file has one number for all (learning.budget: uniform)"
            )
        torch.save(torch.stack(self.keep_indices()), path)

    def similarity(self, other: "Mask") -> float:
        """Jaccard index of the kept channels."""
        union = (self.keep_LI | other.keep_LI).sum().item()
        return (self.keep_LI & other.keep_LI).sum().item() / union

    def apply(self, model: Any, *, check_backbone: bool = True) -> "AppliedMasks":
        """Switch the mask on in a loaded transformers model, instead of what is on; the handle's `remove()` gives the
        unpruned model back. Errors and `check_backbone`: see `apply_masks`, which also takes one mask per row."""
        from persona_pruner.backbone.apply import apply_masks

        return apply_masks(model, self, check_backbone=check_backbone)

    on = apply
    """`with mask.on(model): ...` is unpruned again at the end."""


def _unpack(packed_LN: Tensor, metadata: MaskMetadata, where: str) -> Tensor:
    """bool [L, I]. Raises MaskError where the bits are not what the header says."""
    size = (metadata.channels + 7) // 8
    if packed_LN.dtype != torch.uint8 or packed_LN.shape != (metadata.layers, size):
        raise MaskError(f"{where}: keep is {_kind(packed_LN)}, not uint8 {[metadata.layers, size]}")
    bits = np.unpackbits(packed_LN.numpy(), axis=1, bitorder="little").astype(bool)
    if bits[:, metadata.channels :].any():
        raise MaskError(f"{where}: bits beyond the {metadata.channels} channels of a layer are set")
    keep_LI = torch.from_numpy(bits[:, : metadata.channels].copy())
    for layer, (kept, stated) in enumerate(zip(keep_LI.sum(1).tolist(), metadata.kept, strict=True)):
        if kept != stated:
            raise MaskError(f"{where}: layer {layer} keeps {kept} channels, the header says {stated}")
    return keep_LI


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _digest(packed_LN: Tensor) -> str:
    return hashlib.sha256(packed_LN.numpy().tobytes()).hexdigest()
