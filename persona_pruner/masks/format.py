"""The mask of one persona: which FFN channels of the backbone it keeps. One object, packed bits, verified on reading.

Format: docs/mask-format.md. Shape suffixes: L layers, I FFN channels, K kept channels, N bytes (ceil(I / 8)).
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from persona_pruner.errors import MaskError

if TYPE_CHECKING:
    from persona_pruner.backbone.apply import AppliedMasks

FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class MaskMetadata:
    persona_id: str
    persona_sha256: str
    """Of the description, UTF-8."""
    persona_description: str = ""
    """The description itself, so that whoever serves the mask can put the persona in front of a conversation."""
    backbone: str
    backbone_fingerprint: str
    layers: int
    channels: int
    kept: int
    """Channels kept in every layer."""
    method: str
    ratio: float
    """Share that was pruned, as asked for; kept is rounded to learning.channel_multiple."""
    seed: int
    steps: int
    loss_dense: float | None = None
    """Held-out loss of the unpruned backbone, nats per token."""
    loss_masked: float | None = None
    data_sha256: str = ""
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    run_id: str = ""


@dataclass(frozen=True)
class Mask:
    keep_LI: Tensor
    """bool [L, I]."""
    metadata: MaskMetadata
    scores_LI: Tensor | None = None
    """float16 [L, I], for warm starts."""

    def to_bytes(self) -> bytes:
        """safetensors; the same mask gives the same bytes."""
        packed_LN = torch.from_numpy(self._pack())
        tensors = {"keep": packed_LN}
        if self.scores_LI is not None:
            tensors["scores"] = self.scores_LI.to(torch.float16).contiguous()
        header = {name: json.dumps(value) for name, value in dataclasses.asdict(self.metadata).items()}
        header |= {"format_version": str(FORMAT_VERSION), "keep_sha256": _digest(packed_LN)}
        return _sort_header(save(tensors, header))

    def packed(self) -> bytes:
        """The bits alone, L x N bytes."""
        return self._pack().tobytes()

    def _pack(self) -> np.ndarray:
        return np.packbits(self.keep_LI.numpy(), axis=1, bitorder="little")

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> "Mask":
        """Read and verify. Raises MaskError, which names `where`."""
        try:
            tensors = load(data)
            header = read_header(data, where)
            metadata = _metadata(header, where)
            keep_LI = _unpack(tensors["keep"], metadata.channels)
        except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
            raise MaskError(f"{where}: not a whole mask: {type(error).__name__}: {error}") from None
        if header.get("keep_sha256") != _digest(tensors["keep"]):
            raise MaskError(f"{where}: the bits do not match the sha256 in the header; pull or make it again")
        if keep_LI.shape[0] != metadata.layers or not torch.all(keep_LI.sum(1) == metadata.kept):
            raise MaskError(f"{where}: the header says {metadata.kept} channels in {metadata.layers} layers; not so")
        return cls(keep_LI, metadata, tensors.get("scores"))

    def check(self, where: str, persona_id: str | None = None, backbone_fingerprint: str | None = None) -> None:
        """Raise MaskError where the mask belongs to another persona or backbone."""
        own = self.metadata
        if persona_id is not None and own.persona_id != persona_id:
            raise MaskError(f"{where}: is the mask of persona {own.persona_id!r}, not of {persona_id!r}")
        if backbone_fingerprint is not None and own.backbone_fingerprint != backbone_fingerprint:
            raise MaskError(
                f"{where}: was made for backbone {own.backbone} with fingerprint {own.backbone_fingerprint[:16]}, "
                f"this one has {backbone_fingerprint[:16]}; use the backbone it was made for"
            )

    def keep_indices(self) -> Tensor:
        """int64 [L, K], ascending in each row."""
        return torch.stack([row.nonzero().flatten() for row in self.keep_LI])

    def save_keep_indices(self, path: str | Path | BinaryIO) -> None:
        """Write the index file that the published exporter of Persona-Pruner reads."""
        torch.save(self.keep_indices(), path)

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


def load_keep_indices(path: str | Path, channels: int, where: str | None = None) -> Tensor:
    """bool [L, channels] from an index file [L, K] int64. Raises MaskError. Never executes what a file holds."""
    name = where or str(path)
    try:
        indices_LK = torch.load(path, weights_only=True)
    except Exception as error:
        raise MaskError(f"{name}: not an index file: {str(error).splitlines()[0]}") from None
    if not isinstance(indices_LK, Tensor) or indices_LK.dtype != torch.int64 or indices_LK.dim() != 2:
        raise MaskError(f"{name}: must hold one int64 tensor [layers, kept]")
    if indices_LK.numel() == 0 or indices_LK.min() < 0 or indices_LK.max() >= channels:
        raise MaskError(f"{name}: an index is outside 0..{channels - 1}")
    keep_LI = torch.zeros(indices_LK.shape[0], channels, dtype=torch.bool)
    keep_LI.scatter_(1, indices_LK, True)
    if not torch.all(keep_LI.sum(1) == indices_LK.shape[1]):
        raise MaskError(f"{name}: a layer names the same channel twice")
    return keep_LI


def read_header(data: bytes, where: str) -> dict[str, str]:
    """The metadata strings of a safetensors object of which `data` is the beginning."""
    try:
        length = int.from_bytes(data[:8], "little")
        return dict(json.loads(data[8 : 8 + length])["__metadata__"])
    except (ValueError, KeyError, TypeError) as error:
        raise MaskError(f"{where}: not a mask: no readable header ({type(error).__name__})") from None


def _sort_header(data: bytes) -> bytes:
    """The same safetensors object with its header's keys in order: the library writes metadata in a random one."""
    size = int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8 : 8 + size]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


def _metadata(header: dict[str, str], where: str) -> MaskMetadata:
    version = header.get("format_version", "none")
    if not version.isdigit() or int(version) > FORMAT_VERSION:
        raise MaskError(f"{where}: mask format {version}; this release reads up to {FORMAT_VERSION}: update it")
    known = {field.name for field in dataclasses.fields(MaskMetadata)}
    try:
        return MaskMetadata(**{name: json.loads(value) for name, value in header.items() if name in known})
    except (TypeError, ValueError) as error:
        raise MaskError(f"{where}: wrong header: {error}") from None


def metadata_of(data: bytes, where: str) -> MaskMetadata:
    """Metadata from the beginning of an object, without its bits."""
    return _metadata(read_header(data, where), where)


def _unpack(packed_LN: Tensor, channels: int) -> Tensor:
    if packed_LN.dtype != torch.uint8 or packed_LN.shape[1] != (channels + 7) // 8:
        raise ValueError(f"keep has shape {tuple(packed_LN.shape)}, not [L, {(channels + 7) // 8}]")
    bits = np.unpackbits(packed_LN.numpy(), axis=1, count=channels, bitorder="little")
    return torch.from_numpy(bits.astype(bool))


def _digest(packed_LN: Tensor) -> str:
    return hashlib.sha256(packed_LN.numpy().tobytes()).hexdigest()
