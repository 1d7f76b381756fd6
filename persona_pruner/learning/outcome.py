"""What a trainer tells about a persona: on the way, and at the end."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Literal

from persona_pruner.backbone.load import Backbone
from persona_pruner.config.schema import LearningConfig
from persona_pruner.dataset import PersonaData
from persona_pruner.learning.mask_candidate import MaskCandidate
from persona_pruner.masks.format import Mask, MaskMetadata


@dataclass(frozen=True)
class Progress:
    """After a step. `loss` is the training loss, `heldout_loss` the last one measured, both nats per token."""

    persona_id: str
    step: int
    loss: float
    heldout_loss: float | None
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Outcome:
    """`mask` on rank 0 and for "done" only. `reason` is what ended the training."""

    persona_id: str
    status: Literal["done", "paused"]
    mask: Mask | None
    steps: int
    seconds: float
    tokens: int
    reason: str

    @classmethod
    def paused(cls, trials: Sequence[MaskCandidate]) -> "Outcome":
        first = trials[0]
        seconds, tokens = sum(t.seconds for t in trials), sum(t.tokens for t in trials)
        return cls(first.persona_id, "paused", None, first.step, seconds, tokens, "stopped")


def finish(
    backbone: Backbone,
    config: LearningConfig,
    data: PersonaData,
    trial: MaskCandidate,
    dense: float | None,
    reason: str,
    run_id: str,
) -> Outcome:
    """The outcome of a finished trial. The mask holds nothing that differs between two runs of the same thing."""
    keep_LI = trial.mask().cpu()
    metadata = MaskMetadata(
        persona_id=data.persona_id,
        persona_sha256=hashlib.sha256(data.description.encode()).hexdigest(),
        persona_description=data.description,
        backbone=backbone.name,
        backbone_fingerprint=backbone.fingerprint,
        layers=keep_LI.shape[0],
        channels=keep_LI.shape[1],
        kept=trial.kept,
        method=config.estimator,
        ratio=trial.ratio,
        seed=config.seed,
        steps=trial.step,
        loss_dense=dense,
        loss_masked=trial.heldout,
        data_sha256=data.sha256,
        versions={name: version(name) for name in ("persona-pruner", "torch", "transformers")},
        run_id=run_id,
    )
    scores_LI = trial.learned().cpu().half() if config.keep_scores else None
    mask = Mask(keep_LI, metadata, scores_LI) if backbone.world.rank == 0 else None
    return Outcome(data.persona_id, "done", mask, trial.step, trial.seconds, trial.tokens, reason)
