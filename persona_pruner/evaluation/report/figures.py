"""The figures of a report, which its page and the model card say alike: means, headlines, benchmarks, what is kept."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from persona_pruner.evaluation.report.data import PersonaFigures, ReportData
from persona_pruner.evaluation.statistics import Estimate, Headline, headline, mean_estimate
from persona_pruner.evaluation.subject import ARMS
from persona_pruner.evaluation.summary import Measures

BASELINES = ("global", "activation", "magnitude", "random")
# Of lm-eval's metrics.
LOWER_IS_BETTER = {"perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte", "brier_score", "ter"}
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


@dataclass(frozen=True)
class Benchmark:
    """A task's metric before and after: unpruned, and under the masks that it was run with."""

    task: str
    metric: str
    questions: int
    unpruned: float | None
    error: float | None
    """Standard error of `unpruned` over questions, where lm-eval gives one."""
    masked: Estimate
    worst: str
    """Persona with the worst value."""
    rivals: dict[str, float]
    """By arm: one mask for all, baselines."""


@dataclass(frozen=True)
class Figures:
    losses: dict[str, dict[str, Estimate]]
    """Mean losses by text and method, of the personas that have that text; nats per token."""
    measures: dict[str, dict[str, Estimate]]
    """Means of the answers' measures, by measure and arm."""
    differences: dict[str, dict[str, Estimate]]
    """By measure and arm: the own mask's figure minus the arm's, paired over the personas that have both."""
    headlines: list[tuple[str, Headline]]
    """By what was measured."""
    benchmarks: list[Benchmark]
    settings: dict[str, str]
    kept: float
    """Share of the FFN channels (or weights) that masks keep."""
    mask_bytes: float
    total_bytes: int


def figures_of(data: ReportData) -> Figures:
    personas = data.personas
    return Figures(
        losses=_losses(personas),
        measures=_measures(personas),
        differences=_differences(personas),
        headlines=_headlines(personas),
        benchmarks=_benchmarks(data.tables.get("benchmarks", {})),
        settings=_settings(data.run),
        kept=sum(one.kept for one in personas) / len(personas),
        mask_bytes=sum(one.bytes for one in personas) / len(personas),
        total_bytes=sum(one.bytes for one in personas),
    )


def _losses(personas: Sequence[PersonaFigures]) -> dict[str, dict[str, Estimate]]:
    estimates: dict[str, dict[str, Estimate]] = {}
    for text in TEXTS:
        rows = [one.losses[text] for one in personas if text in one.losses]
        methods = [name for name in (rows[0] if rows else ()) if all(name in row for row in rows)]
        if rows:
            estimates[text] = {name: mean_estimate([row[name] for row in rows]) for name in methods}
    return estimates


def _measures(personas: Sequence[PersonaFigures]) -> dict[str, dict[str, Estimate]]:
    return _means_by_arm([one.measures for one in personas])


def _differences(personas: Sequence[PersonaFigures]) -> dict[str, dict[str, Estimate]]:
    return _means_by_arm([_own_minus_others(one.measures) for one in personas])


def _own_minus_others(measures: Measures) -> Measures:
    own = measures.get("own", {})
    return {
        arm: {
            name: own_value - value
            for name, value in values.items()
            if value is not None and (own_value := own.get(name)) is not None
        }
        for arm, values in measures.items()
        if arm != "own"
    }


def _means_by_arm(measures: Sequence[Measures]) -> dict[str, dict[str, Estimate]]:
    """`measures`: of one persona each."""
    estimates: dict[str, dict[str, Estimate]] = {}
    for name in MEASURES:
        by_arm: dict[str, list[float]] = {}
        for one in measures:
            for arm, values in one.items():
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
        baselines = [arm for arm in (complete[0] if complete else ()) if arm not in ("unpruned", "own", "other")]
        one = headline(complete, baselines, higher_is_better=True)  # type: ignore[arg-type]
        if one is not None:
            found.append((MEASURES[name], one))
    for text, title in TEXTS.items():
        one = headline(
            [person.losses[text] for person in personas if text in person.losses], BASELINES, higher_is_better=False
        )
        if one is not None:
            found.append((f"loss on {title}", one))
    return found


def _benchmarks(document: Mapping[str, Any]) -> list[Benchmark]:
    """Of the table that `persona-pruner benchmark` has stored."""
    by_task: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for cells in document.get("rows", ()):
        row = dict(zip(document["columns"], cells, strict=False))
        by_task.setdefault((row["task"], row["metric"]), {})[row["arm"]] = row
    found = []
    for (task, metric), arms in by_task.items():
        unpruned = arms.pop("unpruned", None)
        rivals = {arm: arms.pop(arm)["value"] for arm in ARMS if arm in arms}
        if arms:
            pick = max if metric in LOWER_IS_BETTER else min
            worst = pick(arms, key=lambda arm: arms[arm]["value"])
            masked = mean_estimate([row["value"] for row in arms.values()])
            before, error = (unpruned["value"], unpruned["standard error"]) if unpruned else (None, None)
            found.append(Benchmark(task, metric, arms[worst]["questions"], before, error, masked, worst, rivals))
    return found


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
        "dtype": settings.get("backbone", {}).get("dtype"), "method": learning.get("method"),
        "ratio": learning.get("ratio"), "steps": learning.get("steps"), "start": learning.get("init"),
        "optimizer": learning.get("optimizer"), "budget": learning.get("budget"),
        "answers by": rewrite.get("model") or rewrite.get("backend"),
        "questions selected": synthesis.get("select", {}).get("k"), "seed": learning.get("seed"),
    }  # fmt: skip
    return {name: str(value) for name, value in values.items() if value not in (None, "")}
