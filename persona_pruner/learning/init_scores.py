"""The scores with which learning starts.

Shapes: L layers, I channels.
"""

import torch
from torch import Tensor

from persona_pruner.backbone.forward import BackboneRunner
from persona_pruner.errors import PersonaError
from persona_pruner.learning.encoding import Encoded
from persona_pruner.learning.objective import MicroBatchConfig
from persona_pruner.learning.training_free import activation_scores, magnitude, rank_normalize


def initial_scores(
    runner: BackboneRunner, encoded: Encoded, init: str, warm_LI: Tensor | None, settings: MicroBatchConfig
) -> Tensor:
    """Scores [L, I] (float32) for an `init` of the configuration.

    Statistics enter as ranks within their layer, over (0, 1), so that a learning rate means the same for each of them.
    `persona:` and `mean:` take `warm_LI`, the trained scores that somebody has looked up.
    """
    masks, device = runner.masks, runner.backbone.device
    if init == "zeros":
        return torch.zeros(masks.layers, masks.channels, device=device)
    if init == "activation":
        return rank_normalize(activation_scores(runner, encoded, settings))
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
