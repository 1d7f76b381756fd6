"""The model card of an output's masks: Hugging Face's metadata, and the report's figures as Markdown."""

import re
from collections.abc import Sequence
from importlib.resources import files

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, StrictUndefined

from persona_pruner.errors import UserError
from persona_pruner.evaluation.report.data import ReportData
from persona_pruner.evaluation.report.figures import MEASURES, TEXTS, Figures, figures_of

HUB = "hf://"
TITLE = "Persona masks"


def model_card(data: ReportData, *, to: str, base_model: str | None = None, checkpoints: Sequence[str] = ()) -> str:
    """README.md. `to` is where it will lie (hf://owner/name, s3://bucket/prefix or a directory), `base_model` the
    backbone's name on the hub, `checkpoints` the personas whose exported models lie beside it. Raises UserError where
    the extra `report` is not installed."""
    try:
        figures = figures_of(data)
    except ImportError as error:
        raise UserError(f"a model card needs {error.name}: pip install 'persona-pruner[report]'") from None
    template = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True).from_string(
        (files(__package__) / "card.md.jinja").read_text(encoding="utf-8")
    )
    repository = to.removeprefix(HUB) if to.startswith(HUB) else ""
    text = template.render(
        title=TITLE, figures=figures, to=to, repository=repository, personas=len(data.personas), texts=TEXTS,
        measure_names=MEASURES, example=min(one.id for one in data.personas), checkpoints=checkpoints,
        failed=len(data.errors),
    )  # fmt: skip
    results = list(_results(figures))
    metadata = ModelCardData(
        base_model=base_model, library_name="persona-pruner", pipeline_tag="text-generation",
        tags=["persona", "pruning", "structured-pruning", "role-play"], model_name=TITLE if results else None,
        eval_results=results or None,
    )  # fmt: skip
    body = re.sub(r"\n{3,}", "\n\n", text).strip()
    return str(ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{body}\n"))


def _results(figures: Figures) -> list[EvalResult]:
    """What the own masks (of benchmarks, all masks that were run) come to, in the form of a model index."""
    found = []
    for text, methods in figures.losses.items():
        if "own" in methods:
            found.append(
                _result("persona-pruner", TEXTS[text], "cross_entropy", "nats per token", methods["own"].value)
            )
    for name, arms in figures.measures.items():
        if "own" in arms:
            found.append(
                _result("persona-pruner/questions", "held-out questions", name, MEASURES[name], arms["own"].value)
            )
    for one in figures.benchmarks:
        found.append(_result(one.task, one.task, one.metric, f"{one.metric}, mean over masks", one.masked.value))
    return found


def _result(dataset: str, title: str, metric: str, name: str, value: float) -> EvalResult:
    return EvalResult(
        task_type="text-generation", dataset_type=dataset, dataset_name=title, metric_type=metric, metric_name=name,
        metric_value=round(value, 4),
    )  # fmt: skip
