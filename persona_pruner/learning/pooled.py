"""One mask for many personas: learned from all their rows by the trainer's own loop.

It is what a platform would use that does not want one mask each, so the comparison has it as a baseline.
"""

from collections.abc import Sequence

from persona_pruner.backbone.load import Backbone
from persona_pruner.config.schema import HalvingConfig, RunConfig, StoppersConfig
from persona_pruner.dataset import PersonaData
from persona_pruner.learning.callbacks import TrainingCallbacks
from persona_pruner.learning.encoding import PooledData
from persona_pruner.learning.outcome import TrainingResult
from persona_pruner.learning.trainer import MaskTrainer

GLOBAL = "global"
"""In place of a persona id."""


def pooled_config(config: RunConfig, ratio: float) -> RunConfig:
    """The settings of one persona at a fixed ratio, starting from activations."""
    fixed = {"ratio": ratio, "init": "activation", "halving": HalvingConfig(), "stoppers": StoppersConfig()}
    learning = config.learning.model_copy(update=fixed)
    return config.model_copy(update={"learning": learning})


def train_pooled(
    backbone: Backbone,
    config: RunConfig,
    data: Sequence[PersonaData],
    run_id: str,
    callbacks: TrainingCallbacks | None = None,
) -> TrainingResult:
    """The result of one mask learned from all rows of `data`. Every rank of a group calls it."""
    pooled = PooledData(GLOBAL, tuple(data))
    (result,) = MaskTrainer(backbone, config).train([pooled], run_id=run_id, callbacks=callbacks)
    return result
