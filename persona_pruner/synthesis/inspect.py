"""What one persona is asked and how it answers, for a reader at a terminal."""

from collections import Counter
from typing import Any

from rich.console import Group
from rich.table import Table

from persona_pruner.dataset import NOT_SELECTED, USABLE, read_table
from persona_pruner.errors import PersonaError, UserError
from persona_pruner.storage.base import Storage


def inspect_persona(storage: Storage, persona_id: str, count: int = 5) -> dict[str, Any]:
    """Most and least sensitive questions, and answers before and after. Raises UserError."""
    try:
        rows = read_table(storage, persona_id).to_pylist()
    except PersonaError as error:
        raise UserError(str(error)) from None
    ordered = sorted(rows, key=lambda row: -row["score"])
    outcomes = Counter(row["filter"] for row in rows)
    usable = Counter(row["split"] for row in rows if row["filter"] == USABLE)
    distinct = {row["question_id"]: row for row in ordered}.values()
    shown = [{key: row[key] for key in ("question", "score")} for row in distinct]
    return {
        "persona_id": persona_id,
        "rows": len(rows),
        "train": usable["train"],
        "heldout": usable["heldout"],
        "outcomes": dict(sorted(outcomes.items())),
        "most_sensitive": shown[:count],
        "least_sensitive": shown[-count:],
        "answers": [
            {key: row[key] for key in ("question", "original_answer", "answer", "filter")}
            for row in ordered[:count]
            if row["filter"] != NOT_SELECTED
        ],
    }


def render(inspection: dict[str, Any]) -> Group:
    outcomes = ", ".join(f"{name} {count}" for name, count in inspection["outcomes"].items())
    scores = Table(title=f"{inspection['persona_id']}: {inspection['rows']} rows ({outcomes})", title_justify="left")
    scores.add_column("score", justify="right")
    scores.add_column("question")
    for part in ("most_sensitive", "least_sensitive"):
        for row in inspection[part]:
            scores.add_row(f"{row['score']:.4f}", row["question"])
        scores.add_section()
    answers = Table(title="before and after", title_justify="left")
    for name in ("question", "original answer", "answer in its voice"):
        answers.add_column(name)
    for row in inspection["answers"]:
        answers.add_row(row["question"], row["original_answer"] or "", row["answer"])
    return Group(scores, answers)
