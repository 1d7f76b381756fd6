"""Held-out likelihood of text under a mask."""

from collections.abc import Sequence

from torch import Tensor

from persona_pruner.backbone.forward import BackboneRunner
from persona_pruner.backbone.load import Backbone
from persona_pruner.backbone.prompts import persona_prefix
from persona_pruner.config.schema import RunConfig
from persona_pruner.dataset import Row
from persona_pruner.errors import PersonaError
from persona_pruner.learning.batches import TrainingExample
from persona_pruner.learning.encoding import encode_rows
from persona_pruner.learning.objective import MicroBatchConfig, mask_losses


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
    tokens = sum(row.answer for row in encoded)
    items = [TrainingExample(0, ("", number), row, 1 / tokens) for number, row in enumerate(encoded)]
    with BackboneRunner(backbone) as runner:
        masks = None if mask_LI is None else mask_LI.to(backbone.device).float()[None]
        losses = mask_losses(runner, masks, [prefix], items, MicroBatchConfig(config.learning.objective))
    return backbone.all_reduce(losses.cross_entropy).item()
