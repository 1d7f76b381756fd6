"""One persona in training: its rows, its candidate masks, and when what is due for it."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from persona_pruner.config.schema import LearningConfig, SchedulerConfig
from persona_pruner.dataset import PersonaData
from persona_pruner.learning import halving
from persona_pruner.learning.batches import TrainingExample
from persona_pruner.learning.encoding import EncodedData, PooledData, batch
from persona_pruner.learning.mask_candidate import MaskCandidate
from persona_pruner.learning.stoppers import StopReason


@dataclass
class PersonaTraining:
    """`candidates` is one mask, except while successive halving compares several."""

    data: PersonaData | PooledData
    encoded: EncodedData
    candidates: list[MaskCandidate]
    unpruned_loss: float | None
    """Held-out loss of the unpruned backbone, nats per token; None without held-out rows."""
    token_weights: list[tuple[float, ...]] | None = None
    """Per training row, where tokens do not weigh alike."""
    generic: EncodedData | None = None
    """Text without a persona that has a share in every step."""
    saved_step: int = 0
    saved_time: float = field(default_factory=time.monotonic)

    @property
    def persona_id(self) -> str:
        return self.data.persona_id

    @property
    def step(self) -> int:
        return self.candidates[0].step

    @property
    def steps(self) -> int:
        return self.candidates[0].steps

    def examples(
        self, candidate: MaskCandidate, first_slot: int
    ) -> Iterator[tuple[tuple[int, ...], list[TrainingExample]]]:
        """The rows of a candidate's next step by the prefix they stand behind, in slots from `first_slot`.

        The objective is a mean over their answer tokens; with generic text, the mean of both means by its share.
        """
        config = candidate.config
        generic_rows, share = config.generic_rows_per_step, config.objective.generic
        for encoded, rows_per_step, part, weights in (
            (self.encoded, config.rows_per_step - generic_rows, 1 - share, self.token_weights),
            (self.generic, generic_rows, share, None),
        ):
            if encoded is None:
                continue
            rows = encoded.train
            numbers = self._numbers(len(rows), rows_per_step, candidate.step, config.seed)
            total = sum(sum(weights[n]) if weights else rows[n].answer for n in numbers)
            for prefix in sorted({rows[n].prefix for n in numbers}):
                yield (
                    encoded.prefixes[prefix],
                    [
                        TrainingExample(
                            first_slot, (encoded.persona_id, n), rows[n], part / total, weights[n] if weights else None
                        )
                        for n in numbers
                        if rows[n].prefix == prefix
                    ],
                )
                first_slot += 1

    def visited(self, config: LearningConfig) -> set[int]:
        """Numbers of the training rows that some step has."""
        rows_per_step = config.rows_per_step - config.generic_rows_per_step
        rows = len(self.encoded.train)
        return {n for step in range(self.steps) for n in self._numbers(rows, rows_per_step, step, config.seed)}

    def _numbers(self, rows: int, rows_per_step: int, step: int, seed: int) -> list[int]:
        return batch(rows, rows_per_step, step, seed, self.encoded.sha256)

    def out_of_time(self, config: LearningConfig) -> bool:
        limit = config.stoppers.seconds
        return limit is not None and sum(candidate.seconds for candidate in self.candidates) > limit

    def keep_better_half(self, config: LearningConfig, keep: int | None = None) -> None:
        self.candidates = halving.better_half(self.candidates, self.unpruned_loss, config.ratio_tolerance, keep)

    def begin_next_ratio(self, config: LearningConfig) -> bool:
        """For the ratio `auto`: whether training goes on with a larger ratio. Else the candidate holds its final
        scores: those of the largest ratio within the tolerance."""
        if config.ratio != "auto":
            return False
        ladder, candidate = sorted(config.ratio_ladder), self.candidates[0]
        accepted = (
            candidate.heldout is None
            or self.unpruned_loss is None
            or candidate.heldout <= self.unpruned_loss + config.ratio_tolerance
        )
        if accepted and candidate.rung + 1 < len(ladder):
            candidate.scores_LI = candidate.accepted_LI = candidate.learned()
            candidate.rung += 1
            candidate.ratio = ladder[candidate.rung]
            candidate.reset()
            return True
        if not accepted and candidate.accepted_LI is not None:
            candidate.scores_LI, candidate.mean_LI = candidate.accepted_LI, None
            candidate.ratio = ladder[candidate.rung - 1]
        return False

    def goes_on(self, config: LearningConfig, reason: StopReason | None) -> bool:
        """Whether training goes on after a step that ended for `reason`, if any."""
        if reason is None:
            return True
        return reason is not StopReason.SECONDS and self.begin_next_ratio(config)

    def checkpoint_due(self, config: SchedulerConfig) -> bool:
        steps = self.step - self.saved_step
        late = steps > 0 and time.monotonic() - self.saved_time > config.checkpoint_seconds
        return steps < 0 or steps >= config.checkpoint_steps or late

    def saved(self) -> None:
        self.saved_step, self.saved_time = self.step, time.monotonic()
