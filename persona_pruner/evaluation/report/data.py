"""What a report shows, read from an output: the run, every mask, the comparison, the evaluation, failures, costs."""

import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from persona_pruner.errors import MaskError, StorageError, UserError
from persona_pruner.evaluation.answers import ARMS
from persona_pruner.evaluation.judge import judged
from persona_pruner.evaluation.summary import by_arm, read_answers, stored_losses
from persona_pruner.learning.pooled import pooled_sample
from persona_pruner.masks.catalog import mask_objects
from persona_pruner.masks.format import Mask
from persona_pruner.masks.store import read_evaluation
from persona_pruner.storage import keys
from persona_pruner.storage.base import NotFoundError, Storage

MAP_PERSONAS = 300
"""Masks whose overlap is computed, at most; drawn by their ids."""
ANSWER_BYTES = 6_000_000
"""Sample answers that a report carries, at most; the personas that lost most come first."""
ANSWER_CHARACTERS = 600
QUESTIONS = 3


@dataclass(frozen=True)
class PersonaFigures:
    """One persona of a report. `losses` by text and method in nats per token, `measures` by arm."""

    id: str
    description: str
    kept: float
    """Share of the FFN channels that its mask keeps."""
    bytes: int
    losses: dict[str, dict[str, float]] = field(default_factory=dict)
    measures: dict[str, dict[str, float | None]] = field(default_factory=dict)
    columns: dict[str, Any] = field(default_factory=dict)
    """Of the catalog's evaluation columns."""
    error: str = ""

    @property
    def loss(self) -> float:
        """What its own mask loses on its first text, nats per token; -inf where nobody looked."""
        for losses in self.losses.values():
            if "own" in losses:
                return losses["own"] - losses["unpruned"]
        return float("-inf")


@dataclass(frozen=True)
class ReportData:
    url: str
    run: dict[str, Any]
    """run.json; empty where masks were pulled or imported."""
    status: dict[str, Any]
    personas: list[PersonaFigures]
    """Those that lost most first."""
    answers: dict[str, list[dict[str, Any]]]
    """By persona: questions, each with the answer of every arm."""
    sample: list[str]
    """Personas whose masks are in `keep_PLI` (bool)."""
    keep_PLI: np.ndarray
    errors: list[dict[str, Any]]
    others: dict[str, Any] = field(default_factory=dict)
    """Further documents below evaluation/, such as benchmarks and judges' costs, by name."""


def read_report_data(storage: Storage, connections: int = 16) -> ReportData:
    """Raises UserError where there is no mask, StorageError."""
    objects = mask_objects(storage)
    if not objects:
        raise UserError(f"{storage.url}: holds no mask to report on")
    sample = set(pooled_sample(list(objects), MAP_PERSONAS))
    losses, evaluated = stored_losses(storage), read_evaluation(storage)
    columns = {row["persona_id"]: row for row in evaluated.to_pylist()} if evaluated is not None else {}
    errors = _documents(storage, keys.ERRORS)
    faults = {error["persona_id"]: error["message"] for error in errors}
    figures: dict[str, PersonaFigures] = {}
    keeps: dict[str, np.ndarray] = {}
    for persona_id, mask in _masks(storage, {name: item.key for name, item in objects.items()}, connections):
        kept = float(np.mean(mask.metadata.kept)) / mask.metadata.channels
        description = mask.metadata.persona_description
        figures[persona_id] = PersonaFigures(
            persona_id, description, kept, objects[persona_id].size, losses.get(persona_id, {}), {},
            {name: value for name, value in columns.get(persona_id, {}).items() if name != "persona_id"},
            faults.get(persona_id, ""),
        )  # fmt: skip
        if persona_id in sample:
            keeps[persona_id] = mask.keep_LI.numpy()
    answers = _answers(storage, figures, connections)
    ordered = sorted(figures.values(), key=lambda one: (-one.loss, one.id))
    names = _same_shape(keeps)
    keep_PLI = np.stack([keeps[name] for name in names]) if names else np.zeros((0, 0, 0), bool)
    documents = {name: _document(storage, f"{keys.EVALUATION_TABLES}{name}.json") for name in ("benchmarks", "costs")}
    return ReportData(
        storage.url, _document(storage, keys.RUN), _document(storage, keys.STATUS), ordered,
        _fitting(answers, ordered), names, keep_PLI, errors, {name: one for name, one in documents.items() if one},
    )  # fmt: skip


def _masks(storage: Storage, mask_keys: Mapping[str, str], connections: int) -> Iterator[tuple[str, Mask]]:
    """Masks that verify, a block at a time."""

    def read(entry: tuple[str, str]) -> tuple[str, Mask] | None:
        try:
            return entry[0], Mask.from_bytes(storage.get(entry[1]), entry[1])
        except (MaskError, StorageError):
            return None

    entries = sorted(mask_keys.items())
    with ThreadPoolExecutor(connections) as pool:
        for start in range(0, len(entries), 16 * connections):
            yield from (one for one in pool.map(read, entries[start : start + 16 * connections]) if one)


def _same_shape(keeps: Mapping[str, np.ndarray]) -> list[str]:
    """Personas whose masks can be compared: those of the most frequent shape."""
    shapes = [keep.shape for keep in keeps.values()]
    return sorted(name for name, keep in keeps.items() if keep.shape == max(set(shapes), key=shapes.count))


def _answers(storage: Storage, figures: dict[str, PersonaFigures], connections: int) -> dict[str, list[dict[str, Any]]]:
    """Sample answers by persona; adds each persona's measures to its figures."""
    samples: dict[str, list[dict[str, Any]]] = {}
    for table in read_answers(storage, connections):
        persona_id = table["persona_id"][0].as_py()
        if persona_id in figures:
            verdicts = judged(storage, persona_id, table)
            measures = {arm: {**values, **verdicts.get(arm, {})} for arm, values in by_arm(table).items()}
            figures[persona_id].measures.update(measures)
            samples[persona_id] = _side_by_side(table)
    return samples


def _side_by_side(table: pa.Table) -> list[dict[str, Any]]:
    by_question: dict[str, dict[str, Any]] = {}
    for row in table.select(["question", "arm", "text", "ended", "rank", "candidates"]).to_pylist():
        entry = by_question.setdefault(row["question"], {"question": row["question"][:ANSWER_CHARACTERS], "arms": {}})
        entry["arms"][row["arm"]] = {
            "text": row["text"][:ANSWER_CHARACTERS], "ended": row["ended"], "rank": row["rank"], "of": row["candidates"]
        }  # fmt: skip
    shown = list(by_question.values())[:QUESTIONS]
    for entry in shown:
        entry["arms"] = {arm: entry["arms"][arm] for arm in ARMS if arm in entry["arms"]}
    return shown


def _fitting(
    answers: Mapping[str, list[dict[str, Any]]], ordered: list[PersonaFigures]
) -> dict[str, list[dict[str, Any]]]:
    fitting: dict[str, list[dict[str, Any]]] = {}
    used = 0
    for persona in ordered:
        sample = answers.get(persona.id)
        size = len(json.dumps(sample)) if sample else 0
        if sample and used + size <= ANSWER_BYTES:
            fitting[persona.id] = sample
            used += size
    return fitting


def _document(storage: Storage, key: str) -> dict[str, Any]:
    try:
        return dict(json.loads(storage.get(key)))
    except (NotFoundError, ValueError):
        return {}


def _documents(storage: Storage, prefix: str) -> list[dict[str, Any]]:
    return [document for item in storage.list(prefix) if (document := _document(storage, item.key))]
