"""Masks resident beside the backbone: packed bits in slots, and for each token of a step the slot that it uses.

Slot 0 keeps every channel. A slot is named by the digest of its mask, never by the persona: a retrained persona gets
another slot while requests under way finish with the old one. Shapes: L layers of this rank, S slots, R of them in a
step, T tokens, I channels (of the rank), N bytes (ceil(I / 8)).
"""

import base64
import binascii
import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from persona_pruner.errors import MaskError
from persona_pruner.serving.channel_op import unpack

DIGEST, BITS = "persona_mask", "persona_bits"
"""Keys of a request's extra arguments: sha256 (hex) of the packed bits, and the bits of all layers in base64."""
SMALL_STEP = 64
"""Tokens up to which a CPU unpacks the masks of a step once for all layers: a row's next token, not its prompt."""


@dataclass(frozen=True)
class RequestMask:
    """The mask that a request brings with it. It travels with the request, so that no worker reads storage."""

    digest: str
    bits: str

    @classmethod
    def of(cls, packed: bytes) -> "RequestMask":
        return cls(hashlib.sha256(packed).hexdigest(), base64.b64encode(packed).decode())

    @classmethod
    def find(cls, extra_args: dict[str, Any] | None) -> "RequestMask | None":
        """The mask among a request's extra arguments, unchecked."""
        digest, bits = (extra_args or {}).get(DIGEST), (extra_args or {}).get(BITS)
        return None if digest is None and bits is None else cls(str(digest), str(bits))

    def extra_args(self) -> dict[str, str]:
        return {DIGEST: self.digest, BITS: self.bits}

    def check(self, layers: int, channels: int) -> None:
        """Raise MaskError unless the bits are whole and of this backbone: a worker trusts what has passed here."""
        try:
            packed = base64.b64decode(self.bits, validate=True)
        except (binascii.Error, ValueError):
            raise MaskError(f"{BITS}: not base64") from None
        if len(packed) != layers * -(-channels // 8):
            raise MaskError(f"{BITS}: {len(packed)} bytes; {layers} layers of {channels} channels are "
                            f"{layers * -(-channels // 8)}")  # fmt: skip
        if hashlib.sha256(packed).hexdigest() != self.digest:
            raise MaskError(f"{BITS}: do not match the digest {self.digest[:16]}")

    def keep(self, layers: int, channels: int) -> np.ndarray:
        """bool [layers, channels]."""
        packed = np.frombuffer(base64.b64decode(self.bits), np.uint8).reshape(layers, -1)
        return np.unpackbits(packed, axis=1, count=channels, bitorder="little").astype(bool)


@dataclass(frozen=True, kw_only=True)
class MaskLayout:
    """What of a backbone's masks one rank of an engine holds."""

    layers: tuple[int, ...]
    """Indices of the backbone's layers that live here."""
    total_layers: int
    channels: int
    """Of the whole backbone."""
    slots: int
    tokens: int
    """Of the largest step."""
    rank: int = 0
    """With tensor parallelism rank r holds the r-th of `ranks` equal parts of the channels."""
    ranks: int = 1
    dtype: torch.dtype = torch.float32
    """Of the hidden states."""


class MaskTable:
    """`bits_LSN`, `slot_T` and, on a CPU, `factors_LTI` are static buffers that the operator reads; everything else
    lives on the host."""

    def __init__(self, layout: MaskLayout, device: torch.device | str = "cpu") -> None:
        self.layers, self.total_layers, self.channels = list(layout.layers), layout.total_layers, layout.channels
        slots, width = layout.slots, layout.channels // layout.ranks
        self._columns = slice(layout.rank * width, (layout.rank + 1) * width)
        self.bits_LSN = torch.zeros(len(self.layers), slots + 1, -(-width // 8), dtype=torch.uint8, device=device)
        self.bits_LSN[:, 0] = 255
        self.slot_T = torch.zeros(layout.tokens, dtype=torch.int32, device=device)
        rows = min(SMALL_STEP, layout.tokens) if self.slot_T.device.type == "cpu" else 0
        self.factors_LTI = torch.ones(len(self.layers), rows, width, dtype=layout.dtype) if rows else None
        """The masks of a small step's tokens, unpacked."""
        self._unpacked: tuple[int, bytes] = (0, b"")
        self._slots: OrderedDict[str, int] = OrderedDict()
        self._free = list(range(slots, 0, -1))
        self.loads = self.evictions = 0

    def assign(self, masks: Sequence[RequestMask | None], starts: np.ndarray) -> None:
        """Set the slots of a step: request r, under masks[r], has tokens starts[r] to starts[r + 1]."""
        in_use = {mask.digest for mask in masks if mask}
        slots = np.array([self._slot(mask, in_use) if mask else 0 for mask in masks], np.int32)
        slot_T = np.zeros(len(self.slot_T), np.int32)  # What pads a step to a captured size uses slot 0.
        slot_T[: starts[-1]] = np.repeat(slots, np.diff(starts))
        self.slot_T.copy_(torch.from_numpy(slot_T))
        if self.factors_LTI is not None and starts[-1] <= self.factors_LTI.shape[1]:
            self._unpack(self.factors_LTI, slot_T[: self.factors_LTI.shape[1]])

    def _unpack(self, factors_LTI: torch.Tensor, slot_T: np.ndarray) -> None:
        """While the same requests are answered, their masks are the same from step to step."""
        wanted = (self.loads, slot_T.tobytes())
        if wanted != self._unpacked:
            slot_R, row_T = np.unique(slot_T, return_inverse=True)
            bits_LRN = self.bits_LSN.index_select(1, torch.from_numpy(slot_R))
            factors_LRI = unpack(bits_LRN, factors_LTI.dtype)[:, :, : factors_LTI.shape[2]]
            torch.index_select(factors_LRI, 1, torch.from_numpy(row_T), out=factors_LTI)
            self._unpacked = wanted

    def stats(self) -> dict[str, int]:
        return {
            "slots": self.bits_LSN.shape[1] - 1,
            "slots_used": len(self._slots),
            "bytes": self.bits_LSN.numel(),
            "loads": self.loads,
            "evictions": self.evictions,
        }

    def _slot(self, mask: RequestMask, in_use: set[str]) -> int:
        slot = self._slots.get(mask.digest)
        if slot is None:
            slot = self._slots[mask.digest] = self._free.pop() if self._free else self._evict(in_use)
            self._load(slot, mask)
        self._slots.move_to_end(mask.digest)
        return slot

    def _evict(self, in_use: set[str]) -> int:
        """The slot whose mask was not used for the longest time. There is one: slots are at least a step's requests."""
        self.evictions += 1
        return self._slots.pop(next(digest for digest in self._slots if digest not in in_use))

    def _load(self, slot: int, mask: RequestMask) -> None:
        self.loads += 1
        keep_LI = mask.keep(self.total_layers, self.channels)[self.layers, self._columns]
        packed_LN = np.packbits(keep_LI, axis=1, bitorder="little")
        self.bits_LSN[:, slot].copy_(torch.from_numpy(packed_LN))


def ffn_shape(config: Any) -> tuple[int, int]:
    """(layers, channels) from a transformers configuration."""
    channels = getattr(config, "intermediate_size", None) or getattr(config, "ffn_dim", None)
    return int(config.num_hidden_layers), int(channels or 4 * config.hidden_size)
