"""Sampling from the backbone with a cache of keys and values, every row by its own random numbers and under its own
mask.

`PaddedDecoder` runs fixed batches of whole prompts. It serves every architecture, among them those whose cache holds
more than keys and values; `SlotDecoder` (continuous.py) is faster where it is exact.

Shape suffixes: B rows, T tokens, V vocabulary, M masks, L layers, I FFN channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from transformers import DynamicCache

from persona_pruner.backbone.forward import BackboneRunner


@dataclass(frozen=True)
class Sampling:
    temperature: float
    """0 is greedy."""
    top_p: float
    """Only the most probable tokens that together have this probability; 1 is all."""
    end: int
    """The token that ends an answer."""
    batch_size: int


@dataclass(frozen=True, eq=False)
class Prompt:
    """prefix + suffix is the prompt; `draws_T` are uniform numbers (float64) that decide the answer's tokens."""

    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    draws_T: Tensor
    mask: int = 0
    """Number of the decoder's mask that it is answered under."""


@dataclass(frozen=True)
class Sampled:
    """Token ids without the end token. `finished` is False where the limit came first."""

    tokens: list[int]
    finished: bool


class Decoder(Protocol):
    def decode(self, prompts: Sequence[Prompt]) -> list[Sampled]:
        """Continue this rank's prompts. Every rank of a world calls it at the same time."""


def choose(logits_BV: Tensor, draw_B: Tensor, sampling: Sampling) -> Tensor:
    """Token ids [B] by inverting each row's cumulative distribution at its uniform number."""
    if sampling.temperature == 0:
        return logits_BV.argmax(-1)
    probs_BV = torch.softmax(logits_BV.double() / sampling.temperature, -1)
    if sampling.top_p < 1:
        sorted_BV, order_BV = probs_BV.sort(dim=-1, descending=True, stable=True)
        beyond_BV = sorted_BV.cumsum(-1) - sorted_BV >= sampling.top_p
        probs_BV = probs_BV.masked_fill(torch.zeros_like(beyond_BV).scatter(-1, order_BV, beyond_BV), 0)
    below_BV = probs_BV.cumsum(-1)
    total_B = below_BV[:, -1]
    target_B = torch.minimum(draw_B * total_B, torch.nextafter(total_B, torch.zeros_like(total_B)))
    return torch.searchsorted(below_BV, target_B[:, None], right=True)[:, 0]


class PaddedDecoder:
    """Fixed batches of whole left-padded prompts, each until its last row has ended."""

    def __init__(self, runner: BackboneRunner, sampling: Sampling, masks_MLI: Tensor | None = None) -> None:
        """masks_MLI: bool or floating [M, L, I]; without them the runner's own."""
        self._runner, self._sampling, self._masks_MLI = runner, sampling, masks_MLI
        self._backbone = runner.backbone

    @torch.no_grad()
    def decode(self, prompts: Sequence[Prompt]) -> list[Sampled]:
        size = self._sampling.batch_size
        backbone = self._backbone
        batches = -(-max(backbone.gather(len(prompts))) // size)
        order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i].prefix) + len(prompts[i].suffix), i))
        sampled: dict[int, Sampled] = {}
        steps = max(backbone.gather(max((len(p.draws_T) for p in prompts), default=0)))
        for number in range(batches):
            rows = order[number * size : (number + 1) * size]
            outcome = self._batch([prompts[i] for i in rows], steps)
            sampled |= dict(zip(rows, outcome, strict=True))
        return [sampled[i] for i in range(len(prompts))]

    def _batch(self, prompts: Sequence[Prompt], steps: int) -> list[Sampled]:
        """One batch; without prompts a row that takes part in the passes of the other ranks."""
        device, sampling = self._backbone.device, self._sampling
        rows = [[*p.prefix, *p.suffix] for p in prompts] or [[self._runner.pad]]
        width = max(map(len, rows))
        pads_B = torch.tensor([width - len(row) for row in rows], device=device)
        tokens_BT = torch.tensor([[self._runner.pad] * (width - len(row)) + row for row in rows], device=device)
        seen_BT = (torch.arange(width, device=device) >= pads_B[:, None]).long()
        positions_BT = (torch.arange(width, device=device) - pads_B[:, None]).clamp(0)
        draws_BT = torch.stack([p.draws_T for p in prompts]) if prompts else torch.zeros(1, steps).double()
        draws_BT = draws_BT.to(device)
        if self._masks_MLI is not None:
            self._runner.masks.set(masks_of_rows(self._masks_MLI, [p.mask for p in prompts] or [0]))
        cache = empty_cache(self._runner)
        active_B = torch.full((len(rows),), bool(prompts), device=device)
        chosen: list[Tensor] = []
        for step in range(steps):
            call = partial(
                self._runner.model, tokens_BT, attention_mask=seen_BT, position_ids=positions_BT,
                past_key_values=cache, use_cache=True, logits_to_keep=1,
            )  # fmt: skip
            logits_BV = self._backbone.enter(call).logits[:, -1]
            chosen.append(choose(logits_BV, draws_BT[:, step], sampling).where(active_B, sampling.end))
            active_B = active_B & (chosen[-1] != sampling.end)
            if not self._backbone.all_reduce(active_B.sum()):
                break
            tokens_BT, positions_BT = chosen[-1][:, None], positions_BT[:, -1:] + 1
            seen_BT = torch.cat([seen_BT, seen_BT.new_ones(len(rows), 1)], 1)
        return [cut_at_end(ids, sampling.end) for ids in torch.stack(chosen, 1).tolist()[: len(prompts)]]


def masks_of_rows(masks_MLI: Tensor, numbers: Sequence[int]) -> Tensor:
    """Masks [B, L, I] of rows, or [L, I] where they share one."""
    return masks_MLI[numbers[0]] if len(set(numbers)) == 1 else masks_MLI[list(numbers)]


def empty_cache(runner: BackboneRunner) -> DynamicCache:
    """The cache that the model's own generation uses: what each layer keeps depends on the architecture."""
    return DynamicCache(config=runner.model.config)


def cut_at_end(tokens: list[int], end: int) -> Sampled:
    finished = end in tokens
    return Sampled(tokens[: tokens.index(end)] if finished else tokens, finished)
