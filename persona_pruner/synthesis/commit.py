"""One Parquet file a persona: what it was asked, what it answered, why that question, and what it is used for."""

import hashlib
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from persona_pruner import layout
from persona_pruner.config import RunConfig
from persona_pruner.errors import PersonaError
from persona_pruner.learning.data import PersonaData, Row
from persona_pruner.manifest import Persona
from persona_pruner.storage import NotFoundError, Storage, read_parquet
from persona_pruner.synthesis import filters
from persona_pruner.synthesis.sources import Question

SCHEMA = pa.schema(
    [
        ("question_id", pa.string()),
        ("question", pa.string()),
        ("original_answer", pa.string()),
        ("answer", pa.string()),
        ("score", pa.float32()),
        ("backend", pa.string()),
        ("model", pa.string()),
        ("filter", pa.string()),
        ("split", pa.string()),
        ("sample", pa.int32()),
    ]
)


NOT_SELECTED = "not_selected"
"""Value of the column `filter` of a question that was scored and neither selected nor answered."""


@dataclass(frozen=True)
class Answer:
    text: str
    finished: bool
    """False where the answer was cut off at the token limit."""


def split_of(question_id: str, heldout_fraction: float) -> str:
    """heldout or train, decided by the question's hash alone."""
    return "heldout" if int(question_id[:8], 16) < heldout_fraction * 2**32 else "train"


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
    usable = counts.get("ok", 0)
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
    storage.put(layout.persona_data(persona.id), stream.getvalue())
    return counts


def read_table(storage: Storage, persona_id: str) -> pa.Table:
    """The stored rows. Raises PersonaError (no_data, bad_data)."""
    key = layout.persona_data(persona_id)
    try:
        table = read_parquet(storage.get(key))
        return table.select(SCHEMA.names).cast(SCHEMA.with_metadata(table.schema.metadata))
    except NotFoundError:
        raise PersonaError("no_data", f"{storage.url}/{key}: not there; synthesize first") from None
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise PersonaError("bad_data", f"{storage.url}/{key}: not usable: {str(error).splitlines()[0]}") from None


def is_current(storage: Storage, persona: Persona) -> bool:
    """Whether the stored data are of this description."""
    try:
        metadata = read_table(storage, persona.id).schema.metadata or {}
    except PersonaError:
        return False
    return metadata.get(b"persona_sha256", b"").decode() == persona.sha256


def read_persona_data(storage: Storage, persona: Persona) -> PersonaData:
    """Usable rows by split. Raises PersonaError (no_data, bad_data, empty)."""
    table = read_table(storage, persona.id)
    parts: dict[str, list[Row]] = {"train": [], "heldout": []}
    digest = hashlib.sha256()
    for row in table.to_pylist():
        if row["filter"] == "ok" and row["split"] in parts:
            if not row["question"] or not row["answer"]:
                raise PersonaError("bad_data", f"{layout.persona_data(persona.id)}: a row has no question or no answer")
            parts[row["split"]].append(Row(row["question"], row["answer"]))
            digest.update(f"{row['split']}\0{row['question']}\0{row['answer']}\n".encode())
    if not parts["train"]:
        raise PersonaError("empty", f"{layout.persona_data(persona.id)}: holds no usable row to train on")
    return PersonaData(
        persona.id, persona.description, tuple(parts["train"]), tuple(parts["heldout"]), digest.hexdigest()
    )
