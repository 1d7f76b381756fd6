"""What a report shows, read from an output: the run, every mask, the comparison, the evaluation, failures, costs."""

import itertools
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from persona_pruner.errors import MaskError, StorageError, UserError
from persona_pruner.evaluation.judge import judged
from persona_pruner.evaluation.judging import COST_COLUMNS
from persona_pruner.evaluation.overlap import SharedCounts, count_shared, shape_of
from persona_pruner.evaluation.subject import ARMS
from persona_pruner.evaluation.summary import by_arm, read_answers, stored_losses
from persona_pruner.learning.pooled import pooled_sample
from persona_pruner.masks.catalog import mask_objects
from persona_pruner.masks.format import Mask
from persona_pruner.masks.store import read_evaluation
from persona_pruner.masks.weight_mask import WeightMask, read_mask
from persona_pruner.storage import keys
from persona_pruner.storage.base import NotFoundError, ObjectInfo, Storage

MAP_PERSONAS = 300
"""Masks whose overlap is computed, at most; drawn by their ids."""
MAP_BYTES = 2**31
"""Those masks together, at most: masks of single weights are large."""
READ_BYTES = 2**28
"""Masks that are read at once, beyond one."""
ANSWER_BYTES = 6_000_000
"""Sample answers that a report carries, at most; the personas that lost most come first."""
ANSWER_CHARACTERS = 600
CURVE_POINTS = 30
QUESTIONS = 3


@dataclass(frozen=True)
class PersonaFigures:
    """One persona of a report. `losses` by text and method in nats per token, `measures` by arm."""

    id: str
    description: str
    kept: float
    """Share of the FFN channels (or weights) that its mask keeps."""
    bytes: int
    losses: dict[str, dict[str, float]] = field(default_factory=dict)
    measures: dict[str, dict[str, float | None]] = field(default_factory=dict)
    columns: dict[str, Any] = field(default_factory=dict)
    """Of the catalog's evaluation columns."""
    error: str = ""
    training: dict[str, Any] = field(default_factory=dict)
    """Of the mask's header: method, ratio, steps, held-out losses unpruned and masked; of the tuning after it, if there
    was one, `tuned_before` and `tuned_after`."""
    curve: dict[str, list[Any]] = field(default_factory=dict)
    """How its learning went (learning/outcome.py, `Curve`); empty where nothing was learned."""
    of_weights: bool = False
    """Whether its mask is one of single weights."""

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
    statuses: list[dict[str, Any]]
    """Of the last jobs: one, or one for each part of the manifest."""
    personas: list[PersonaFigures]
    """Those that lost most first."""
    answers: dict[str, list[dict[str, Any]]]
    """By persona: questions, each with the answer of every arm."""
    sample: list[str]
    """Personas whose masks are compared."""
    shared: SharedCounts | None
    """Of their masks; None where there are not two of one shape."""
    errors: list[dict[str, Any]]
    tables: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Stored tables by name (benchmarks, costs of judges, ...), each with `columns` and `rows`."""
    software: dict[str, str] = field(default_factory=dict)
    """Versions that the masks were made with."""


def read_report_data(storage: Storage, connections: int = 16) -> ReportData:
    """Raises UserError where there is no mask, StorageError."""
    objects = mask_objects(storage)
    if not objects:
        raise UserError(f"{storage.url}: holds no mask to report on")
    sample = _sample(objects)
    columns, errors = _columns(storage), _documents(storage, keys.ERRORS, connections)
    losses, faults = stored_losses(storage), {error["persona_id"]: error["message"] for error in errors}
    tuned = {keys.persona_of(key, keys.RECOVERED): one for key, one in _read(storage, keys.RECOVERED, connections)}
    curves = {key: _thinned(one) for key, one in _read(storage, keys.CURVES, connections)}
    figures: dict[str, PersonaFigures] = {}
    sampled: dict[str, Mask | WeightMask] = {}
    software: dict[str, str] = {}
    for persona_id, mask in _masks(storage, objects, connections):
        figures[persona_id] = PersonaFigures(
            persona_id, mask.metadata.persona_description, _kept(mask), objects[persona_id].size,
            losses.get(persona_id, {}), {}, columns.get(persona_id, {}), faults.get(persona_id, ""),
            _training(mask, tuned.get(persona_id, {})), curves.get(keys.curve(persona_id), {}),
            isinstance(mask, WeightMask),
        )  # fmt: skip
        software |= mask.metadata.versions
        if persona_id in sample:
            sampled[persona_id] = mask
    if not figures:
        raise UserError(f"{storage.url}: none of its {len(objects)} masks verifies; see persona-pruner verify")
    answers = _answers(storage, figures, connections)
    ordered = sorted(figures.values(), key=lambda one: (-one.loss, one.id))
    sampled = _same_shape(sampled)
    shared = count_shared(list(sampled.values())) if len(sampled) > 1 else None
    tables = {key.rpartition("/")[2].removesuffix(".json"): one for key, one in _read(storage, keys.EVALUATION_TABLES)}
    if paid := _rewriter_costs(storage):
        tables["costs"] = {"columns": COST_COLUMNS, "rows": [*tables.get("costs", {}).get("rows", []), *paid]}
    return ReportData(
        storage.url, _document(storage, keys.RUN), _documents(storage, keys.STATUS.removesuffix(".json")), ordered,
        _fitting(answers, ordered), list(sampled), shared, errors, tables, software,
    )  # fmt: skip


def _columns(storage: Storage) -> dict[str, dict[str, Any]]:
    """The catalog's evaluation columns by persona."""
    evaluated = read_evaluation(storage)
    rows = evaluated.to_pylist() if evaluated is not None else []
    return {row.pop("persona_id"): row for row in rows}


def _training(mask: Mask | WeightMask, tuned: Mapping[str, Any]) -> dict[str, Any]:
    header = mask.metadata
    values = {
        "method": header.method, "ratio": header.ratio, "steps": header.steps, "unpruned": header.unpruned_loss,
        "masked": header.masked_loss, "tuned_before": tuned.get("loss_before"), "tuned_after": tuned.get("loss_after"),
    }  # fmt: skip
    return {name: value for name, value in values.items() if value is not None}


def _thinned(curve: Mapping[str, Any]) -> dict[str, list[Any]]:
    """(step, loss), of the training at no more than CURVE_POINTS steps, the last one among them."""
    losses = list(enumerate(curve["training"], 1))
    every = -(-len(losses) // CURVE_POINTS) or 1
    return {"training": losses[::-1][::every][::-1], "heldout": curve["heldout"]}


def _rewriter_costs(storage: Storage) -> list[list[Any]]:
    """By model: requests, prompt tokens, completion tokens."""
    paid: dict[str, list[int]] = {}
    for one in _documents(storage, keys.REWRITER_COSTS):
        paid[one["model"]] = [a + b for a, b in zip(paid.get(one["model"], (0, 0, 0)), one["costs"], strict=True)]
    return [[f"{model} (rewriter)", *costs] for model, costs in sorted(paid.items())]


def read_both(storage: Storage, other: Storage, persona_ids: Sequence[str], connections: int = 16) -> SharedCounts:
    """Of the masks that both outputs have of these personas: all of `storage`'s, then all of the other's.

    Raises UserError where they do not have two of one shape.
    """
    masks = []
    for one in (storage, other):
        objects = mask_objects(one)
        wanted = {name: objects[name] for name in persona_ids if name in objects}
        masks.append(dict(_masks(one, wanted, connections)))
    common = {name: mask for name, mask in masks[0].items() if name in masks[1]}
    first = _same_shape({name: mask for name, mask in common.items() if shape_of(mask) == shape_of(masks[1][name])})
    if len(first) < 2:
        raise UserError(f"{other.url}: has no masks of two personas of {storage.url} in the same shape")
    return count_shared([*first.values(), *(masks[1][name] for name in first)])


def _sample(objects: Mapping[str, ObjectInfo]) -> set[str]:
    """Whose masks are compared."""
    drawn = pooled_sample(list(objects), MAP_PERSONAS)
    totals = itertools.accumulate(objects[name].size for name in drawn)
    return {
        name for number, (name, total) in enumerate(zip(drawn, totals, strict=True)) if number < 2 or total < MAP_BYTES
    }


def _masks(
    storage: Storage, objects: Mapping[str, ObjectInfo], connections: int
) -> Iterator[tuple[str, Mask | WeightMask]]:
    """Masks that verify, in order of their ids, as many at a time as memory takes."""

    def read(entry: tuple[str, ObjectInfo]) -> tuple[str, Mask | WeightMask] | None:
        try:
            return entry[0], read_mask(storage.get(entry[1].key), entry[1].key)
        except (MaskError, StorageError):
            return None

    entries = sorted(objects.items())
    largest = max((item.size for item in objects.values()), default=1)
    block = max(1, min(16 * connections, READ_BYTES // largest))
    with ThreadPoolExecutor(connections) as pool:
        for start in range(0, len(entries), block):
            yield from (one for one in pool.map(read, entries[start : start + block]) if one)


def _kept(mask: Mask | WeightMask) -> float:
    if isinstance(mask, Mask):
        return sum(mask.metadata.kept) / (mask.metadata.layers * mask.metadata.channels)
    matrices = mask.metadata.matrices.values()
    return sum(rows * kept for rows, _, kept in matrices) / sum(rows * columns for rows, columns, _ in matrices)


def _same_shape(masks: Mapping[str, Mask | WeightMask]) -> dict[str, Mask | WeightMask]:
    """Those that can be compared: of the most frequent shape."""
    shapes = {name: shape_of(mask) for name, mask in masks.items()}
    usual = Counter(shapes.values()).most_common(1)
    return {name: mask for name, mask in masks.items() if shapes[name] == usual[0][0]}


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


def _documents(storage: Storage, prefix: str, connections: int = 16) -> list[dict[str, Any]]:
    return [document for _, document in _read(storage, prefix, connections)]


def _read(storage: Storage, prefix: str, connections: int = 16) -> list[tuple[str, dict[str, Any]]]:
    """Key and content of each JSON object below `prefix`."""
    found = [item.key for item in storage.list(prefix)]
    with ThreadPoolExecutor(connections) as pool:
        documents = pool.map(lambda key: _document(storage, key), found)
        return [(key, document) for key, document in zip(found, documents, strict=True) if document]
