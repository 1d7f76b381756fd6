"""What becomes of a persona's training: one typed result, from the trainer through the worker to the scheduler."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from importlib.metadata import version
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from persona_pruner.backbone.load import Backbone
from persona_pruner.config.schema import LearningConfig
from persona_pruner.dataset import PersonaData
from persona_pruner.errors import MaskError, PersonaError
from persona_pruner.learning.encoding import PooledData
from persona_pruner.learning.mask_candidate import MaskCandidate
from persona_pruner.learning.stoppers import StopReason
from persona_pruner.masks.format import Mask, MaskMetadata
from persona_pruner.masks.weight_mask import WeightMask


@dataclass(frozen=True)
class MaskOrigin:
    """What a mask's header says about where it comes from, besides its settings."""

    data: PersonaData | PooledData
    unpruned_loss: float | None
    run_id: str


@dataclass(frozen=True)
class Progress:
    """After a step. `loss` is the training loss, `heldout_loss` the last one measured, both in nats per token."""

    persona_id: str
    step: int
    loss: float
    heldout_loss: float | None
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Curve:
    """How the learning of a mask went, in nats per token."""

    training: Sequence[float]
    """By step, what the objective came to."""
    heldout: Sequence[tuple[int, float]]
    """(steps so far, cross-entropy), where it was measured."""

    def to_bytes(self) -> bytes:
        return json.dumps(asdict(self)).encode()


@dataclass(frozen=True)
class LearnedScores:
    """What a finished mask was made of, in full precision: where other masks can start."""

    scores_LI: Tensor
    keep_LI: Tensor
    fisher_LI: Tensor | None = None
    """Fisher scores that the value optimizer learned with."""

    def to_bytes(self) -> bytes:
        fisher = {} if self.fisher_LI is None else {"fisher": self.fisher_LI}
        return save({"scores": self.scores_LI, "keep": self.keep_LI, **fisher})

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> "LearnedScores":
        """Raises MaskError, which names `where`."""
        try:
            tensors = load(data)
            return cls(tensors["scores"], tensors["keep"], tensors.get("fisher"))
        except (SafetensorError, KeyError) as error:
            raise MaskError(f"{where}: not the scores of a mask ({type(error).__name__}); remove it") from None


class TrainingStatus(StrEnum):
    DONE = "done"
    PAUSED = "paused"
    """Stopped from outside, after a checkpoint."""
    FAILED = "failed"


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """Result of one persona. `mask` is set on rank 0 and for DONE only, `cause` and `message` for FAILED only."""

    persona_id: str
    status: TrainingStatus
    step: int = 0
    heldout_loss: float | None = None
    """Of the mask, nats per token."""
    seconds: float = 0.0
    tokens: int = 0
    reason: StopReason | None = None
    mask: Mask | WeightMask | None = None
    learned: LearnedScores | None = None
    """Of pooled rows, together with the mask."""
    curve: Curve | None = None
    """Together with the mask, where it was learned."""
    cause: str = ""
    message: str = ""
    busy_seconds: float = 0.0
    """Time for which its group was busy with it: the call's time, shared evenly among the personas of the call."""

    @classmethod
    def failed(cls, persona_id: str, error: PersonaError) -> "TrainingResult":
        return cls(persona_id=persona_id, status=TrainingStatus.FAILED, cause=error.cause, message=str(error))

    @classmethod
    def done(
        cls,
        candidate: MaskCandidate,
        reason: StopReason,
        mask: Mask | WeightMask | None = None,
        learned: LearnedScores | None = None,
    ) -> "TrainingResult":
        return cls(
            persona_id=candidate.persona_id,
            status=TrainingStatus.DONE,
            step=candidate.step,
            heldout_loss=candidate.heldout,
            seconds=candidate.seconds,
            tokens=candidate.tokens,
            reason=reason,
            mask=mask,
            learned=learned,
            curve=Curve(candidate.losses, candidate.heldout_losses) if mask is not None else None,
        )

    @classmethod
    def paused(cls, candidates: Sequence[MaskCandidate]) -> "TrainingResult":
        return cls(
            persona_id=candidates[0].persona_id,
            status=TrainingStatus.PAUSED,
            step=candidates[0].step,
            seconds=sum(candidate.seconds for candidate in candidates),
            tokens=sum(candidate.tokens for candidate in candidates),
        )


def candidate_scores(candidate: MaskCandidate) -> LearnedScores:
    fisher_LI = None if candidate.fisher_LI is None else candidate.fisher_LI.cpu()
    return LearnedScores(candidate.learned().cpu(), candidate.mask().cpu(), fisher_LI)


def made_by(backbone: Backbone, config: LearningConfig, origin: MaskOrigin) -> dict[str, Any]:
    """The header's fields that do not depend on the kind of mask."""
    data = origin.data
    opposite = data.opposite if isinstance(data, PersonaData) and config.is_contrastive else None
    return {
        "persona_id": data.persona_id,
        "persona_sha256": _sha256(data.description),
        "persona_description": data.description,
        "backbone": backbone.name,
        "backbone_fingerprint": backbone.fingerprint,
        "method": config.method,
        "seed": config.seed,
        "unpruned_loss": origin.unpruned_loss,
        "data_sha256": data.sha256 if opposite is None else _sha256(data.sha256 + opposite.sha256),
        "versions": {name: version(name) for name in ("persona-pruner", "torch", "transformers")},
        "run_id": origin.run_id,
        "opposite_sha256": None if opposite is None else _sha256(opposite.description),
    }


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def make_mask(backbone: Backbone, config: LearningConfig, candidate: MaskCandidate, origin: MaskOrigin) -> Mask:
    """The mask of a finished candidate. It holds nothing that differs between two runs of the same thing."""
    keep_LI = candidate.mask().cpu()
    metadata = MaskMetadata(
        **made_by(backbone, config, origin),
        layers=keep_LI.shape[0],
        channels=keep_LI.shape[1],
        kept=tuple(keep_LI.sum(1).tolist()),
        ratio=candidate.ratio,
        steps=candidate.step,
        masked_loss=candidate.heldout,
    )
    return Mask(keep_LI, metadata, candidate.learned().cpu().half() if config.keep_scores else None)
