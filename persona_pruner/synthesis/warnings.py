"""What a user should know about data that can be used all the same."""

from persona_pruner.config.schema import RunConfig
from persona_pruner.synthesis.answering import FEW_ROWS, SynthesisResult


def foreign_rewriter(config: RunConfig) -> str | None:
    """Where distillation meets answers of another model: it takes the backbone's own next tokens as targets."""
    backend = config.synthesis.rewrite.backend
    if backend == "self" or config.learning.objective.distillation == 0 or not config.learning.is_learned:
        return None
    return (
        f"synthesis.rewrite.backend = {backend} with learning.objective.distillation: that ignores the words of "
        "an answer as targets, so the mask learns the backbone's voice and not the rewriter's; set cross_entropy to 1 "
        "and distillation to 0, or rewrite with self"
    )


class FewRows:
    """Counts personas with so few usable answers that their masks overfit."""

    def __init__(self) -> None:
        self._personas = 0
        self._fewest: tuple[int, str] | None = None

    def add(self, result: SynthesisResult) -> None:
        if result.error is None and result.usable < FEW_ROWS:
            self._personas += 1
            self._fewest = min(self._fewest or (result.usable, result.persona_id), (result.usable, result.persona_id))

    def message(self) -> str | None:
        if self._fewest is None:
            return None
        return (
            f"{self._personas} personas have fewer than {FEW_ROWS} usable answers (fewest: {self._fewest[1]}, "
            f"{self._fewest[0]}); masks overfit so few. Raise synthesis.select.k, samples_per_question or answer_tokens"
        )
