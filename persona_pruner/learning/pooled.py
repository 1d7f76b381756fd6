"""One mask for many personas: learned from all their rows by the trainer's own loop.

It is where personas start (`learning.init: pooled`), where `learning.core` and `learning.budget: profile` are taken
from, and what a platform would use that does not want one mask each: the comparison's global baseline.
"""

import hashlib
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


def pooled_sample(persona_ids: Sequence[str], count: int) -> list[str]:
    """Whose rows are pooled: drawn by the hash of their ids, in that order."""
    return sorted(persona_ids, key=lambda persona_id: hashlib.sha256(persona_id.encode()).hexdigest())[:count]


def pooled_config(config: RunConfig) -> RunConfig:
    """The settings with which the pooled mask is learned that a run's personas start from."""
    learning = config.learning
    return _fixed(config, init=learning.pooled_init, steps=learning.pooled_steps, passes=None, keep_scores=True)


def global_config(config: RunConfig, ratio: float) -> RunConfig:
    """The settings of the comparison's one mask for all: the start and the steps of a persona's own mask."""
    init = "pooled" if config.learning.needs_pooled_mask else "activation"
    method = config.learning.method if config.learning.is_learned else "ste"
    return _fixed(config, init=init, ratio=ratio, method=method)


def _fixed(config: RunConfig, **changes: object) -> RunConfig:
    """Nothing that depends on held-out losses, of which a pool has none, or that is personal."""
    plain = {"halving": HalvingConfig(), "stoppers": StoppersConfig(), "core": 0.0}
    return config.model_copy(update={"learning": config.learning.model_copy(update={**plain, **changes})})


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
