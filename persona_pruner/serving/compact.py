"""FFN weights gathered to the channels that the personas of the moment keep: smaller matrices for the whole batch.

A step whose requests all belong to one gathered set runs its FFNs on the union of their channels, each row under its
own mask inside it. For a single persona the union is its mask, and nothing is left to mask. Masks that share a core
(`learning.core`) have small unions; independent ones do not, and sets wider than WORTH_IT are not gathered.
Python decides per step, so the engine must run eagerly, with whole layers on one rank.

Shapes: T tokens, L layers, I channels, U channels of a union (padded), M personas of a set and row 0, N bytes.
"""

import functools
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from persona_pruner.errors import BackboneError
from persona_pruner.serving.channel_op import mask_channels
from persona_pruner.serving.mask_table import MaskTable, RequestMask

PATIENCE = 8
"""Steps that the same personas run together before their weights are gathered, which costs some steps' time."""
WORTH_IT = 0.9
"""Share of the channels above which a union is not worth its memory."""
_MULTIPLE = 32
"""Channels of a union are padded to this with zeros: what the fast matrix products of CPUs and GPUs want."""


@dataclass(frozen=True)
class _Layer:
    gate_up: Any
    """[T, D] -> [T, 2U]"""
    down: Any
    """[T, U] -> [T, D]"""
    bits_MN: Tensor


@dataclass(frozen=True)
class _Gathered:
    members: dict[str, int]
    """Row of each mask's digest in `bits_MN`, from 1: to the operator row 0 keeps every channel."""
    layers: list[_Layer]
    width: int
    bytes: int


class CompactFfns:
    """Takes the place of every FFN's forward. `choose` is called before each step."""

    def __init__(self, model: nn.Module, table: MaskTable, capacity: int) -> None:
        """`capacity`: gathered sets that are kept. Raises BackboneError for FFNs that are not gate, up and down."""
        self._table, self._capacity = table, capacity
        self._ffns = _gated_ffns(model)
        if len(self._ffns) != len(table.layers):
            raise BackboneError(f"{type(model).__name__}: compact weights need FFNs of gate_up_proj and down_proj")
        self._sets: OrderedDict[frozenset[str], _Gathered] = OrderedDict()
        self._active: _Gathered | None = None
        self._member_T = torch.zeros_like(table.slot_T)
        self._waiting: tuple[frozenset[str], int] = (frozenset(), 0)
        self._too_wide: frozenset[str] = frozenset()
        self.gathers, self.gather_seconds, self.steps = 0, 0.0, 0
        for number, ffn in enumerate(self._ffns):
            ffn.forward = functools.partial(self._forward, number, ffn, ffn.forward)

    def choose(self, masks: Sequence[RequestMask | None], starts: np.ndarray) -> None:
        """Decide what the step runs on. masks, starts: as `MaskTable.assign`."""
        wanted = frozenset(mask.digest for mask in masks if mask)
        self._active = None
        if not wanted or None in masks:
            return
        fitting = [compact_set for compact_set in self._sets.values() if wanted <= compact_set.members.keys()]
        compact_set = min(fitting, key=lambda one: one.width) if fitting else self._gather_in_time(wanted, masks)
        if compact_set is None:
            return
        self._active = compact_set
        self._sets.move_to_end(frozenset(compact_set.members))
        self.steps += 1
        members = np.repeat([compact_set.members[mask.digest] for mask in masks if mask], np.diff(starts))
        self._member_T[: len(members)].copy_(torch.from_numpy(members.astype(np.int32)))

    def stats(self) -> dict[str, float]:
        return {
            "compact_sets": len(self._sets),
            "compact_bytes": sum(compact_set.bytes for compact_set in self._sets.values()),
            "compact_gathers": self.gathers,
            "compact_gather_seconds": self.gather_seconds,
            "compact_steps": self.steps,
        }

    def _forward(self, number: int, ffn: Any, whole_ffn: Any, hidden_TD: Tensor) -> Tensor:
        compact_set = self._active
        if compact_set is None:
            return whole_ffn(hidden_TD)
        layer = compact_set.layers[number]
        hidden_TU = ffn.act_fn(layer.gate_up(hidden_TD))
        if len(compact_set.members) > 1:
            mask_channels(hidden_TU, layer.bits_MN, self._member_T[: len(hidden_TU)])
        return layer.down(hidden_TU)

    def _gather_in_time(self, wanted: frozenset[str], masks: Sequence[RequestMask | None]) -> _Gathered | None:
        """The set of these personas, once they have run together for a while and where it is worth it."""
        if wanted == self._too_wide:
            return None
        seen = self._waiting[1] + 1 if self._waiting[0] == wanted else 1
        self._waiting = (wanted, seen)
        if seen < PATIENCE:
            return None
        distinct = list({mask.digest: mask for mask in masks if mask}.values())
        keep_MLI = np.stack([mask.keep(self._table.total_layers, self._table.channels) for mask in distinct])
        keep_MLI = keep_MLI[:, self._table.layers]
        if keep_MLI.any(0).mean() > WORTH_IT:
            self._too_wide = wanted
            return None
        while len(self._sets) >= self._capacity:
            self._sets.popitem(last=False)
        start = time.perf_counter()
        compact_set = self._sets[wanted] = self._gather([mask.digest for mask in distinct], keep_MLI)
        self.gathers += 1
        self.gather_seconds += time.perf_counter() - start
        return compact_set

    def _gather(self, digests: list[str], keep_MLI: np.ndarray) -> _Gathered:
        layers, width, size = [], 0, 0
        for number, ffn in enumerate(self._ffns):
            union = np.flatnonzero(keep_MLI[:, number].any(0))
            gate_up, down = _gathered_weights(ffn, torch.from_numpy(union))
            bits_MN = np.packbits(keep_MLI[:, number][:, union], axis=1, bitorder="little")
            bits_MN = np.pad(bits_MN, ((1, 0), (0, down.shape[1] // 8 - bits_MN.shape[1])), constant_values=255)
            table = torch.from_numpy(bits_MN).to(down.device)
            layers.append(_Layer(_linear(gate_up), _linear(down), table))
            width += len(union)
            size += (gate_up.numel() + down.numel()) * down.element_size()
        return _Gathered({digest: row for row, digest in enumerate(digests, 1)}, layers, width, size)


def keep_weights(model: nn.Module) -> None:
    """Hold on to the FFNs' weights as they were loaded: a CPU engine packs them into a form that cannot be gathered."""
    for ffn in _gated_ffns(model):
        for linear in (ffn.gate_up_proj, ffn.down_proj):
            if getattr(linear, "bias", None) is not None:
                raise BackboneError(f"{type(model).__name__}: compact weights need FFNs without bias")
            linear.loaded_weight = linear.weight.data


def _gated_ffns(model: nn.Module) -> list[Any]:
    wanted = ("gate_up_proj", "act_fn", "down_proj")
    return [module for module in model.modules() if all(hasattr(module, name) for name in wanted)]


def _gathered_weights(ffn: Any, union_U: Tensor) -> tuple[Tensor, Tensor]:
    """gate and up [2U, D], down [D, U], padded with zeros."""
    gate_up, down = ffn.gate_up_proj.loaded_weight, ffn.down_proj.loaded_weight
    padding = -len(union_U) % _MULTIPLE
    parts = [nn.functional.pad(half[union_U.to(half.device)], (0, 0, 0, padding)) for half in gate_up.chunk(2)]
    return torch.cat(parts), nn.functional.pad(down[:, union_U.to(down.device)], (0, padding)).contiguous()


def _linear(weight: Tensor) -> Any:
    """x -> x weight^T by the same kernels that the engine uses for its own layers."""
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm, dispatch_unquantized_gemm

    layer = nn.Module()
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if weight.device.type == "cpu":
        dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
    multiply = dispatch_unquantized_gemm()
    return lambda hidden: multiply(layer, hidden, layer.weight, None)
