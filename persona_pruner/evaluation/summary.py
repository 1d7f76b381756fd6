"""What an evaluation says of each persona: means over its answers by arm, and the columns that the catalog gets."""

import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich.table import Table

from persona_pruner.errors import ConfigError
from persona_pruner.evaluation.answers import SCHEMA
from persona_pruner.evaluation.statistics import mean
from persona_pruner.evaluation.subject import ARMS
from persona_pruner.evaluation.wording import distinct
from persona_pruner.masks.store import select
from persona_pruner.storage import keys
from persona_pruner.storage.base import ObjectInfo, Storage
from persona_pruner.storage.open import read_parquet

Measures = Mapping[str, Mapping[str, float | None]]
"""By arm and name."""
MEANS = ("ended", "words", "repetition", "own_loss", "rank", "similarity")
MEASURES = (*MEANS, "distinct_1", "distinct_2", "first")
"""Of one persona under one arm. `first`: share of answers for which its own description ranks first."""
SHOWN = {
    "ended": "ended", "words": "words", "repetition": "repeated", "distinct_2": "distinct", "own_loss": "loss",
    "first": "first", "rank": "rank", "similarity": "similar",
}  # fmt: skip
COLUMNS = pa.schema(
    [
        ("persona_id", pa.string()),
        ("answers", pa.int32()),
        ("answers_loss", pa.float64()),
        ("conversations_loss", pa.float64()),
        ("rank", pa.float64()),
        ("first", pa.float64()),
        ("ended", pa.float64()),
        ("repetition", pa.float64()),
        ("distinct_2", pa.float64()),
        ("similarity", pa.float64()),
        ("judge", pa.float64()),
        ("judge_coherence", pa.float64()),
        ("json", pa.float64()),
        ("tool", pa.float64()),
        ("injection", pa.float64()),
        ("injection_first", pa.float64()),
        ("dialogue_first", pa.float64()),
        ("dialogue_judge", pa.float64()),
        ("passes", pa.int8()),
    ]
)
"""The catalog's columns, of the persona's own mask; null where it was not measured. `passes` is 1 or 0."""


def read_answers(
    storage: Storage, connections: int = 16, persona_ids: Sequence[str] | None = None, kind: str = "answers"
) -> Iterator[pa.Table]:
    """The stored rows of a kind of each persona that was asked, in order of ids."""
    wanted, place = None if persona_ids is None else set(persona_ids), keys.evaluation_rows(kind)
    items = [item for item in storage.list(place) if wanted is None or keys.persona_of(item.key, place) in wanted]

    def read(item: ObjectInfo) -> pa.Table:
        stored = pa.concat_tables(
            [SCHEMA.empty_table(), read_parquet(storage.get(item.key))], promote_options="default"
        )
        return stored.select(SCHEMA.names).cast(SCHEMA)

    with ThreadPoolExecutor(connections) as pool:
        for start in range(0, len(items), 64 * connections):
            yield from pool.map(read, items[start : start + 64 * connections])


def by_arm(answers: pa.Table) -> dict[str, dict[str, float | None]]:
    """MEASURES of one persona's answers, by arm; None where nothing was measured."""
    measures: dict[str, dict[str, float | None]] = {}
    for arm in ARMS:
        rows = answers.filter(pc.equal(answers["arm"], arm))
        if not rows.num_rows:
            continue
        values: dict[str, float | None] = {name: pc.mean(rows[name].cast("float64")).as_py() for name in MEANS}
        texts = rows["text"].to_pylist()
        values |= {f"distinct_{n}": distinct(texts, n) for n in (1, 2)}
        values["first"] = pc.mean(pc.equal(rows["rank"], 1).cast("float64")).as_py()
        measures[arm] = values
    return measures


def stored_losses(storage: Storage) -> dict[str, dict[str, dict[str, float]]]:
    """The job's comparison by persona, text and method, as far as it is stored."""
    items = [item for item in storage.list(keys.EVALUATION) if item.key.count("/") == 1 and item.key.endswith(".json")]
    with ThreadPoolExecutor(16) as pool:
        values = pool.map(lambda item: json.loads(storage.get(item.key)), items)
        return {value["persona_id"]: value["losses"] for value in values}


def summarize(
    answers: Iterable[pa.Table],
    losses: Mapping[str, Mapping[str, Mapping[str, float]]],
    conditions: Sequence[str],
    verdicts: Callable[[str, pa.Table], Measures] = lambda persona_id, answers: {},
    more: Mapping[str, Mapping[str, float | None]] = MappingProxyType({}),
) -> pa.Table:
    """A row of COLUMNS for each persona that was asked or compared. `verdicts` are judges' means by arm, `more` has
    further columns by persona.

    Raises ConfigError for a wrong condition.
    """
    rows: dict[str, dict[str, Any]] = {}
    for table in answers:
        own = by_arm(table).get("own")
        if own is not None:
            persona_id = table["persona_id"][0].as_py()
            rows[persona_id] = {name: value for name, value in own.items() if name in COLUMNS.names}
            judges = verdicts(persona_id, table).get("own", {})
            rows[persona_id]["judge"] = judges.get("judge_consistency")
            rows[persona_id]["judge_coherence"] = judges.get("judge_coherence")
            rows[persona_id]["answers"] = pc.sum(pc.equal(table["arm"], "own")).as_py()
    for persona_id, by_text in losses.items():
        row = rows.setdefault(persona_id, {})
        row |= {f"{text}_loss": values["own"] for text, values in by_text.items() if "own" in values}
    for persona_id, columns in more.items():
        rows.setdefault(persona_id, {}).update(columns)
    table = pa.Table.from_pylist([{"persona_id": name, **rows[name]} for name in sorted(rows)], COLUMNS)
    passing = set(select(table, conditions)["persona_id"].to_pylist())
    flags = pa.array([int(name in passing) for name in table["persona_id"].to_pylist()], pa.int8())
    return table.set_column(COLUMNS.get_field_index("passes"), "passes", flags)


def store_summary(storage: Storage, summary: pa.Table) -> None:
    stream = io.BytesIO()
    pq.write_table(summary, stream, compression="zstd")
    storage.put(keys.EVALUATION_SUMMARY, stream.getvalue())


def render(answers: Iterable[pa.Table]) -> Table:
    """Means over personas of each arm's measures."""
    arms: dict[str, list[dict[str, float | None]]] = {}
    for one in answers:
        for arm, values in by_arm(one).items():
            arms.setdefault(arm, []).append(values)
    shown = Table(title="Answers to held-out questions, means over personas", title_justify="left", box=None)
    for name in ("arm", "personas", *SHOWN.values()):
        # Two of the names differ in their ends only, which a narrow terminal would cut off.
        shown.add_column(name, justify="left" if name == "arm" else "right", no_wrap=name == "arm")
    for arm, rows in arms.items():
        means = (mean(row[name] for row in rows) for name in SHOWN)
        shown.add_row(arm, str(len(rows)), *("" if value is None else f"{value:.2f}" for value in means))
    return shown


def failing(table: pa.Table, least: Sequence[str], most: Sequence[str]) -> dict[str, list[str]]:
    """Why each persona fails that does: a value below `least` or above `most` (texts such as rank=2), or none at all.

    `table` is MaskStore.table(). Raises ConfigError where a bound is none, or of no column.
    """
    failures: dict[str, list[str]] = {}
    for sign, bounds in ((1, least), (-1, most)):
        for text in bounds:
            name, bound = _bound(table, text)
            for persona_id, value in zip(table["persona_id"].to_pylist(), table[name].to_pylist(), strict=True):
                if value is None or sign * value < sign * bound:
                    shown = "not evaluated" if value is None else f"{value:g}"
                    failures.setdefault(persona_id, []).append(f"{name} {shown} ({text})")
    return {persona_id: failures[persona_id] for persona_id in sorted(failures)}


def _bound(table: pa.Table, text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    numeric = [
        field.name for field in table.schema if pa.types.is_integer(field.type) or pa.types.is_floating(field.type)
    ]
    try:
        if name in numeric:
            return name, float(value)
    except ValueError:
        pass
    evaluated = "" if "first" in numeric else "; nothing was evaluated yet: persona-pruner evaluate"
    raise ConfigError(f"{text!r}: write NAME=NUMBER with a name out of {', '.join(numeric)}{evaluated}")
