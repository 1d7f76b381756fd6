"""Held-out likelihood of text under masks: over all answer tokens, and over those that the description decides."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from persona_pruner.backbone.forward import BackboneRunner
from persona_pruner.backbone.load import Backbone
from persona_pruner.backbone.prompts import persona_prefix
from persona_pruner.config.schema import RunConfig
from persona_pruner.dataset import Row
from persona_pruner.errors import PersonaError
from persona_pruner.learning.batches import MicroBatchConfig
from persona_pruner.learning.encoding import encode_rows
from persona_pruner.learning.objective import heldout_cross_entropy
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
