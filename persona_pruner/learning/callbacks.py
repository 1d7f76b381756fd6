"""What a trainer asks of whoever runs it: where checkpoints are, whether to stop, who wants to know."""

from torch import Tensor

from persona_pruner.learning.outcome import LearnedScores, Progress


class TrainingCallbacks:
    """The defaults keep nothing and never stop. Rank 0 alone writes and reports, and only its `should_stop` counts."""

    def read_checkpoint(self, persona_id: str) -> bytes | None:
        """The last checkpoint of a persona, on every rank; None where there is none."""
        return None

    def write_checkpoint(self, persona_id: str, data: bytes) -> None:
        """Keep a checkpoint in place of the last one."""

    def warm_scores(self, persona_id: str) -> Tensor | None:
        """Trained scores [L, I] to start from, on every rank; None where there are none."""
        return None

    def pooled_scores(self) -> LearnedScores | None:
        """Of the mask learned from many personas' rows, on every rank; None where there is none."""
        return None

    def should_stop(self) -> bool:
        """Whether to checkpoint every persona and leave, asked once per step."""
        return False

    def report(self, progress: Progress) -> None:
        """Called once per step and candidate mask."""
