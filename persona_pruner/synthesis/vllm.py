"""The rewriting backend `vllm`: answers from engines that Ray Data keeps on the cluster (`ray.data.llm`).

One row a prompt goes through the engines; what belongs to a persona is put together behind them, so its data are
committed once all personas are answered, unlike with the other backends.
"""

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from persona_pruner.config.schema import RunConfig
from persona_pruner.errors import SourceError
from persona_pruner.manifest import Persona
from persona_pruner.synthesis.commit import Answer
from persona_pruner.synthesis.rewrite import messages
from persona_pruner.synthesis.sources import Question


def check_vllm() -> None:
    """Raise SourceError where vllm cannot be imported."""
    if importlib.util.find_spec("vllm") is None:
        raise SourceError("synthesis.rewrite.backend = vllm: the package vllm is not installed; use openai or self")


class PrecomputedAnswers:
    """A rewriter (see `Rewriter`) of answers that are there already."""

    def __init__(self, model: str, answers: list[list[Answer]]) -> None:
        self.model, self._answers = model, answers

    def answers(self, persona: Persona, questions: Sequence[Question]) -> list[list[Answer]]:
        return self._answers


def engines(config: RunConfig) -> Callable[[Any], Any]:
    """The Ray Data processor: rows of `prompts` in, the same with `text` and `finished` out."""
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    settings, actors = config.synthesis.rewrite, config.synthesis.actors
    engine = vLLMEngineProcessorConfig(
        model_source=settings.model or config.backbone.path,
        batch_size=settings.batch_size,
        concurrency=(actors.min, actors.max),
        should_continue_on_error=True,
    )
    return build_processor(engine, preprocess=partial(request, config), postprocess=partial(reply, config))


def prompts(config: RunConfig, selected: str, persona: Persona, questions: Sequence[Question]) -> Iterator[Any]:
    """One row for each answer that is wanted; `selected` names the persona and what was selected for it."""
    for place, question in enumerate(questions):
        for sample in range(config.synthesis.rewrite.samples_per_question):
            yield {
                "selected": selected,
                "place": place,
                "sample": sample,
                "messages": messages(config, persona, question),
            }


def request(config: RunConfig, row: dict[str, Any]) -> dict[str, Any]:
    settings = config.synthesis.rewrite
    sampling = {
        "temperature": settings.temperature,
        "max_tokens": settings.max_new_tokens,
        "seed": config.synthesis.seed + row["sample"],
    }
    return row | {"sampling_params": sampling}


def reply(config: RunConfig, row: dict[str, Any]) -> dict[str, Any]:
    finished = row["num_generated_tokens"] < config.synthesis.rewrite.max_new_tokens
    kept = {name: row[name] for name in ("selected", "place", "sample")}
    return kept | {"text": row["generated_text"].strip(), "finished": finished}


def put_together(config: RunConfig, questions: int, rows: Sequence[dict[str, Any]]) -> PrecomputedAnswers:
    """Answers of one persona in order of its questions; what an engine failed at counts as an empty answer."""
    settings = config.synthesis.rewrite
    found = {(row["place"], row["sample"]): Answer(row.get("text") or "", bool(row.get("finished"))) for row in rows}
    samples = range(settings.samples_per_question)
    answers = [[found.get((place, sample), Answer("", True)) for sample in samples] for place in range(questions)]
    return PrecomputedAnswers(settings.model or config.backbone.path, answers)
