"""The evaluation of an output's masks: ask, measure, summarize. What is stored already is not done again."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from functools import partial
from typing import Any

import pyarrow as pa

from persona_pruner.backbone.files import fingerprint, resolve
from persona_pruner.config.schema import RunConfig
from persona_pruner.errors import EXIT_PERSONAS_FAILED, EXIT_STOPPED, MaskError, UserError
from persona_pruner.evaluation import abilities, dialogues, summary, table
from persona_pruner.evaluation.abilities import read_tasks
from persona_pruner.evaluation.answers import digest_of
from persona_pruner.evaluation.asking import missing
from persona_pruner.evaluation.judge import judged
from persona_pruner.evaluation.judging import judge_all, store_costs
from persona_pruner.evaluation.questions import read_questions_file
from persona_pruner.evaluation.simulated_user import user_costs
from persona_pruner.evaluation.subject import AnswerTask
from persona_pruner.learning.pooled import pooled_sample
from persona_pruner.masks.catalog import build_catalog
from persona_pruner.masks.store import stored_global_mask
from persona_pruner.run.lease import Lease
from persona_pruner.run.phases import ASKING, JUDGING
from persona_pruner.run.preflight import gpus_of_nodes, preflight
from persona_pruner.run.progress import ProgressReporter
from persona_pruner.run.ray_cluster import ray_cluster
from persona_pruner.run.stop import Stop
from persona_pruner.scheduling.group_pool import GroupPool
from persona_pruner.scheduling.training_worker import training_pool
from persona_pruner.storage import keys
from persona_pruner.storage.base import Storage
from persona_pruner.storage.open import open_storage

FIGURES: Mapping[Any, str] = {abilities: keys.EVALUATION_ABILITIES, dialogues: keys.EVALUATION_TURNS}
"""What is asked beside the held-out questions: the module of its figures, and the key of its table."""
CATALOG_COLUMNS = ("persona_sha256", "backbone_fingerprint", "data_sha256", "ratio", "keep")


@dataclass(frozen=True, kw_only=True)
class EvaluationRequest:
    """Which of an output's personas to evaluate: those named, a sample of so many, or all."""

    config: RunConfig
    output: str
    personas: tuple[str, ...] = ()
    sample: int | None = None


def run_evaluation(request: EvaluationRequest, progress: ProgressReporter) -> int:
    """Evaluate to the end or to a stop; returns the exit status (errors.py).

    Raises UserError before anything is started where the input is bad, ClusterError, StorageError.
    """
    progress.begin("checking the input")
    config, storage = request.config, open_storage(request.output, request.config.storage)
    storage.check_readable(keys.MASKS)
    preflight(config, synthesis=False, nodes=gpus_of_nodes(config))
    with Lease(storage, config.scheduler.lease_seconds) as lease:
        evaluation = Evaluation(request, storage, progress, Stop(config.scheduler, lease))
        if evaluation.open_tasks() or evaluation.lacks_global_mask:
            with ray_cluster(config, progress):
                evaluation.stop.listen()
                finished = evaluation.work()
            if not finished:
                progress.close("stopped")
                progress.say(f"stopped ({evaluation.stop.reason}); say the same again to go on")
                return EXIT_STOPPED
        ended_by = evaluation.judge()
        status = evaluation.report()
        if ended_by is not None:
            progress.say(f"judges stopped ({ended_by}); say the same again to go on")
        return EXIT_STOPPED if ended_by is not None else status


@dataclass
class Evaluation:
    """An evaluation that has claimed its output. Raises UserError where a persona has no mask, or one of another
    backbone."""

    request: EvaluationRequest
    storage: Storage
    progress: ProgressReporter
    stop: Stop
    failures: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        config = self.request.config
        faults: list[str] = []
        catalog = build_catalog(self.storage, config.storage.connections, CATALOG_COLUMNS, faults)
        for fault in faults:
            self.progress.say(f"warning: {fault}")
        self._fingerprint = fingerprint(resolve(config.backbone))
        self._versions = dict(_versions(catalog))
        self._ratio = catalog["ratio"][0].as_py() if catalog.num_rows else 0.0
        self.personas = self._chosen()
        _check_backbone(catalog, self._fingerprint, self.storage.url)
        self._global_key = stored_global_mask(self.storage)
        self._abilities = read_tasks(config)[1] if config.evaluation.abilities.enabled else None

    def _chosen(self) -> list[str]:
        ids = sorted(self._versions)
        if not ids:
            raise UserError(f"{self.storage.url}: holds no mask to evaluate")
        for persona_id in self.request.personas:
            if persona_id not in self._versions:
                raise UserError(f"--persona {persona_id}: {self.storage.url} holds no mask of it")
        if self.request.personas:
            return list(self.request.personas)
        return sorted(pooled_sample(ids, self.request.sample)) if self.request.sample else ids

    @property
    def lacks_global_mask(self) -> bool:
        return self._global_key is None and len(self._versions) > 1

    def tasks(self) -> Iterable[AnswerTask]:
        ids = sorted(self._versions)
        settings = self.request.config.evaluation.answers
        drawn = sorted(ids, key=lambda name: hashlib.sha256(f"{settings.seed} {name}".encode()).hexdigest())
        for persona_id in self.personas:
            other = ids[(ids.index(persona_id) + len(ids) // 2) % len(ids)]
            other_id = None if other == persona_id else other
            candidates = tuple([name for name in drawn if name != persona_id][: settings.candidates - 1])
            yield AnswerTask(
                persona_id=persona_id, other_id=other_id, candidates=candidates, global_key=self._global_key,
                digests=self._digests(persona_id, other_id, candidates),
            )  # fmt: skip

    def _digests(self, persona_id: str, other_id: str | None, candidates: Sequence[str]) -> dict[str, str]:
        config = self.request.config
        common = (
            persona_id, self._versions[persona_id], other_id and self._versions[other_id][1],
            [self._versions[name][0] for name in candidates], self._global_key, self._fingerprint,
            config.evaluation.answers.model_dump(mode="json"), config.prompt.model_dump(mode="json"),
            config.backbone.dtype, config.backbone.attention,
        )  # fmt: skip
        digests = {"answers": digest_of(*common, read_questions_file(config, persona_id))}
        if self._abilities is not None:
            digests["abilities"] = digest_of(*common, self._abilities)
        talks = config.evaluation.dialogues
        if talks.enabled:
            user = talks.user and (talks.user.model, talks.user.base_url)
            decided = (talks.count, talks.turns, talks.user_prompt, user, config.learning.max_row_tokens)
            digests["dialogues"] = digest_of(*common, read_questions_file(config, persona_id), decided)
        return digests

    def open_tasks(self) -> list[AnswerTask]:
        return [task for task in self.tasks() if missing(self.storage, task)]

    def work(self) -> bool:
        """Everything that needs the cluster. False where stopped before the end."""
        pool = training_pool(self.request.config, self.request.output, "evaluation")
        try:
            if self.lacks_global_mask and not self._learn_global_mask(pool):
                return False
            todo = self.open_tasks()
            self.progress.begin(ASKING, len(todo))
            done = 0
            for task, fault in pool.map("answer", todo, self.stop):
                done += 1
                self.progress.count(ASKING, done)
                if fault is not None:
                    self.failures[task.persona_id] = fault
            self.progress.end(ASKING)
            return done == len(todo)
        finally:
            pool.close()

    def _learn_global_mask(self, pool: GroupPool) -> bool:
        """As the job's comparison does. Left out where there are no data to learn it from."""
        config = self.request.config
        sample = pooled_sample(sorted(self._versions), config.learning.pooled_personas)
        with_data = [name for name in sample if self.storage.exists(keys.persona_data(name))]
        if not with_data:
            return True
        self.progress.begin("learning the one mask for all")
        personas = table.described(self.storage, with_data)
        for _, mask in pool.map("train_global", [(personas, self._ratio)], self.stop):
            key = keys.global_mask(digest_of(with_data, [self._versions[name][2] for name in with_data]))
            self.storage.put(key, mask)
            self._global_key = key
        return self._global_key is not None

    def judge(self) -> str | None:
        """Ask the judges, if there are any; why it ended before the end, if it did."""
        judges = self.request.config.evaluation.judges
        if not judges:
            return None
        asked = [name for name in self.personas if name not in self.failures]
        self.progress.begin(JUDGING, len(judges) * len(asked))
        count = partial(self.progress.count, JUDGING)
        ended_by = judge_all(self.request.config, self.storage, asked, self.stop, count)
        self.progress.end(JUDGING)
        return ended_by

    def report(self) -> int:
        """Summary, table, and what failed. Returns the exit status."""
        config = self.request.config
        self._store_figures()
        self.progress.close("failed" if self.failures else "done")
        shown = summary.read_answers(self.storage, config.storage.connections, self.personas)
        self.progress.console.print(summary.render(shown))
        for kind in FIGURES:
            figures = kind.stored(self.storage, config.storage.connections, self.personas)
            if (document := kind.table(own for _, own in figures))["rows"]:
                self.progress.console.print(kind.render(document))
        for persona_id, message in self.failures.items():
            self.progress.say(f"failed {persona_id}: {message}")
        self.progress.say(
            f"{len(self.personas) - len(self.failures)} of {len(self.personas)} personas evaluated; answers under "
            f"{self.storage.url}/{keys.evaluation_rows('answers')}"
        )
        return EXIT_PERSONAS_FAILED if self.failures else 0

    def _store_figures(self) -> None:
        """The catalog's columns and the report's tables, of all that was ever evaluated here."""
        config, columns = self.request.config, dict[str, dict[str, float | None]]()
        connections = config.storage.connections
        for kind, key in FIGURES.items():
            document = kind.table(_noted(kind, kind.stored(self.storage, connections), columns))
            if document["rows"]:
                self.storage.put(key, json.dumps(document).encode())
        answers = summary.read_answers(self.storage, connections)
        losses = summary.stored_losses(self.storage)
        verdicts = partial(judged, self.storage)
        rows = summary.summarize(answers, losses, config.evaluation.passes, verdicts, columns)
        summary.store_summary(self.storage, rows)
        if (user := config.evaluation.dialogues.user) and (costs := user_costs(self.storage)):
            store_costs(self.storage, f"{user.model} (simulated user)", astuple(costs))


def _noted(kind: Any, figures: Iterable[tuple[str, Any]], columns: dict[str, dict[str, float | None]]) -> Iterable[Any]:
    """The figures, whose columns of the catalog are noted by persona as they pass."""
    for persona_id, own in figures:
        columns.setdefault(persona_id, {}).update(kind.catalog_columns(own))
        yield own


def _versions(catalog: pa.Table) -> Iterable[tuple[str, tuple[str, str, str]]]:
    """Persona id to sha256 of its description, of its kept channels and of its data."""
    columns = (catalog[name].to_pylist() for name in ("persona_id", "persona_sha256", "keep", "data_sha256"))
    for persona_id, description, keep, data in zip(*columns, strict=True):
        yield persona_id, (description, hashlib.sha256(keep).hexdigest(), data)


def _check_backbone(catalog: pa.Table, own: str, url: str) -> None:
    for persona_id, other in zip(
        *(catalog[n].to_pylist() for n in ("persona_id", "backbone_fingerprint")), strict=True
    ):
        if other != own:
            raise MaskError(
                f"{url}: the mask of {persona_id} was made for a backbone with fingerprint {other[:16]}, "
                f"backbone.path has {own[:16]}; use the backbone it was made for"
            )
