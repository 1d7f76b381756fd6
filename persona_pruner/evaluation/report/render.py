"""One HTML file that opens without a network: figures as tables, charts by Vega inlined, personas found by typing."""

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined

from persona_pruner.errors import UserError
from persona_pruner.evaluation.report.data import PersonaFigures, ReportData, read_report_data
from persona_pruner.evaluation.statistics import Estimate, Headline, headline, mean_estimate
from persona_pruner.storage import keys
from persona_pruner.storage.base import Storage

BASELINES = ("global", "activation", "magnitude", "random")
TEXTS = {
    "conversations": "real conversations of the personas",
    "answers": "held-out questions answered in their voice",
    "conversations, persona tokens": "the same conversations, only the tokens that the description decides",
    "answers, persona tokens": "the same answers, only the tokens that the description decides",
}
MEASURES = {
    "first": "in character: own description ranks first",
    "rank": "rank of the own description",
    "own_loss": "loss of the answer under its own prompt, unpruned (nats per token)",
    "similarity": "similarity to the unpruned answer",
    "ended": "answers that end",
    "words": "words",
    "repetition": "repeated 4-grams",
    "distinct_2": "distinct-2",
    "judge_consistency": "judge: consistency (0 to 100)",
    "judge_coherence": "judge: coherence (0 to 100)",
    "preferred": "judge: pairs that the own mask's answer wins against this arm",
}


def write_report(storage: Storage, connections: int = 16) -> str:
    """Make the report from what is stored, and store it. Returns its key. Raises UserError, StorageError."""
    storage.put(keys.REPORT, render(read_report_data(storage, connections)).encode())
    return keys.REPORT


def render(data: ReportData) -> str:
    """The page. Raises UserError where the extra `report` is not installed."""
    try:
        import scipy  # noqa: F401
        import vl_convert

        from persona_pruner.evaluation.report import charts
    except ImportError as error:
        raise UserError(f"a report needs {error.name}: pip install 'persona-pruner[report]'") from None
    template = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).from_string((files(__package__) / "report.html.jinja").read_text(encoding="utf-8"))
    bundle: Any = vl_convert.javascript_bundle
    losses = _losses(data.personas)
    measures = _measures(data.personas)
    masks = _masks(data, charts)
    specs = masks.pop("charts")
    for text, by_method in losses.items():
        specs[f"losses-{text}"] = charts.comparison({text: by_method}, "nats per token")
        specs[f"distribution-{text}"] = charts.distribution(data.personas, text)
    return template.render(
        data=data, losses=losses, measures=measures, measure_names=MEASURES, texts=TEXTS, masks=masks,
        headlines=_headlines(data.personas), settings=_settings(data.run), phases=_phases(data.status),
        worst=[one for one in data.personas if one.loss > float("-inf")][:12], kept=_kept(data.personas),
        vega=bundle(), specs=_script_json(specs), payload=_script_json(_payload(data)),
    )  # fmt: skip


def _losses(personas: Sequence[PersonaFigures]) -> dict[str, dict[str, Estimate]]:
    """Mean losses by text and method, of the personas that have that text."""
    estimates: dict[str, dict[str, Estimate]] = {}
    for text in TEXTS:
        rows = [one.losses[text] for one in personas if text in one.losses]
        methods = [name for name in (rows[0] if rows else ()) if all(name in row for row in rows)]
        if rows:
            estimates[text] = {name: mean_estimate([row[name] for row in rows]) for name in methods}
    return estimates


def _measures(personas: Sequence[PersonaFigures]) -> dict[str, dict[str, Estimate]]:
    """Means of the answers' measures, by measure and arm."""
    estimates: dict[str, dict[str, Estimate]] = {}
    for name in MEASURES:
        by_arm: dict[str, list[float]] = {}
        for one in personas:
            for arm, values in one.measures.items():
                if (value := values.get(name)) is not None:
                    by_arm.setdefault(arm, []).append(value)
        if by_arm:
            estimates[name] = {arm: mean_estimate(values) for arm, values in by_arm.items()}
    return estimates


def _headlines(personas: Sequence[PersonaFigures]) -> list[tuple[str, Headline]]:
    """Of judges where there are any, and of losses."""
    found = []
    for name in ("judge_consistency", "judge_coherence", "first"):
        rows = [{arm: values.get(name) for arm, values in one.measures.items()} for one in personas if one.measures]
        complete = [row for row in rows if all(value is not None for value in row.values())]
        one = headline(complete, ("global", "baseline"), higher_is_better=True) if complete else None  # type: ignore[arg-type]
        if one is not None:
            found.append((MEASURES[name], one))
    for text, title in TEXTS.items():
        one = headline(
            [person.losses[text] for person in personas if text in person.losses], BASELINES, higher_is_better=False
        )
        if one is not None:
            found.append((f"loss on {title}", one))
    return found


def _masks(data: ReportData, charts: Any) -> dict[str, Any]:
    """Figures and charts of what masks share; empty with fewer than two that can be compared."""
    if len(data.sample) < 2:
        return {"charts": {}}
    from persona_pruner.evaluation.overlap import overlap

    by_id = {one.id: one for one in data.personas}
    shared = overlap(data.keep_PLI, [by_id[name].description for name in data.sample])
    losses = {name: by_id[name].loss for name in data.sample}
    return {
        "charts": {
            "heat": charts.heat_map(shared, data.sample),
            "map": charts.persona_map(shared, data.sample, losses),
            "layers": charts.layers(shared, data.keep_PLI.mean((0, 2))),
        },
        "personas": len(data.sample),
        "common": shared.common,
        "descriptions": shared.descriptions,
        "clusters": int(shared.cluster_P.max()),
    }


def _kept(personas: Sequence[PersonaFigures]) -> dict[str, float]:
    return {
        "channels": sum(one.kept for one in personas) / len(personas),
        "bytes": sum(one.bytes for one in personas) / len(personas),
        "total": sum(one.bytes for one in personas),
    }


def _settings(run: Mapping[str, Any]) -> dict[str, str]:
    """What whoever reads a report asks first, of run.json."""
    if not run:
        return {}
    settings = run.get("settings", {})
    learning, synthesis = settings.get("learning", {}), settings.get("synthesis", {})
    rewrite = synthesis.get("rewrite", {})
    backbone = run.get("backbone", {})
    values = {
        "run": run.get("run_id"), "backbone": backbone.get("name"), "fingerprint": backbone.get("fingerprint", "")[:16],
        "dtype": settings.get("backbone", {}).get("dtype"), "ratio": learning.get("ratio"),
        "steps": learning.get("steps"), "start": learning.get("init"), "optimizer": learning.get("optimizer"),
        "budget": learning.get("budget"), "answers by": rewrite.get("model") or rewrite.get("backend"),
        "questions selected": synthesis.get("select", {}).get("k"), "seed": learning.get("seed"),
    }  # fmt: skip
    return {name: str(value) for name, value in values.items() if value not in (None, "")}


def _phases(status: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [phase for phase in status.get("phases", []) if phase.get("total")]


def _payload(data: ReportData) -> list[dict[str, Any]]:
    """What the page knows of each persona; rounded, since it is read by people."""
    return [
        {
            "id": one.id, "description": one.description[:1200], "kept": round(one.kept, 4), "bytes": one.bytes,
            "losses": {text: _rounded(values) for text, values in one.losses.items()},
            "measures": {arm: _rounded(values) for arm, values in one.measures.items()},
            "error": one.error, "answers": data.answers.get(one.id, []),
        }
        for one in data.personas
    ]  # fmt: skip


def _rounded(values: Mapping[str, float | None]) -> dict[str, float]:
    return {name: round(value, 3) for name, value in values.items() if value is not None}


def _script_json(value: Any) -> str:
    """JSON that cannot end the script element that it stands in."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
