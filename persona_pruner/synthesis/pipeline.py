"""The Ray Data pipeline from a manifest to one Parquet file a persona: score, select, rewrite, commit.

A tile is a fixed block of the manifest's personas; it computes its own reference sums and keeps nothing, so a lost
tile is run again. Only what was selected leaves the scoring actor; only ids and counts reach the driver.
"""

import json
import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
import torch
from ray.exceptions import RayTaskError

from persona_pruner.config.schema import RunConfig
from persona_pruner.errors import PersonaError, SourceError, StorageError, UserError
from persona_pruner.manifest import Persona
from persona_pruner.storage import keys
from persona_pruner.storage.base import NotFoundError
from persona_pruner.storage.open import open_storage, read_url
from persona_pruner.synthesis import vllm
from persona_pruner.synthesis.commit import commit
from persona_pruner.synthesis.rewrite import OpenAiRewriter, Rewriter
from persona_pruner.synthesis.scoring_worker import open_backbone
from persona_pruner.synthesis.select import select_questions
from persona_pruner.synthesis.sources import Question, load_questions, normalize_whitespace

LEAST_KEPT = 5
"""Questions that a persona's data keep although nobody was asked: those that reveal it least."""


@dataclass(frozen=True)
class SynthesisResult:
    persona_id: str
    error: tuple[str, str] | None = None
    """(cause, message) where this persona could not be done."""
    counts: dict[str, int] = field(default_factory=dict)
    """Rows by filter outcome."""


@dataclass(frozen=True)
class _Job:
    """What every actor of the pipeline needs."""

    config: RunConfig
    output: str
    personas: dict[str, Persona]
    references: list[Persona]
    questions: list[Question]


def synthesize(
    config: RunConfig,
    personas: Sequence[Persona],
    todo: Collection[str],
    output_url: str,
    references: Sequence[Persona],
) -> Iterator[SynthesisResult]:
    """Synthesize the personas in `todo`; yields each as soon as its data are committed, or it failed.

    `personas` is the whole manifest, which is cut into tiles. Raises SourceError, ManifestError and RewriteError before
    anything starts where the input is bad.
    """
    wanted = set(todo)
    if not wanted:
        return
    questions = load_questions(config.synthesis)
    if len(references) < 2 and not config.synthesis.references.path:
        raise SourceError("one persona alone has no references; set synthesis.references.path to a file of personas")
    size = config.synthesis.tile_personas
    tiles = [personas[i : i + size] for i in range(0, len(personas), size)]
    blocks = [[p for p in tile if p.id in wanted] for tile in tiles]
    blocks = [block for block in blocks if block]
    job = _Job(config, output_url, {}, list(references), questions)
    if config.synthesis.rewrite.backend == "openai":
        OpenAiRewriter(config, open_storage(output_url, config.storage))
    if config.synthesis.rewrite.backend == "vllm":
        vllm.check_vllm()
    yield from _run(job, blocks)


def _run(job: _Job, blocks: list[list[Persona]]) -> Iterator[SynthesisResult]:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # errors come as exceptions, with their trace
    context.target_max_block_size = 1
    rows = [{"personas": json.dumps([[p.id, p.description] for p in block])} for block in blocks]
    actors = job.config.synthesis.actors
    shared = ray.put(job)
    whole = actors.shards == 1  # a group's actors have the resources; who calls them needs none
    data = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        _TileActor,
        fn_constructor_kwargs={"job": [shared]},
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(min_size=min(actors.min, len(rows)), max_size=min(actors.max, len(rows))),
        num_cpus=actors.num_cpus if whole else 0,
        num_gpus=actors.num_gpus if whole else 0,
    )
    if job.config.synthesis.rewrite.backend == "vllm":
        data = _through_engines(data, shared, vllm.engines(job.config))
    elif job.config.synthesis.rewrite.backend == "openai":
        data = data.map_batches(
            _AnswerActor,
            fn_constructor_kwargs={"job": [shared]},
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=1),
            num_cpus=min(0.25, actors.num_cpus),
        )
    try:
        for row in data.iter_rows():
            result = json.loads(row["result"])
            yield SynthesisResult(result["id"], tuple(result["error"]) if result["error"] else None, result["counts"])
    except RayTaskError as error:
        if isinstance(error.cause, UserError):
            error.cause.args = (str(error.cause).splitlines()[0],)  # Ray Data has put its advice below
            raise error.cause from None
        raise


@dataclass(frozen=True)
class _Selected:
    """A persona between scoring and rewriting."""

    persona: Persona
    scored: list[tuple[int, float]]
    """(position in the pool, score) of what was selected."""
    least: list[tuple[int, float]] = field(default_factory=list)
    """The same of the least sensitive questions, which nobody is asked."""
    left_out: int = 0
    """Questions without a score: their prompts are too long."""
    error: PersonaError | None = None

    def to_json(self) -> str:
        error = self.error and (self.error.cause, str(self.error))
        return json.dumps([self.persona.id, self.persona.description, self.scored, self.least, self.left_out, error])

    @classmethod
    def from_json(cls, text: str) -> "_Selected":
        name, description, scored, least, left_out, error = json.loads(text)
        return cls(Persona(name, description), scored, least, left_out, PersonaError(*error) if error else None)


class _TileActor:
    """Has a DeepSpeed-initialized backbone, or leads the actors that hold its shards; scores and selects, and rewrites
    too where the backbone is the voice."""

    def __init__(self, job: list[Any]) -> None:
        self.job: _Job = ray.get(job[0])
        config = self.job.config
        self.storage = open_storage(self.job.output, config.storage)
        texts = [question.text for question in self.job.questions]
        self.fault: UserError | None = None
        try:
            self.backbone = open_backbone(config, texts, self.job.references)
        except UserError as error:
            self.fault = error  # told by the first call: Ray tries an actor that cannot be made again and again

    def __call__(self, batch: dict[str, Any]) -> Iterator[dict[str, list[str]]]:
        if self.fault is not None:
            raise self.fault
        for block in batch["personas"]:
            personas = [Persona(*row) for row in json.loads(block)]
            for persona, scores in self.backbone.tile(personas):
                row = self._select(persona, scores)
                if self.job.config.synthesis.rewrite.backend == "self":
                    yield {"result": [answer_and_commit(self.job, self.storage, self.backbone, row)]}
                else:
                    yield {"selected": [row.to_json()]}

    def _select(self, persona: Persona, scores: torch.Tensor | PersonaError) -> _Selected:
        if isinstance(scores, PersonaError):
            return _Selected(persona, [], error=scores)
        try:
            excluded = evaluation_questions(self.job.config, persona.id)
        except PersonaError as error:
            return _Selected(persona, [], error=error)
        settings = self.job.config.synthesis
        chosen = select_questions(
            settings.select, self.job.questions, scores, excluded, f"{settings.seed}\0{persona.id}"
        )
        taken = set(chosen)
        others = [i for i in scores.argsort(stable=True).tolist() if i not in taken and not scores[i].isnan()]
        scored, least = ([(i, float(scores[i])) for i in part] for part in (chosen, others[:LEAST_KEPT]))
        return _Selected(persona, scored, least, int(scores.isnan().sum()))


class _AnswerActor:
    """Sends what was selected to the rewriting backend."""

    def __init__(self, job: list[Any]) -> None:
        self.job: _Job = ray.get(job[0])
        self.storage = open_storage(self.job.output, self.job.config.storage)
        self.rewriter: Rewriter = OpenAiRewriter(self.job.config, self.storage)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        results = []
        for text in batch["selected"]:
            results.append(answer_and_commit(self.job, self.storage, self.rewriter, _Selected.from_json(text)))
        return {"result": results}


def _through_engines(data: Any, shared: Any, engines: Callable[[Any], Any]) -> Any:
    """Rows of results from rows of `selected`; scoring ends before the engines start, so that they have the GPUs."""

    def asked(row: dict[str, Any]) -> list[dict[str, Any]]:
        job: _Job = ray.get(shared)
        selected = _Selected.from_json(row["selected"])
        questions = [job.questions[i] for i, _ in selected.scored]
        return list(vllm.prompts(job.config, row["selected"], selected.persona, questions))

    def unasked(row: dict[str, Any]) -> bool:
        return not _Selected.from_json(row["selected"]).scored

    def commit(text: str, rows: list[dict[str, Any]]) -> dict[str, str]:
        job: _Job = ray.get(shared)
        selected = _Selected.from_json(text)
        given = vllm.put_together(job.config, len(selected.scored), rows)
        storage = open_storage(job.output, job.config.storage)
        return {"result": answer_and_commit(job, storage, given, selected)}

    def commit_group(group: Any) -> dict[str, list[str]]:
        rows = group.to_pylist()
        return {"result": [commit(rows[0]["selected"], rows)["result"]]}

    data = data.materialize()
    answered = engines(data.flat_map(asked)).groupby("selected").map_groups(commit_group, batch_format="pyarrow")
    return answered.union(data.filter(unasked).map(lambda row: commit(row["selected"], [])))


def answer_and_commit(job: Any, storage: Any, rewriter: Rewriter, selected: _Selected) -> str:
    """Rewrite and store one persona. Returns the result as JSON; a persona's own fault is part of it.

    Raises RewriteError.
    """
    persona = selected.persona
    result: dict[str, Any] = {"id": persona.id, "error": None, "counts": {}}
    try:
        if selected.error is not None:
            raise selected.error
        questions = [job.questions[i] for i, _ in selected.scored]
        answers = rewriter.answers(persona, questions) if questions else []
        scores = [score for _, score in selected.scored]
        least = [(job.questions[i], score) for i, score in selected.least]
        result["counts"] = commit(job.config, storage, persona, questions, scores, answers, rewriter.model, least)
        if selected.left_out:
            result["counts"]["prompt_too_long"] = selected.left_out
        for item in storage.list(keys.stored_answers(persona.id)):
            storage.delete(item.key)
    except PersonaError as error:
        result["error"] = (error.cause, str(error))
    except StorageError as error:
        result["error"] = ("storage", str(error))
    return json.dumps(result)


def evaluation_questions(config: RunConfig, persona_id: str) -> set[str]:
    """Folded questions that must not enter this persona's data, from `evaluation.questions`. Raises PersonaError."""
    directory = config.evaluation.questions
    if directory is None:
        return set()
    for name in (f"{persona_id}.json", f"{persona_id}.txt"):
        where = f"{directory}/{name}"
        try:
            text = read_url(where, config.storage).decode("utf-8")
            value = json.loads(text) if name.endswith(".json") else text.splitlines()
        except NotFoundError:
            continue
        except (StorageError, ValueError) as error:
            raise PersonaError("evaluation_questions", f"{where}: not readable: {error}") from None
        found = value.get("questions", []) if isinstance(value, dict) else value
        return {normalize_whitespace(question) for question in found if isinstance(question, str)}
    return set()
