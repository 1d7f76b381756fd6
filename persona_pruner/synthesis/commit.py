"""One Parquet file a persona: what it was asked, what it answered, why that question, and what it is used for."""

import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from persona_pruner.config.schema import RunConfig
from persona_pruner.dataset import CUT_OFF, NOT_SELECTED, SCHEMA, USABLE, split_of, uses_unfinished_answers
from persona_pruner.errors import PersonaError
from persona_pruner.manifest import Persona
from persona_pruner.storage import keys
from persona_pruner.storage.base import Storage
from persona_pruner.synthesis import filters
from persona_pruner.synthesis.sources import Question


@dataclass(frozen=True)
class Answer:
    text: str
    finished: bool
    """False where the answer was cut off at the token limit."""


def commit(
    config: RunConfig,
    storage: Storage,
    persona: Persona,
    questions: Sequence[Question],
    scores: Sequence[float],
    answers: Sequence[Sequence[Answer]],
    model: str,
    passed_over: Sequence[tuple[Question, float]] = (),
) -> dict[str, int]:
    """Filter and store a persona's rows in one object. Returns rows by filter outcome.

    answers: for each question its samples. passed_over: questions with scores that are kept beside, unanswered, to show
    what this persona's answers do not depend on. Raises PersonaError (few_answers) with the counts.
    """
    rows: list[dict[str, Any]] = []

    def add(question: Question, score: float, verdict: str, answer: str = "", split: str = "", sample: int = 0) -> None:
        rows.append(
            {
                "question_id": question.id,
                "question": question.text,
                "original_answer": question.answer,
                "answer": answer,
                "score": score,
                "backend": config.synthesis.rewrite.backend,
                "model": model,
                "filter": verdict,
                "split": split,
                "sample": sample,
            }
        )

    for question, score, samples in zip(questions, scores, answers, strict=True):
        split = split_of(question.id, config.synthesis.heldout_fraction)
        for number, sample in enumerate(samples):
            verdict = filters.outcome(
                config.synthesis.filter, question.text, question.answer, sample.text, sample.finished
            )
            add(question, score, verdict, sample.text, split, number)
    counts = dict(sorted(Counter(row["filter"] for row in rows).items()))
    usable = counts.get(USABLE, 0) + (counts.get(CUT_OFF, 0) if uses_unfinished_answers(config) else 0)
    if usable < config.synthesis.filter.min_answers:
        told = ", ".join(f"{name} {count}" for name, count in counts.items()) or "none selected"
        raise PersonaError(
            "few_answers",
            f"{usable} usable answers, synthesis.filter.min_answers is {config.synthesis.filter.min_answers} ({told})",
        )
    for question, score in passed_over:
        add(question, score, NOT_SELECTED)
    stream = io.BytesIO()
    metadata = {"persona_sha256": persona.sha256}
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA.with_metadata(metadata)), stream, compression="zstd")
    storage.put(keys.persona_data(persona.id), stream.getvalue())
    return counts
