"""Held-out likelihood of text under masks: over all answer tokens, over those that the description decides, and what
the unpruned backbone makes of single answers.

Shape suffixes: R rows, D model width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from persona_pruner.backbone.forward import BackboneRunner
from persona_pruner.backbone.load import Backbone
from persona_pruner.backbone.prompts import persona_prefix
from persona_pruner.config.schema import RunConfig
from persona_pruner.dataset import Row
from persona_pruner.errors import PersonaError
from persona_pruner.learning.batches import MicroBatchConfig, TrainingExample, plan
from persona_pruner.learning.encoding import encode_rows
from persona_pruner.learning.objective import answer_states, heldout_cross_entropy, lm_head_loss_and_grad
from persona_pruner.learning.persona_tokens import decided_tokens, description_effect, nobody_prefix, token_losses


def heldout_loss(
    backbone: Backbone, config: RunConfig, description: str, rows: Sequence[Row], mask_LI: Tensor | None
) -> float:
    """Cross-entropy of the answers, nats per token, under the persona's prompt; unpruned where the mask is None.

    `mask_LI` bool or floating [L, I]. Every rank of a shard group calls this with the same arguments and gets the
    same value. Raises PersonaError (empty, row_too_long).
    """
    if not rows:
        raise PersonaError("empty", "no rows to measure a loss on")

    prefix = persona_prefix(backbone.tokenizer, config.prompt, description)
    encoded = encode_rows(backbone.tokenizer, config.prompt, description, rows, config.learning.max_row_tokens)
    with BackboneRunner(backbone) as runner:
        settings = MicroBatchConfig.of(config, backbone.device)
        return heldout_cross_entropy(runner, prefix, encoded, mask_LI, settings)


def heldout_losses(
    backbone: Backbone,
    config: RunConfig,
    description: str,
    rows: Sequence[Row],
    masks: Mapping[str, Tensor | None],
) -> tuple[dict[str, float], dict[str, float]]:
    """`heldout_loss` under each of `masks` by name, and the same over the tenth of the tokens whose log-probability the
    description changes most under the unpruned backbone.

    Raises PersonaError (row_too_long).
    """
    prefix = persona_prefix(backbone.tokenizer, config.prompt, description)
    encoded = encode_rows(backbone.tokenizer, config.prompt, description, rows, config.learning.max_row_tokens)
    settings = MicroBatchConfig.of(config, backbone.device)
    with BackboneRunner(backbone) as runner:
        nobody = nobody_prefix(backbone, config.prompt)
        decided_N = torch.cat(decided_tokens(description_effect(runner, prefix, nobody, encoded, settings)))
        by_name = {
            name: torch.cat(token_losses(runner, prefix, encoded, mask_LI, settings)) for name, mask_LI in masks.items()
        }
    every = {name: loss_N.mean().item() for name, loss_N in by_name.items()}
    return every, {name: loss_N[decided_N].mean().item() for name, loss_N in by_name.items()}


@dataclass(frozen=True)
class RowReadings:
    losses_R: Tensor
    """Cross-entropy of each row's answer, nats per token (float64)."""
    states_RD: Tensor
    """Mean final hidden state over the answer's tokens (float32)."""


@torch.no_grad()
def read_rows(backbone: Backbone, config: RunConfig, description: str, rows: Sequence[Row]) -> RowReadings:
    """What the unpruned backbone makes of answers, each by itself, under the prompt of `description`.

    Every rank of a shard group calls this and gets the same. Raises PersonaError (row_too_long).
    """
    prefix = persona_prefix(backbone.tokenizer, config.prompt, description)
    encoded = encode_rows(backbone.tokenizer, config.prompt, description, rows, config.learning.max_row_tokens)
    examples = [TrainingExample(0, ("", number), row, 1 / row.answer) for number, row in enumerate(encoded)]
    settings = MicroBatchConfig.of(config, backbone.device)
    read: dict[int, tuple[Tensor, Tensor]] = {}
    with BackboneRunner(backbone) as runner:
        runner.masks.set(None)
        micro_batches, shared = plan(runner, examples, [prefix], settings)
        cache = runner.prefix([prefix]) if shared else None
        for micro_batch in micro_batches:
            states_ND = answer_states(runner, micro_batch, cache)
            head = lm_head_loss_and_grad(runner, states_ND, micro_batch, settings.objective, gradient=False)
            by_row = zip(micro_batch.split(head.cross_entropy_N), micro_batch.split(states_ND), strict=True)
            for example, (loss_T, state_TD) in zip(micro_batch.examples, by_row, strict=True):
                read[example.key[1]] = (loss_T.double().mean().cpu(), state_TD.float().mean(0).cpu())
    for of_rank in backbone.gather(read):
        read |= of_rank
    losses, states = zip(*(read[number] for number in range(len(rows))), strict=True)
    return RowReadings(torch.stack(losses), torch.stack(states))
