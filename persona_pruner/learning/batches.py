"""The examples of one step, cut into micro-batches of similar length and dealt to the ranks of a shard group.

Every rank plans for all ranks, so that all run the same sequence of micro-batches and head chunks (their collectives
would hang otherwise), and every rank takes its own rows out of the plan.

Shapes: B rows, T tokens, N answer positions of a micro-batch, D model width.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from persona_pruner.backbone.forward import BackboneRunner, PrefixCache
from persona_pruner.config.schema import ObjectiveConfig, RunConfig
from persona_pruner.learning.encoding import EncodedData, EncodedRow


@dataclass(frozen=True)
class MicroBatchConfig:
    """How a step is cut into micro-batches, and the objective that they are run for."""

    objective: ObjectiveConfig
    micro_batch_tokens: int = 16384
    overhead: int = 16
    """What starting another micro-batch costs, in tokens."""

    @classmethod
    def of(cls, config: RunConfig, device: torch.device) -> "MicroBatchConfig":
        overhead = 1024 if device.type == "cuda" else 16
        return cls(config.learning.objective, config.learning.micro_batch_tokens, overhead)


@dataclass(frozen=True)
class TrainingExample:
    """One row of a step. `slot` is the number of its mask and prefix in the step; `key` names the row across steps."""

    slot: int
    key: tuple[str, int]
    row: EncodedRow
    weight: float
    """Weight of each answer token in the loss: 1 / answer tokens of the persona in this step; 0 for a filler."""
    token_weights: tuple[float, ...] | None = None
    """Factors of `weight`, one for each answer token, where tokens do not weigh alike."""


@dataclass(frozen=True)
class MicroBatch:
    """Rows that run together on one rank. Positions index the flattened [B * T]."""

    examples: tuple[TrainingExample, ...]
    tokens_BT: Tensor
    slot_B: Tensor
    positions_N: Tensor
    targets_N: Tensor
    slot_N: Tensor
    weight_N: Tensor
    chunks: int

    def with_unit_weights(self) -> "MicroBatch":
        """The same rows with weight 1 for every token; fillers keep 0."""
        return replace(self, weight_N=(self.weight_N > 0).float())

    def split(self, values_N: Tensor) -> list[Tensor]:
        """`values_N` by row of the micro-batch."""
        return list(values_N.split([example.row.answer for example in self.examples]))


def examples_by_prefix(
    encoded: EncodedData, numbers: Collection[int] | None = None
) -> list[tuple[tuple[int, ...], list[TrainingExample]]]:
    """Training rows (all, or those numbers) in slot 0, by the prefix they stand behind; every answer token has the same
    weight."""
    tokens = sum(row.answer for row in encoded.train)
    groups: dict[int, list[TrainingExample]] = {}
    for number in range(len(encoded.train)) if numbers is None else sorted(numbers):
        row = encoded.train[number]
        example = TrainingExample(0, (encoded.persona_id, number), row, 1 / tokens)
        groups.setdefault(row.prefix, []).append(example)
    return [(encoded.prefixes[number], examples) for number, examples in sorted(groups.items())]


def plan(
    runner: BackboneRunner,
    examples: Sequence[TrainingExample],
    prefixes: Sequence[Sequence[int]],
    settings: MicroBatchConfig,
) -> tuple[list[MicroBatch], bool]:  # fmt: skip
    """The micro-batches of this rank, and whether their rows stand behind a shared prefix."""
    world = runner.backbone.world
    shared = runner.can_share(prefixes, max(len(example.row.tokens) for example in examples))
    if runner.length_dependent and not shared:
        settings = replace(settings, micro_batch_tokens=1)
    micro_batches = plan_micro_batches(
        examples,
        None if shared else prefixes,
        settings,
        rank=world.rank,
        ranks=world.size,
        pad=runner.pad,
    )
    return [_to(micro_batch, runner.backbone.device) for micro_batch in micro_batches], shared


def behind_prefix(
    runner: BackboneRunner,
    prefix: Sequence[int],
    examples: Sequence[TrainingExample],
    settings: MicroBatchConfig,
    mask_LI: Tensor | None = None,
) -> Iterator[tuple[MicroBatch, PrefixCache | None]]:
    """This rank's micro-batches of examples that stand behind one prefix, which has run by then, under one mask."""
    micro_batches, shared = plan(runner, examples, [prefix], settings)
    runner.masks.set(mask_LI)
    prefix_cache = runner.prefix([prefix]) if shared else None
    for micro_batch in micro_batches:
        yield micro_batch, prefix_cache
    runner.masks.set(None)


def answer_states(runner: BackboneRunner, micro_batch: MicroBatch, prefix_cache: PrefixCache | None) -> Tensor:
    """Final hidden states [N, D] at the answer positions."""
    hidden = runner.hidden(micro_batch.tokens_BT, prefix_cache, micro_batch.slot_B)
    return hidden.flatten(0, 1).index_select(0, micro_batch.positions_N)


def plan_micro_batches(
    examples: Sequence[TrainingExample],
    prefixes: Sequence[Sequence[int]] | None,
    settings: MicroBatchConfig,
    *,
    rank: int = 0,
    ranks: int = 1,
    pad: int = 0,
) -> list[MicroBatch]:
    """The micro-batches of one rank. `prefixes` (one per slot) are put before the rows where no prefix is shared."""
    tokens = [(*prefixes[e.slot], *e.row.tokens) if prefixes else e.row.tokens for e in examples]
    by_length = sorted(range(len(examples)), key=lambda i: (-len(tokens[i]), examples[i].slot, examples[i].key, i))
    deals = [by_length[start : start + ranks] for start in range(0, len(by_length), ranks)]
    micro_batches = []
    for start, end in _cut([len(tokens[deal[0]]) for deal in deals], settings.micro_batch_tokens, settings.overhead):
        dealt = [[deal[r] if r < len(deal) else deal[0] for deal in deals[start:end]] for r in range(ranks)]
        most_answers = max(sum(examples[i].row.answer for i in rows) for rows in dealt)
        own = [
            examples[i] if rank < len(deal) else replace(examples[i], weight=0.0)
            for i, deal in zip(dealt[rank], deals[start:end], strict=True)
        ]
        chunks = -(-most_answers // settings.objective.logits_chunk)
        micro_batches.append(_micro_batch(own, [tokens[i] for i in dealt[rank]], chunks, pad))
    return micro_batches


def _cut(lengths: Sequence[int], limit: int, overhead: int) -> list[tuple[int, int]]:
    """Cut descending lengths into runs [start, end) so that padded tokens plus `overhead` per run are fewest.

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


def _micro_batch(
    examples: Sequence[TrainingExample], tokens: Sequence[Sequence[int]], chunks: int, pad: int
) -> MicroBatch:
    width = max(map(len, tokens))
    positions: list[int] = []
    targets: list[int] = []
    slots: list[int] = []
    weights: list[float] = []
    for number, (example, ids) in enumerate(zip(examples, tokens, strict=True)):
        first = len(ids) - example.row.answer
        positions += range(number * width + first - 1, number * width + len(ids) - 1)
        targets += ids[first:]
        slots += [example.slot] * example.row.answer
        weights += [example.weight * factor for factor in example.token_weights or [1.0] * example.row.answer]
    return MicroBatch(
        tuple(examples),
        torch.tensor([[*ids, *[pad] * (width - len(ids))] for ids in tokens]),
        torch.tensor([example.slot for example in examples]),
        torch.tensor(positions),
        torch.tensor(targets),
        torch.tensor(slots),
        torch.tensor(weights),
        chunks,
    )


def _to(micro_batch: MicroBatch, device: torch.device) -> MicroBatch:
    return replace(
        micro_batch,
        tokens_BT=micro_batch.tokens_BT.to(device),
        slot_B=micro_batch.slot_B.to(device),
        positions_N=micro_batch.positions_N.to(device),
        targets_N=micro_batch.targets_N.to(device),
        slot_N=micro_batch.slot_N.to(device),
        weight_N=micro_batch.weight_N.to(device),
    )
