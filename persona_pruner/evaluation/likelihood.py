"""Held-out likelihood of text under a mask."""

from collections.abc import Sequence

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
