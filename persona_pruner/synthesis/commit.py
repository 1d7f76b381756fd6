"""One Parquet file per persona: what it was asked, what it answered, why that question, and what it is used for."""

import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from persona_pruner.config.schema import RunConfig
from persona_pruner.dataset import CUT_OFF, NOT_SELECTED, SCHEMA, USABLE, split_of, uses_unfinished_answers
from persona_pruner.errors import PersonaError
from persona_pruner.manifest import Persona
from persona_pruner.storage import keys
from persona_pruner.storage.base import Storage
from persona_pruner.synthesis.sources import Question


@dataclass(frozen=True)
class DataRow:
    """One row of the file. `filter` is the outcome of the filters, or "not_selected" where nobody was asked."""

    question: Question
    score: float
    filter: str = NOT_SELECTED
    answer: str = ""
    sample: int = 0


def usable_outcomes(config: RunConfig) -> set[str]:
    """Filter outcomes of answers that a mask learns from."""
    return {USABLE, CUT_OFF} if uses_unfinished_answers(config) else {USABLE}


def commit(config: RunConfig, storage: Storage, persona: Persona, rows: Sequence[DataRow], model: str) -> Counter[str]:
    """Store a persona's rows in one object. Returns the number of answers by filter outcome.

    Raises PersonaError (few_answers) with the counts.
    """
    outcomes = Counter(row.filter for row in sorted(rows, key=lambda row: row.filter) if row.filter != NOT_SELECTED)
    usable = sum(outcomes[outcome] for outcome in usable_outcomes(config))
    if usable < config.synthesis.filter.min_answers:
        told = ", ".join(f"{name} {count}" for name, count in outcomes.items()) or "none selected"
        raise PersonaError(
            "few_answers",
            f"{usable} usable answers, synthesis.filter.min_answers is {config.synthesis.filter.min_answers} ({told})",
        )
    table = [
        {
            "question_id": row.question.id,
            "question": row.question.text,
            "original_answer": row.question.answer,
            "answer": row.answer,
            "score": row.score,
            "backend": config.synthesis.rewrite.backend,
            "model": model,
            "filter": row.filter,
            "split": "" if row.filter == NOT_SELECTED else split_of(row.question.id, config.synthesis.heldout_fraction),
            "sample": row.sample,
            "earlier": row.question.earlier,
        }
        for row in rows
    ]
    stream = io.BytesIO()
    schema = SCHEMA.with_metadata({"persona_sha256": persona.sha256})
    pq.write_table(pa.Table.from_pylist(table, schema), stream, compression="zstd")
    storage.put(keys.persona_data(persona.id), stream.getvalue())
    return outcomes
