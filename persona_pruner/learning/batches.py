"""Rows of one step, cut into passes of similar length and dealt to the shards.

Every rank plans for all ranks, so that all run the same sequence of passes and head chunks (their collectives would
hang otherwise), and every rank takes its own rows out of the plan.

Shapes: B rows, T tokens, N answer positions of a pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from persona_pruner.learning.encoding import EncodedRow


@dataclass(frozen=True)
class TrainingExample:
    """One row of a step. `slot` is the number of its mask in the step, `key` names the row across steps."""

    slot: int
    key: tuple[str, int]
    row: EncodedRow
    weight: float
    """What each answer token counts in the loss: 1 / answer tokens of the persona in this step; 0 for a filler."""


@dataclass(frozen=True)
class MicroBatch:
    """Rows that run together on one rank. Positions index the flattened [B * T]."""

    items: tuple[TrainingExample, ...]
    tokens_BT: Tensor
    slot_B: Tensor
    positions_N: Tensor
    targets_N: Tensor
    slot_N: Tensor
    weight_N: Tensor
    chunks: int

    def split(self, values_N: Tensor) -> list[Tensor]:
        """`values_N` for each row of the pass."""
        return list(values_N.split([item.row.answer for item in self.items]))


def plan_micro_batches(
    items: Sequence[TrainingExample],
    prefixes: Sequence[Sequence[int]] | None,
    *,
    rank: int = 0,
    ranks: int = 1,
    pad: int = 0,
    device: torch.device | str = "cpu",
    micro_batch_tokens: int = 16384,
    overhead: int = 16,
    logits_chunk: int = 1024,
) -> list[MicroBatch]:
    """The passes of one rank. `prefixes` (one a slot) are put before the rows where the prefix is not shared."""
    whole = [tuple(prefixes[item.slot]) + item.row.tokens if prefixes else item.row.tokens for item in items]
    order = sorted(range(len(items)), key=lambda i: (-len(whole[i]), items[i].slot, items[i].key, i))
    deals = [order[start : start + ranks] for start in range(0, len(order), ranks)]
    passes = []
    for start, end in _cut([len(whole[deal[0]]) for deal in deals], micro_batch_tokens, overhead):
        dealt = [[deal[r] if r < len(deal) else deal[0] for deal in deals[start:end]] for r in range(ranks)]
        most = max(sum(items[i].row.answer for i in rows) for rows in dealt)
        mine = [
            items[i] if rank < len(deal) else replace(items[i], weight=0.0)
            for i, deal in zip(dealt[rank], deals[start:end], strict=True)
        ]
        tokens = [whole[i] for i in dealt[rank]]
        passes.append(_pass(mine, tokens, -(-most // logits_chunk), pad, device))
    return passes


def _cut(lengths: Sequence[int], limit: int, overhead: int) -> list[tuple[int, int]]:
    """Cut descending lengths into runs [start, end) so that padded tokens plus `overhead` a run are fewest.

    A run holds at most `limit` padded tokens (one row alone may hold more).
    """
    best = [0] + [1 << 60] * len(lengths)
    cut = [0] * (len(lengths) + 1)
    for end in range(1, len(lengths) + 1):
        for start in range(end):
            size = lengths[start] * (end - start)
            if (size <= limit or end - start == 1) and best[start] + size + overhead < best[end]:
                best[end], cut[end] = best[start] + size + overhead, start
    runs = []
    end = len(lengths)
    while end:
        runs.append((cut[end], end))
        end = cut[end]
    return runs[::-1]


def _pass(
    items: Sequence[TrainingExample], tokens: Sequence[Sequence[int]], chunks: int, pad: int, device: torch.device | str
) -> MicroBatch:
    width = max(map(len, tokens))
    positions: list[int] = []
    targets: list[int] = []
    slots: list[int] = []
    weights: list[float] = []
    for number, (item, ids) in enumerate(zip(items, tokens, strict=True)):
        first = len(ids) - item.row.answer
        positions += range(number * width + first - 1, number * width + len(ids) - 1)
        targets += ids[first:]
        slots += [item.slot] * item.row.answer
        weights += [item.weight] * item.row.answer
    return MicroBatch(
        tuple(items),
        torch.tensor([[*ids, *[pad] * (width - len(ids))] for ids in tokens], device=device),
        torch.tensor([item.slot for item in items], device=device),
        torch.tensor(positions, device=device),
        torch.tensor(targets, device=device),
        torch.tensor(slots, device=device),
        torch.tensor(weights, device=device),
        chunks,
    )
