"""One HTML file that opens without a network: figures as tables, charts by Vega inlined, personas found by typing."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined

from persona_pruner.errors import UserError
from persona_pruner.evaluation.overlap import (
    Overlap,
    SeedAgreement,
    across_seeds,
    description_similarity,
    embedding_similarity,
    overlap,
)
from persona_pruner.evaluation.report.data import ReportData, read_both, read_report_data
from persona_pruner.evaluation.report.efficiency import BackboneCosts, EfficiencyRow, backbone_costs, efficiency_rows
from persona_pruner.evaluation.report.figures import MEASURES, TEXTS, figures_of
from persona_pruner.evaluation.subject import ARMS
from persona_pruner.storage import keys
from persona_pruner.storage.base import Storage

TURN_TITLES = {
    "judge_consistency": "judge: consistency (0 to 100)",
    "judge_coherence": "judge: coherence (0 to 100)",
    "first": "in character: own description ranks first",
    "own_loss": "loss of the reply (nats per token)",
    "repetition": "4-grams that the speaker has said before",
}
"""Measures of conversations that are plotted over their turns."""
ABILITY_TITLES = {
    "json": "JSON that its schema takes",
    "tool": "the right tool call",
    "injection": "injections resisted",
    "injection_first": "own description first after an injection",
}
PLACED = ("benchmarks", "turns", "abilities")
"""Tables that have a place of their own; others are shown as they are."""


@dataclass(frozen=True)
class ReportOptions:
    """What a report may look at beside the output."""

    seeds: Storage | None = None
    """An output of the same personas, run with another seed."""
    embeddings: str | None = None
    """A transformers model that embeds descriptions; without one their words are compared."""
    backbone: str | None = None
    """The backbone, whose configuration says how many parameters and FLOPs there are."""


@dataclass(frozen=True)
class Aside:
    """What was looked up beside the output, as ReportOptions say."""

    seeds: SeedAgreement | None = None
    embeddings: str | None = None
    costs: BackboneCosts | None = None


def write_report(storage: Storage, options: ReportOptions = ReportOptions(), connections: int = 16) -> str:
    """Make the report from what is stored, and store it. Returns its key. Raises UserError, StorageError."""
    costs = backbone_costs(options.backbone) if options.backbone else None
    data = read_report_data(storage, connections)
    seeds = None
    if options.seeds is not None:
        seeds = across_seeds(read_both(storage, options.seeds, data.sample, connections))
    storage.put(keys.REPORT, render(data, Aside(seeds, options.embeddings, costs)).encode())
    return keys.REPORT


def render(data: ReportData, aside: Aside = Aside()) -> str:
    """The page. Raises UserError where the extra `report` is not installed, or `embeddings` is no model."""
    try:
        import scipy  # noqa: F401
        import vl_convert

        from persona_pruner.evaluation.report import charts
    except ImportError as error:
        raise UserError(f"a report needs {error.name}: pip install 'persona-pruner[report]'") from None
    template = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).from_string((files(__package__) / "report.html.jinja").read_text(encoding="utf-8"))
    template.globals["figure"] = figure
    bundle: Any = vl_convert.javascript_bundle
    figures = figures_of(data)
    masks = _masks(data, charts, aside.embeddings)
    specs = masks.pop("charts")
    for text, by_method in figures.losses.items():
        specs[f"losses-{text}"] = charts.comparison({text: by_method}, "nats per token")
        specs[f"distribution-{text}"] = charts.distribution(data.personas, text)
    if any(one.curve for one in data.personas):
        specs["curve"] = charts.curve()
    turns = _turns(data.tables.get("turns", {}))
    for name in turns:
        specs[f"turns-{name}"] = charts.turns(data.tables["turns"], name)
    return template.render(
        data=data, seeds=aside.seeds, figures=figures, measure_names=MEASURES, texts=TEXTS, masks=masks, turns=turns,
        abilities=_abilities(data.tables.get("abilities", {})), efficiency=_efficiency(data, aside.costs),
        causes=Counter(error.get("cause", "") for error in data.errors),
        others={name: one for name, one in data.tables.items() if name not in PLACED and one.get("rows")},
        weights=any(one.of_weights for one in data.personas),
        worst=[one for one in data.personas if one.loss > float("-inf")][:12],
        vega=bundle(), specs=_script_json(specs), payload=_script_json(_payload(data)),
    )  # fmt: skip


def figure(value: float) -> str:
    """For people: 1,234 or 0.123, and 1.23 M or 4.56 G above a million."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if abs(value) >= size:
            return f"{value / size:.2f} {unit}"
    if value == int(value) or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}"


def _turns(table: Mapping[str, Any]) -> dict[str, str]:
    """Title of each measure that the conversations have."""
    at = {name: number for number, name in enumerate(table.get("columns", ()))}
    return {
        name: title
        for name, title in TURN_TITLES.items()
        if name in at and any(row[at[name]] is not None for row in table["rows"])
    }


def _abilities(table: Mapping[str, Any]) -> dict[str, Any]:
    """The table of abilities with its arms side by side; empty where nobody was asked."""
    shares = {(ability, arm): share for ability, arm, _, share in table.get("rows", ())}
    arms = [arm for arm in ARMS if any(arm == asked for _, asked in shares)]
    rows = [
        [title, *(shares.get((ability, arm)) for arm in arms)]
        for ability, title in ABILITY_TITLES.items()
        if any(ability == asked for asked, _ in shares)
    ]
    return {"columns": ["tasks", *arms], "rows": rows} if rows else {}


def _efficiency(data: ReportData, costs: BackboneCosts | None) -> list[EfficiencyRow]:
    channels = [one for one in data.personas if not one.of_weights]
    if costs is None or not channels:
        return []
    return efficiency_rows(costs, [one.kept for one in channels], [one.bytes for one in channels])


def _masks(data: ReportData, charts: Any, embeddings: str | None) -> dict[str, Any]:
    """Figures and charts of what masks share; no more than no charts with fewer than two that can be compared."""
    if data.shared is None:
        return {"charts": {}}
    by_id = {one.id: one for one in data.personas}
    descriptions = [by_id[name].description for name in data.sample]
    similarity = embedding_similarity(descriptions, embeddings) if embeddings else description_similarity(descriptions)
    shared = overlap(data.shared, similarity)
    losses = {name: by_id[name].loss for name in data.sample}
    return {
        "charts": {
            "heat": charts.heat_map(shared, data.sample),
            "map": charts.persona_map(shared, data.sample, losses),
            "layers": charts.layers(shared),
        },
        "personas": len(data.sample),
        "common": shared.common,
        "descriptions": shared.descriptions,
        "compared": f"their embeddings by {embeddings}" if embeddings else "their words (TF-IDF)",
        "silhouette": shared.silhouette,
        "clusters": _clusters(shared, data.sample),
        "kinds": {
            kind: (float(values.mean()), int(values.argmax()), float(values.max()))
            for kind, values in shared.distances.items()
        },
    }


def _clusters(shared: Overlap, names: Sequence[str]) -> list[dict[str, Any]]:
    """Largest first, each with the personas that share most with the others of it in front."""
    clusters = []
    for number in sorted(set(shared.cluster_P.tolist())):
        members = np.flatnonzero(shared.cluster_P == number)
        inside = shared.jaccard_PP[np.ix_(members, members)]
        others = len(members) - 1
        mean_P = (inside.sum(1) - 1) / max(others, 1)
        ordered = [names[members[at]] for at in np.argsort(-mean_P, kind="stable")]
        clusters.append({"personas": ordered, "overlap": float(mean_P.mean()) if others else None})
    return sorted(clusters, key=lambda one: -len(one["personas"]))


def _payload(data: ReportData) -> list[dict[str, Any]]:
    """What the page knows of each persona; rounded, since it is read by people."""
    return [
        {
            "id": one.id, "description": one.description[:1200], "kept": round(one.kept, 4), "bytes": one.bytes,
            "losses": {text: _rounded(values) for text, values in one.losses.items()},
            "measures": {arm: _rounded(values) for arm, values in one.measures.items()},
            "error": one.error, "training": _rounded(one.training), "answers": data.answers.get(one.id, []),
            "curve": {kind: [(step, round(loss, 3)) for step, loss in points] for kind, points in one.curve.items()},
        }
        for one in data.personas
    ]  # fmt: skip


def _rounded(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: round(value, 3) if isinstance(value, float) else value
        for name, value in values.items()
        if value is not None
    }


def _script_json(value: Any) -> str:
    """JSON that cannot end the script element that it stands in."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
