"""Which answer tokens the persona's description decides, as the unpruned model tells it.

Most tokens of an answer say nothing about who speaks. What the description changes about a token's log-probability
does: the tenth that it changes most is what losses are also reported over, and the objective can weigh tokens by it.

Shapes: L layers, I channels, N answer tokens of a row.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from persona_pruner.backbone.forward import BackboneRunner
from persona_pruner.backbone.load import Backbone
from persona_pruner.backbone.prompts import persona_prefix
from persona_pruner.config.schema import LearningConfig, PromptConfig, RunConfig
from persona_pruner.dataset import PersonaData, Row, read_generic_rows
from persona_pruner.learning.batches import MicroBatchConfig, TrainingExample, answer_states, behind_prefix
from persona_pruner.learning.encoding import EncodedData, EncodedRow, PooledData, encode, seeded
from persona_pruner.learning.objective import lm_head_loss_and_grad

NOBODY = "A helpful assistant."
"""The description that stands for having none: a prompt of the same form."""
DECIDED = 0.1
"""Share of the tokens that count as decided by the description."""

GENERIC_ROWS = 256
"""Rows of generic text that are used, evenly spread over what there is."""


def nobody_prefix(backbone: Backbone, prompt: PromptConfig) -> tuple[int, ...]:
    return tuple(persona_prefix(backbone.tokenizer, prompt, NOBODY))


def generic_data(backbone: Backbone, config: RunConfig) -> EncodedData:
    """Text without a persona behind nobody's prompt. Raises ConfigError, PersonaError (row_too_long)."""
    every = read_generic_rows(config.learning.objective.generic_rows)
    rows = every[:: max(len(every) // GENERIC_ROWS, 1)][:GENERIC_ROWS]
    digest = hashlib.sha256(repr(rows).encode()).hexdigest()
    data = PersonaData("", NOBODY, rows, (), digest)
    return encode(backbone.tokenizer, config.prompt, data, config.learning.max_row_tokens)


def with_foreign_rows(
    data: PersonaData | PooledData, rows: Sequence[Row], learning: LearningConfig
) -> PersonaData | PooledData:
    """The same personas, each with rows that it did not write behind its own, `objective.foreign` of all.

    None of them is longer than the longest of its own. Fewer where `rows` has not so many; identity stays the same.
    """
    if isinstance(data, PooledData):
        return replace(data, personas=tuple(_with_foreign_rows(each, rows, learning) for each in data.personas))
    return _with_foreign_rows(data, rows, learning)


def _with_foreign_rows(data: PersonaData, rows: Sequence[Row], learning: LearningConfig) -> PersonaData:
    longest = max((_length(row) for row in data.train), default=0)
    usable = [row for row in rows if _length(row) <= longest]
    share = learning.objective.foreign
    wanted = round(share / (1 - share) * len(data.train))
    order = torch.randperm(len(usable), generator=seeded("foreign", learning.seed, data.persona_id))
    return replace(data, train=(*data.train, *(usable[number] for number in order[:wanted].tolist())))


def _length(row: Row) -> int:
    return len(row.question) + len(row.answer)


@torch.no_grad()
def token_losses(
    runner: BackboneRunner,
    prefix: Sequence[int],
    rows: Sequence[EncodedRow],
    mask_LI: Tensor | None,
    settings: MicroBatchConfig,
) -> list[Tensor]:
    """Cross-entropy of every answer token behind `prefix` (nats, float32 [N] per row), the same on every rank.

    `mask_LI` bool or floating, unpruned where it is None.
    """
    examples = [TrainingExample(0, ("", number), row, 1.0) for number, row in enumerate(rows)]
    if mask_LI is not None:
        mask_LI = mask_LI.to(runner.backbone.device).float()
    losses = [torch.zeros(row.answer, device=runner.backbone.device) for row in rows]
    for micro_batch, prefix_cache in behind_prefix(runner, prefix, examples, settings, mask_LI):
        answers_ND = answer_states(runner, micro_batch, prefix_cache)
        head = lm_head_loss_and_grad(runner, answers_ND, micro_batch, settings.objective, gradient=False)
        for example, loss_N in zip(micro_batch.examples, micro_batch.split(head.cross_entropy_N), strict=True):
            if example.weight > 0:
                losses[example.key[1]] = loss_N
    return list(runner.backbone.all_reduce(torch.cat(losses)).split([row.answer for row in rows]))


def description_effect(
    runner: BackboneRunner,
    prefix: Sequence[int],
    nobody: Sequence[int],
    rows: Sequence[EncodedRow],
    settings: MicroBatchConfig,
) -> list[Tensor]:
    """|log p(token | description) - log p(token | nobody's)| under the unpruned model, float32 [N] per row."""
    told, untold = (token_losses(runner, start, rows, None, settings) for start in (prefix, nobody))
    return [(with_N - without_N).abs() for with_N, without_N in zip(told, untold, strict=True)]


def decided_tokens(effect: Sequence[Tensor]) -> list[Tensor]:
    """Bool [N] per row: the tokens of all rows together that the description changes most, at least one."""
    every = torch.cat(list(effect))
    least = every.topk(max(round(DECIDED * len(every)), 1)).values[-1]
    return [row_N >= least for row_N in effect]


def token_weights(
    runner: BackboneRunner,
    encoded: EncodedData,
    nobody: Sequence[int],
    strength: float,
    settings: MicroBatchConfig,
) -> list[tuple[float, ...]]:
    """A weight for every answer token of the training rows, of mean 1: 1 + strength * effect / mean effect, scaled."""
    weights: list[tuple[float, ...]] = [()] * len(encoded.train)
    for number, prefix in enumerate(encoded.prefixes):
        own = [index for index, row in enumerate(encoded.train) if row.prefix == number]
        effect = description_effect(runner, prefix, nobody, [encoded.train[index] for index in own], settings)
        mean = torch.cat(effect).mean().clamp_min(1e-12)
        for index, effect_N in zip(own, effect, strict=True):
            weights[index] = tuple(((1 + strength * effect_N / mean) / (1 + strength)).tolist())
    return weights
