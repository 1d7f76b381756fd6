"""The operator that applies one mask per token to the channels of an FFN: bits in, hidden states changed in place.

Registered with torch, so that torch.compile and CUDA graphs see one opaque call on static buffers. A CPU takes small
steps ready-made: `factors_TI` are the unpacked masks of as many tokens as it has rows (`MaskTable.assign`).
Shapes: T tokens, I channels (of this rank), S slots, R runs of tokens or rows, N bytes (ceil(I / 8)).
"""

from functools import lru_cache

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("persona_pruner", "DEF")
_LIBRARY.define("mask_channels(Tensor(a!) hidden_TI, Tensor bits_SN, Tensor slot_T, Tensor? factors_TI=None) -> ()")


def mask_channels_reference(hidden_TI: Tensor, bits_SN: Tensor, slot_T: Tensor) -> Tensor:
    """The plain formula, as a new tensor. slot_T is int; bits_SN uint8, where bit j of byte i is channel 8i+j."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bits_SN.device)
    keep_SI = ((bits_SN[:, :, None] >> shifts) & 1).flatten(1)[:, : hidden_TI.shape[1]]
    return hidden_TI * keep_SI[slot_T.long()].to(hidden_TI.dtype)


def _mask_channels(hidden_TI: Tensor, bits_SN: Tensor, slot_T: Tensor, factors_TI: Tensor | None = None) -> None:
    factors_TI = unpack(bits_SN.index_select(0, slot_T), hidden_TI.dtype)
    hidden_TI.mul_(factors_TI[:, : hidden_TI.shape[1]])


def _mask_channels_cpu(hidden_TI: Tensor, bits_SN: Tensor, slot_T: Tensor, factors_TI: Tensor | None = None) -> None:
    """Saves work by looking at the slots, which on a GPU would cost a synchronization."""
    if factors_TI is not None and len(slot_T) <= len(factors_TI):
        hidden_TI.mul_(factors_TI[: len(slot_T)])
        return
    if not slot_T.any():
        return
    slot_R, run_T = slot_T.unique_consecutive(return_inverse=True)
    if 2 * len(slot_R) > len(slot_T):
        _mask_channels(hidden_TI, bits_SN, slot_T)
    else:  # Prompts: unpacking costs more than copying, so it is done once for each run of tokens under one mask.
        factors_RI = unpack(bits_SN.index_select(0, slot_R), hidden_TI.dtype)[:, : hidden_TI.shape[1]]
        hidden_TI.mul_(factors_RI.index_select(0, run_T))


def unpack(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """Packed rows uint8 [..., N] as factors 0 and 1, [..., 8N]."""
    table = _bytes_to_factors(bits.device, dtype)
    return torch.nn.functional.embedding(bits.int(), table).flatten(-2)


@lru_cache(maxsize=8)
def _bytes_to_factors(device: torch.device, dtype: torch.dtype) -> Tensor:
    """[256, 8]: the eight bits of every byte as factors 0 and 1; one gather unpacks a byte."""
    values = torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device)
    return (values & 1).to(dtype)


_LIBRARY.impl("mask_channels", _mask_channels_cpu, "CPU")
_LIBRARY.impl("mask_channels", _mask_channels, "CUDA")
torch.library.register_fake("persona_pruner::mask_channels", lambda *arguments: None, lib=_LIBRARY)

mask_channels = torch.ops.persona_pruner.mask_channels
