"""Ray Data glue from a manifest to one Parquet file a persona: score, select, rewrite, commit.

A tile is a block of personas; it computes its own reference sums and keeps nothing, so a failed tile is recomputed, and
scores do not depend on who shares a tile. What was selected for a persona goes on to its answers at once, and Ray Data
holds the scoring back where the answering cannot follow. Only ids and counts reach the driver.
"""

import json
import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayTaskError
from transformers import AutoTokenizer

from persona_pruner.backbone.load import resolve
from persona_pruner.config.schema import RunConfig
from persona_pruner.errors import SourceError, UserError
from persona_pruner.manifest import Persona
from persona_pruner.storage.open import open_storage
from persona_pruner.synthesis.answering import SynthesisResult, answer_and_commit
from persona_pruner.synthesis.rewrite.base import Rewriter
from persona_pruner.synthesis.rewrite.openai import OpenAiRewriter
from persona_pruner.synthesis.rewrite.original import OriginalAnswers
from persona_pruner.synthesis.rewrite.vllm import VllmRewriter, check_vllm
from persona_pruner.synthesis.scoring_worker import open_backbone
from persona_pruner.synthesis.selection import Selection, score_and_select
from persona_pruner.synthesis.sources import Question, load_question_set

FIRST_TILE = 8
"""The first tile is so many times smaller; tiles of fewer personas are small anyway."""


@dataclass(frozen=True)
class Inputs:
    """What every actor of the pipeline needs, shared through Ray's object store."""

    config: RunConfig
    output: str
    references: list[Persona]
    question_set: list[Question]


def read_inputs(config: RunConfig, output_url: str, references: Sequence[Persona]) -> Inputs:
    """Raises SourceError."""
    if len(references) < 2 and not config.synthesis.references.path:
        raise SourceError("one persona alone has no references; set synthesis.references.path to a file of personas")
    return Inputs(config, output_url, list(references), load_question_set(config.synthesis))


def tiles_of(personas: Sequence[Persona], config: RunConfig, workers: int) -> list[Sequence[Persona]]:
    """Tiles of `synthesis.tile_personas`, smaller ones where some of the workers would have none. The first one is
    smaller too, so that the first masks need not wait for the data of a whole tile."""
    size = max(1, min(config.synthesis.tile_personas, -(-len(personas) // workers)))
    first = size // FIRST_TILE or size
    tiles = [personas[:first], *(personas[i : i + size] for i in range(first, len(personas), size))]
    return [tile for tile in tiles if tile]


def synthesize(
    config: RunConfig,
    personas: Sequence[Persona],
    todo: Collection[str],
    output_url: str,
    references: Sequence[Persona],
) -> Iterator[SynthesisResult]:
    """Synthesize those of `personas` whose ids are in `todo`; yields each as soon as its data are committed, or it
    failed. Raises SourceError, EndpointError and RewriteError before anything starts where the input is bad."""
    missing = set(todo)
    if not missing:
        return
    inputs = read_inputs(config, output_url, references)
    tiles = tiles_of([p for p in personas if p.id in missing], config, config.synthesis.actors.max)
    if config.synthesis.rewrite.backend == "openai":
        OpenAiRewriter(config, open_storage(output_url, config.storage))
    if config.synthesis.rewrite.backend == "vllm":
        check_vllm()
    yield from _run(inputs, tiles)


def _run(inputs: Inputs, tiles: Sequence[Sequence[Persona]]) -> Iterator[SynthesisResult]:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # errors come as exceptions, with their trace
    context.target_max_block_size = 1
    rows = [{"tile": json.dumps([[p.id, p.description] for p in tile])} for tile in tiles]
    data = _stages(ray.data.from_items(rows, override_num_blocks=len(rows)), inputs, len(rows))
    try:
        for row in data.iter_rows():
            yield SynthesisResult.from_json(row["result"])
    except RayTaskError as error:
        if isinstance(error.cause, UserError):
            error.cause.args = (str(error.cause).splitlines()[0],)  # Ray Data has put its advice below
            raise error.cause from None
        raise


def _stages(data: Any, inputs: Inputs, tiles: int) -> Any:
    """The dataset of results from that of tiles."""
    settings, actors = inputs.config.synthesis.rewrite, inputs.config.synthesis.actors
    shared = [ray.put(inputs)]
    one_process = actors.shards == 1  # the actors of a group have the resources; who calls them needs none
    data = data.map_batches(
        _TileActor,
        fn_constructor_kwargs={"inputs": shared},
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(min_size=min(actors.min, tiles), max_size=min(actors.max, tiles)),
        num_cpus=actors.num_cpus if one_process else 0,
        num_gpus=actors.num_gpus if one_process else 0,
    )
    if settings.backend == "openai":
        return data.map_batches(
            _AnswerActor,
            fn_constructor_kwargs={"inputs": shared},
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=1),
            num_cpus=min(0.25, actors.num_cpus),
        )
    if settings.backend == "vllm":
        engines = settings.engines
        return data.map_batches(
            _AnswerActor,
            fn_constructor_kwargs={"inputs": shared},
            batch_size=settings.personas_together,
            compute=ray.data.ActorPoolStrategy(min_size=engines.min, max_size=engines.max),
            num_cpus=engines.num_cpus,
            num_gpus=engines.num_gpus,
        )
    return data


def token_counter(config: RunConfig) -> Callable[[str], int]:
    """Tokens of an answer as the backbone reads it."""
    if not config.synthesis.answer_tokens:
        return lambda text: 0
    trusted = config.backbone.trust_remote_code
    tokenizer = AutoTokenizer.from_pretrained(resolve(config.backbone), trust_remote_code=trusted)
    return lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"])


class _TileActor:
    """Has a DeepSpeed-initialized backbone, or leads the actors that hold its shards; scores and selects, and answers
    too where no other model is asked."""

    def __init__(self, inputs: list[Any]) -> None:
        self.inputs: Inputs = ray.get(inputs[0])
        config = self.inputs.config
        texts = [question.text for question in self.inputs.question_set]
        self.fault: UserError | None = None  # told by the first call: Ray retries a constructor that raises
        try:
            self.backbone = open_backbone(config, texts, self.inputs.references)
            own: Rewriter = OriginalAnswers() if config.synthesis.rewrite.backend == "none" else self.backbone
            self.answering = Answering(self.inputs, own)
        except UserError as error:
            self.fault = error

    def __call__(self, batch: dict[str, Any]) -> Iterator[dict[str, list[str]]]:
        if self.fault is not None:
            raise self.fault
        config = self.inputs.config
        for tile in batch["tile"]:
            personas = [Persona(*row) for row in json.loads(tile)]
            selections = score_and_select(config, self.backbone, self.inputs.question_set, personas)
            if config.synthesis.rewrite.backend in ("self", "none"):
                for result in self.answering(list(selections)):
                    yield {"result": [result.to_json()]}
            else:
                for selection in selections:
                    yield {"selection": [selection.to_json()]}


class _AnswerActor:
    """Sends what was selected to the rewriting model."""

    def __init__(self, inputs: list[Any]) -> None:
        shared: Inputs = ray.get(inputs[0])
        self.fault: UserError | None = None
        try:
            self.answering = Answering(shared, self._rewriter(shared))
        except UserError as error:
            self.fault = error

    def _rewriter(self, inputs: Inputs) -> Rewriter:
        if inputs.config.synthesis.rewrite.backend == "vllm":
            return VllmRewriter(inputs.config)
        return OpenAiRewriter(inputs.config, open_storage(inputs.output, inputs.config.storage))

    def __call__(self, batch: dict[str, Any]) -> Iterator[dict[str, list[str]]]:
        if self.fault is not None:
            raise self.fault
        for result in self.answering([Selection.from_json(text) for text in batch["selection"]]):
            yield {"result": [result.to_json()]}


class Answering:
    """`answer_and_commit` with what an actor keeps for it."""

    def __init__(self, inputs: Inputs, rewriter: Rewriter) -> None:
        self.inputs, self.rewriter = inputs, rewriter
        self.storage = open_storage(inputs.output, inputs.config.storage)
        self.count_tokens = token_counter(inputs.config)
        together = inputs.config.synthesis.rewrite.personas_together
        self.together = 1 if inputs.config.synthesis.rewrite.backend == "openai" else together

    def __call__(self, selections: Sequence[Selection]) -> Iterator[SynthesisResult]:
        for start in range(0, len(selections), self.together):
            yield from answer_and_commit(
                self.inputs.config,
                self.storage,
                self.rewriter,
                self.inputs.question_set,
                selections[start : start + self.together],
                self.count_tokens,
            )
