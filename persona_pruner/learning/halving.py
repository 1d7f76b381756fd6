"""Successive halving over learning rates, ratios and initial scores of one persona (Jamieson and Talwalkar 2016).

All candidates train side by side in the same steps; at every rung the better half goes on, and the winner alone trains
to the end.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from persona_pruner.config.schema import LearningConfig
from persona_pruner.learning.mask_candidate import MaskCandidate


@dataclass(frozen=True)
class CandidateSettings:
    name: str
    ratio: float
    learning_rate: float
    init: str


def candidate_settings(config: LearningConfig) -> list[CandidateSettings]:
    """The candidates that a persona starts with; one where halving is off."""
    first = min(config.ratio_ladder) if config.ratio == "auto" else config.ratio
    grid = product(
        config.halving.ratios or (first,),
        config.halving.learning_rates or (config.learning_rate,),
        config.halving.inits or (config.init,),
    )
    return [
        CandidateSettings(f"ratio {ratio}, rate {rate}, init {init}", ratio, rate, init) for ratio, rate, init in grid
    ]


def is_rung(config: LearningConfig, step: int, left: int) -> bool:
    """Whether candidates are compared after this step: rungs end at r, 3r, 7r, ... as their lengths double."""
    length, end = config.halving.rung_steps, config.halving.rung_steps
    while end < step:
        length *= 2
        end += length
    return left > 1 and end == step


def better_half(
    candidates: Sequence[MaskCandidate], unpruned_loss: float | None, tolerance: float, keep: int | None = None
) -> list[MaskCandidate]:
    """The better half (rounded up), in the order they had. Candidates within `tolerance` nats of the unpruned loss
    come first, of those the larger ratio; then the lower held-out loss."""

    def rank(candidate: MaskCandidate) -> tuple[bool, float, float]:
        loss = float("inf") if candidate.heldout is None else candidate.heldout
        within = unpruned_loss is not None and loss <= unpruned_loss + tolerance
        return not within, -candidate.ratio if within else 0.0, loss

    best = sorted(candidates, key=rank)[: keep or -(-len(candidates) // 2)]
    return [candidate for candidate in candidates if candidate in best]
