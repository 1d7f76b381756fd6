"""What a character must still be able to do, decided without a judge: answer in JSON of a given schema, call a tool,
stay in its role when it is told to leave it.

Tasks are JSON Lines. `ability` is one of:
json: the answer is one JSON value, valid under `schema`; {schema} in the question is replaced by it.
tool: the answer is {"name": ..., "arguments": {...}}, a call of the tool `call` out of `tools` (each with a name and
JSON schema `parameters`); {tools} in the question is replaced by them.
injection: the answer must not contain `marker`, which the question demands; case does not matter.
"""

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import pyarrow as pa
import pyarrow.compute as pc
from referencing import Registry
from rich.table import Table

from persona_pruner.config.schema import RunConfig
from persona_pruner.errors import ConfigError, StorageError
from persona_pruner.evaluation.answers import ask, measure, under_every_arm
from persona_pruner.evaluation.statistics import RunningMeans
from persona_pruner.evaluation.subject import ARMS, Subject
from persona_pruner.evaluation.summary import read_answers
from persona_pruner.storage.base import Storage
from persona_pruner.storage.open import read_url

EXAMPLE_TASKS = Path(__file__).parents[1] / "example" / "abilities.jsonl"
ABILITIES = ("json", "tool", "injection")
IN_CHARACTER = "injection_first"
"""Share of the answers to injections for which the persona's own description ranks first."""
MEASURES = (*ABILITIES, IN_CHARACTER)
COLUMNS = ("ability", "arm", "personas", "passed")
ByArm = Mapping[str, Mapping[str, float | None]]
_WRAPPED = re.compile(r"\s*(?:```(?:json)?|<tool_call>)\s*(.*?)\s*(?:```|</tool_call>)\s*", re.DOTALL)


@dataclass(frozen=True)
class AbilityTask:
    ability: str
    question: str
    validator: Any = None
    marker: str = ""

    def is_passed_by(self, answer: str) -> bool:
        if self.ability == "injection":
            return self.marker.casefold() not in answer.casefold()
        wrapped = _WRAPPED.fullmatch(answer)
        try:
            return bool(self.validator.is_valid(json.loads(wrapped[1] if wrapped else answer)))
        except (ValueError, RecursionError):
            return False


def read_tasks(config: RunConfig) -> tuple[tuple[AbilityTask, ...], str]:
    """The tasks of `evaluation.abilities`, and what decides them: the sha256 of their file, and their limit.

    Raises ConfigError with file and line.
    """
    where = str(config.evaluation.abilities.tasks or EXAMPLE_TASKS)
    try:
        data = read_url(where, config.storage)
        lines = data.decode("utf-8").splitlines()
    except (StorageError, UnicodeDecodeError) as error:
        raise ConfigError(f"evaluation.abilities.tasks = {where!r}: {error}") from None
    tasks = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                tasks.append(_task(json.loads(line)))
            except (ValueError, KeyError, TypeError, AttributeError, jsonschema.SchemaError) as error:
                reason = f"{error} is missing" if isinstance(error, KeyError) else str(error).splitlines()[0]
                raise ConfigError(f"{where}:{number}: no task: {reason}") from None
    if not tasks:
        raise ConfigError(f"evaluation.abilities.tasks = {where!r}: holds no task")
    limit = config.evaluation.abilities.limit
    of = [[task for task in tasks if task.ability == ability][:limit] for ability in ABILITIES]
    return tuple(itertools.chain(*of)), f"{hashlib.sha256(data).hexdigest()} {limit}"


def _task(row: Mapping[str, Any]) -> AbilityTask:
    ability, question = row["ability"], str(row["question"])
    if ability == "injection":
        return AbilityTask(ability, question, marker=str(row["marker"]))
    if ability == "json":
        return AbilityTask(ability, question.replace("{schema}", json.dumps(row["schema"])), _validator(row["schema"]))
    if ability != "tool":
        raise ValueError(f"ability {ability!r} is none of {', '.join(ABILITIES)}")
    parameters = {tool["name"]: tool["parameters"] for tool in row["tools"]}
    if row["call"] not in parameters:
        raise ValueError(f"call {row['call']!r} is none of its tools {', '.join(parameters)}")
    schema = {
        "type": "object", "required": ["name", "arguments"], "additionalProperties": False,
        "properties": {"name": {"const": row["call"]}, "arguments": parameters[row["call"]]},
    }  # fmt: skip
    shown = "\n".join(json.dumps(tool) for tool in row["tools"])
    return AbilityTask(ability, question.replace("{tools}", shown), _validator(schema))


def _validator(schema: Any) -> Any:
    """References to elsewhere are not followed."""
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema, registry=Registry())


def try_abilities(subject: Subject) -> list[dict[str, Any]]:
    """Rows of the tasks under every arm, all arms in one stream of batches. Raises PersonaError."""
    tasks, _ = read_tasks(subject.config)
    rows = ask(subject, under_every_arm(subject, [task.question for task in tasks]), "abilities")
    for row in rows:
        task = tasks[row["number"]]
        row |= {"ability": task.ability, "passed": task.is_passed_by(row["text"])}
    injected = [row for row in rows if row["ability"] == "injection"]
    if injected:
        measure(subject, injected)
    return rows


def by_arm(rows: pa.Table) -> dict[str, dict[str, float | None]]:
    """MEASURES of one persona by arm: the share of its tasks that it passed; None where there were none."""
    measures: dict[str, dict[str, float | None]] = {}
    for arm in ARMS:
        own = rows.filter(pc.equal(rows["arm"], arm))
        if own.num_rows:
            of = {name: own.filter(pc.equal(own["ability"], name)) for name in ABILITIES}
            values = {name: pc.mean(some["passed"].cast("float64")).as_py() for name, some in of.items()}
            first = pc.equal(of["injection"]["rank"], 1)
            measures[arm] = values | {IN_CHARACTER: pc.mean(first.cast("float64")).as_py()}
    return measures


def stored(
    storage: Storage, connections: int = 16, persona_ids: Sequence[str] | None = None
) -> Iterator[tuple[str, ByArm]]:
    """`by_arm` of every persona whose abilities were tried."""
    for rows in read_answers(storage, connections, persona_ids, "abilities"):
        yield rows["persona_id"][0].as_py(), by_arm(rows)


def catalog_columns(measures: ByArm) -> dict[str, float | None]:
    """Of the own mask."""
    return dict(measures.get("own", {}))


def table(personas: Iterable[ByArm]) -> dict[str, Any]:
    """Means over personas, as the report reads them: `columns` and `rows`."""
    means = RunningMeans()
    for measures in personas:
        for arm, values in measures.items():
            for name, value in values.items():
                means.add((name, arm), value)
    rows = [[*key, means.count(key), means[key]] for key in itertools.product(MEASURES, ARMS) if means.count(key)]
    return {"columns": list(COLUMNS), "rows": rows}


def render(document: Mapping[str, Any]) -> Table:
    """`table` for a terminal, an arm a row."""
    passed = {(arm, name): share for name, arm, _, share in document["rows"]}
    shown = Table(title="Tasks passed, means over personas", title_justify="left", box=None, min_width=40)
    for name in ("arm", "json", "tool", "injection", "stays first"):
        shown.add_column(name, justify="left" if name == "arm" else "right")
    for arm in (arm for arm in ARMS if any(key[0] == arm for key in passed)):
        values = (passed.get((arm, name)) for name in MEASURES)
        shown.add_row(arm, *("" if value is None else f"{value:.2f}" for value in values))
    return shown
