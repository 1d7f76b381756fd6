"""Settings of the evaluation: which answers are asked for, who judges them, and what a mask must reach."""

from typing import Annotated, Literal

from pydantic import Field

from persona_pruner.config.section import Count, HashedContent, NonNegative, Section


class AnswersConfig(Section):
    questions: Count = 8
    """Held-out questions that each persona is asked: its file in `evaluation.questions`, else those of its data."""
    max_new_tokens: Count = 96
    """An answer that does not end within this is cut off, and counted as such."""
    temperature: NonNegative = 0.0
    """0 is greedy: the same answers bit for bit whenever they are asked again."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample from the most probable tokens that together have this probability; 1 is all."""
    seed: int = 0
    """Decides samples, the same random numbers for every arm, and whom the classifier compares with."""
    batch_size: Count = 32
    """Answers under way at once, of all arms."""
    candidates: Count = 6
    """Descriptions among which the classifier looks for the persona's own; 1 leaves the classifier out."""
    baseline: Literal["activation", "magnitude", "random"] = "activation"
    """The mask without training that the own one is compared with: by the persona's activations, by weights, or by
    chance."""


class EvaluationConfig(Section):
    enabled: bool = False
    """Compare each mask with the baselines at the end (the quickstart's table)."""
    conversations: str | None = None
    """JSON Lines of persona_id, question, answer: text of the personas that the backbone did not write."""
    max_rows: Count = 64
    """Rows per persona and kind of text."""
    questions: HashedContent[str | None] = None
    """Directory of <persona_id>.json or <persona_id>.txt files: questions never used to make that persona's data."""
    answers: AnswersConfig = AnswersConfig()
    """What `persona-pruner evaluate` asks."""
    passes: tuple[str, ...] = ()
    """Conditions such as `judge>=75` on the catalog's evaluation columns that a mask must meet to pass."""
