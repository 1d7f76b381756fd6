"""The scores with which learning starts.

Shapes: L layers, I channels.
"""

import torch
from torch import Tensor

from persona_pruner.backbone.forward import BackboneRunner
from persona_pruner.errors import PersonaError
from persona_pruner.learning.batches import MicroBatchConfig, examples_by_prefix
from persona_pruner.learning.encoding import EncodedData
from persona_pruner.learning.training_free import activation_scores, magnitude, rank_normalize


def initial_scores(
    runner: BackboneRunner, encoded: EncodedData, init: str, warm_LI: Tensor | None, settings: MicroBatchConfig
) -> Tensor:
    """Scores [L, I] (float32) for an `init` of the configuration.

    Statistics enter as ranks within their layer, over (0, 1), so that a learning rate means the same for each of them;
    of pooled rows, as the mean of the personas' ranks. `persona:` and `mean:` take `warm_LI`, the trained scores that
    the caller has looked up.
    """
    masks, device = runner.masks, runner.backbone.device
    if init == "zeros":
        return torch.zeros(masks.layers, masks.channels, device=device)
    if init == "activation":
        groups = examples_by_prefix(encoded)
        ranks = [rank_normalize(activation_scores(runner, *group, settings)) for group in groups]
        return torch.stack(ranks).mean(0)
    if init == "magnitude":
        return rank_normalize(magnitude(runner.backbone))
    if warm_LI is None:
        raise PersonaError("no_warm_scores", f"{encoded.persona_id}: learning.init = {init}: no scores were found")
    if warm_LI.shape != (masks.layers, masks.channels):
        raise PersonaError(
            "no_warm_scores",
            f"{encoded.persona_id}: learning.init = {init}: scores of shape {list(warm_LI.shape)}, this backbone needs "
            f"{[masks.layers, masks.channels]}",
        )
    return warm_LI.to(device, torch.float32)
