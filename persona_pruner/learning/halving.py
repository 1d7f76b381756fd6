"""Successive halving over learning rates, ratios and initial scores of one persona (Jamieson and Talwalkar 2016).

All candidates train side by side in the same steps; at every rung the better half goes on, and the winner alone trains
to the end.
"""

from collections.abc import Sequence
from itertools import product

from persona_pruner.config.schema import LearningConfig
from persona_pruner.learning.mask_candidate import MaskCandidate


def candidates(config: LearningConfig) -> list[tuple[str, float, float, str]]:
    """(name, ratio, learning rate, init) of every trial that a persona starts with; one where halving is off."""
    first = min(config.ratio_ladder) if config.ratio == "auto" else config.ratio
    grid = product(
        config.halving.ratios or (first,),
        config.halving.learning_rates or (config.learning_rate,),
        config.halving.inits or (config.init,),
    )
    return [(f"ratio {ratio}, rate {rate}, init {init}", ratio, rate, init) for ratio, rate, init in grid]


def is_rung(config: LearningConfig, step: int, left: int) -> bool:
    """Whether candidates are compared after this step: rungs end at r, 3r, 7r, ... as their lengths double."""
    length, end = config.halving.rung_steps, config.halving.rung_steps
    while end < step:
        length *= 2
        end += length
    return left > 1 and end == step


def better_half(
    trials: Sequence[MaskCandidate], dense: float | None, tolerance: float, keep: int | None = None
) -> list[MaskCandidate]:
    """The better half (rounded up), in the order they had. Candidates within `tolerance` nats of the unpruned loss
    come first, of those the larger ratio; then the lower held-out loss."""

    def rank(trial: MaskCandidate) -> tuple[bool, float, float]:
        loss = float("inf") if trial.heldout is None else trial.heldout
        within = dense is not None and loss <= dense + tolerance
        return not within, -trial.ratio if within else 0.0, loss

    best = sorted(trials, key=rank)[: keep or -(-len(trials) // 2)]
    return [trial for trial in trials if trial in best]
