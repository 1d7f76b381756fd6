"""When a persona has learned enough, from its held-out evaluations."""

from dataclasses import dataclass, field
from enum import StrEnum

from torch import Tensor

from persona_pruner.config.schema import StoppersConfig


class StopReason(StrEnum):
    """What ended a training."""

    STEPS = "steps"
    SECONDS = "seconds"
    PLATEAU = "plateau"
    STABLE = "stable"


@dataclass
class Stopper:
    """Sees one persona's evaluations in order. Its state is numbers and one bool mask, kept in checkpoints."""

    config: StoppersConfig
    best: float = float("inf")
    stale: int = 0
    """Evaluations in a row that did not improve on the best."""
    last_LI: Tensor | None = field(default=None, repr=False)
    """Mask of the last evaluation."""

    def see(self, loss: float, mask_LI: Tensor) -> StopReason | None:
        """The reason to stop, or None. `loss` in nats per token, `mask_LI` the bool mask it was measured with."""
        better = loss < self.best - self.config.plateau_delta
        self.stale = 0 if better else self.stale + 1
        self.best = min(self.best, loss)
        changed = None if self.last_LI is None else (self.last_LI != mask_LI).float().mean().item()
        self.last_LI = mask_LI.clone()
        if self.config.plateau_evaluations is not None and self.stale >= self.config.plateau_evaluations:
            return StopReason.PLATEAU
        if self.config.stability is not None and changed is not None and changed <= self.config.stability:
            return StopReason.STABLE
        return None
