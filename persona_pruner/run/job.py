"""The main job: manifest in, masks out.

plan -> synthesize and train -> evaluate -> report. What is in the output already is not done again.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from persona_pruner.dataset import is_current
from persona_pruner.errors import EXIT_PERSONAS_FAILED, EXIT_STOPPED
from persona_pruner.evaluation import table
from persona_pruner.learning.pooled import pooled_sample
from persona_pruner.manifest import Persona
from persona_pruner.masks.catalog import update_catalog
from persona_pruner.run.advice import advice, next_steps
from persona_pruner.run.catalog_updates import CatalogUpdates
from persona_pruner.run.feed import Opposites, SynthesisFeed, interruptible, job_of
from persona_pruner.run.identity import Identity, check_run
from persona_pruner.run.lease import Lease
from persona_pruner.run.phases import ANSWERING, COMPARING, SCORING
from persona_pruner.run.plan import Plan, masked_personas
from persona_pruner.run.progress import ProgressReporter
from persona_pruner.run.ray_cluster import ray_cluster
from persona_pruner.run.start import JobRequest, Start
from persona_pruner.run.stop import Stop, StoppedError
from persona_pruner.scheduling.group_pool import GroupPool
from persona_pruner.scheduling.persona_job import PersonaJob
from persona_pruner.scheduling.scheduler import Scheduler
from persona_pruner.scheduling.tiles import SYNTHESIZE, Tiles
from persona_pruner.scheduling.training_worker import training_pool
from persona_pruner.storage import keys
from persona_pruner.storage.base import Storage
from persona_pruner.synthesis.pipeline import SynthesisResult, read_inputs, synthesize, tiles_of
from persona_pruner.synthesis.shared_worker import shared_pool
from persona_pruner.synthesis.sources import load_question_set
from persona_pruner.synthesis.warnings import FewRows, foreign_rewriter


def run_job(request: JobRequest, start: Start, progress: ProgressReporter) -> int:
    """Run what `check_and_plan` has let through to its end or to a stop; returns the exit status (errors.py).

    Raises UserError, ClusterError, StorageError.
    """
    config, storage, identity, plan = request.config, start.storage, start.identity, start.plan
    with Lease(storage, config.scheduler.lease_seconds, request.part) as lease:
        storage.put_if_absent(keys.RUN, json.dumps(identity.document(), indent=1).encode())
        check_run(storage, identity)
        progress.attach(storage, identity.run_id, request.part.name)
        progress.lease_age = lease.age
        tell_plan(request, plan, progress)
        job = Job(request, storage, identity, progress, Stop(config.scheduler, lease))
        try:
            if job.has_work(plan):
                with ray_cluster(config, progress):
                    job.stop.listen()
                    job.work(plan)
            else:
                progress.say("nothing to do: every mask is there")
        except StoppedError:
            progress.close("stopped")
            progress.say(f"stopped ({job.stop.reason}); submit again to go on")
            return EXIT_STOPPED
        return job.report()


def tell_plan(request: JobRequest, plan: Plan, progress: ProgressReporter) -> None:
    for warning in request.manifest.warnings:
        progress.say(f"warning: {warning}")
    part = "" if request.part.is_whole else f" in part {request.part.number}/{request.part.count}"
    failed = f", {len(plan.failed_before)} failed before" if plan.failed_before else ""
    progress.say(
        f"{len(request.personas)} personas{part}: {len(plan.done)} masked already, {len(plan.to_train)} with data, "
        f"{len(plan.to_synthesize)} {'to synthesize' if request.synthesis else 'without data'}{failed}"
    )
    progress.train(len(request.personas), len(plan.done), request.config.learning.steps)


@dataclass
class Job:
    """A job that has claimed its output."""

    request: JobRequest
    storage: Storage
    identity: Identity
    progress: ProgressReporter
    stop: Stop
    failures: dict[str, str] = field(default_factory=dict)
    """What is wrong with each persona that failed."""
    shared: GroupPool | None = None
    """The pool where its groups synthesize too (`gpus`)."""

    def has_work(self, plan: Plan) -> bool:
        todo = (self.request.synthesis and plan.to_synthesize) or (self.request.training and plan.to_train)
        return bool(todo) or (self.request.evaluation and self._evaluation_is_missing())

    def work(self, plan: Plan) -> None:
        """Everything that needs the cluster. Raises StoppedError."""
        ready, todo = plan.to_train, plan.to_synthesize if self.request.synthesis else ()
        pool = self._open_pool(todo)
        try:
            if not self.request.training:
                self.synthesize(todo)
                return
            if self.request.config.learning.needs_pooled_mask and not self.storage.exists(keys.POOLED_MASK):
                self.learn_pooled_mask(pool, todo)
                ready, todo = (*ready, *self._with_data(todo)), self._without_data(todo)
            self.synthesize_and_train(pool, ready, todo)
            if self.request.evaluation:
                self.evaluate(pool)
        finally:
            pool.close()

    def _open_pool(self, todo: Sequence[Persona]) -> GroupPool:
        config, output, run_id = self.request.config, self.request.output, self.identity.run_id
        if not (config.shared_pool and todo):
            return training_pool(config, output, run_id)
        self.shared = shared_pool(config, output, run_id, read_inputs(config, output, self.identity.references))
        return self.shared

    def learn_pooled_mask(self, pool: GroupPool, todo: Sequence[Persona]) -> None:
        """One mask of a sample's rows, from which all personas start. Synthesizes what data the sample lacks."""
        self.progress.begin("learning the pooled mask")
        sample = self._pooled_sample()
        lacking = {persona.id for persona in todo}
        if asked := [persona.id for persona in sample if persona.id in lacking]:
            for _ in self._synthesized(asked):
                self.stop.check()
        if not any(learned for _, learned in pool.map("train_pooled", [sample], self.stop)):
            raise StoppedError(self.stop.reason)
        self.progress.end("learning the pooled mask")

    def _pooled_sample(self) -> list[Persona]:
        """Drawn once, so that a manifest may grow without changing where its personas start."""
        by_id = {persona.id: persona for persona in self.request.manifest.personas}
        drawn = pooled_sample(list(by_id), self.request.config.learning.pooled_personas)
        self.storage.put_if_absent(keys.POOLED_SAMPLE, json.dumps(drawn).encode())
        stored = json.loads(self.storage.get(keys.POOLED_SAMPLE))
        return [by_id[persona_id] for persona_id in stored if persona_id in by_id]

    def _with_data(self, personas: Sequence[Persona]) -> tuple[Persona, ...]:
        return tuple(persona for persona in personas if is_current(self.storage, persona))

    def _without_data(self, personas: Sequence[Persona]) -> tuple[Persona, ...]:
        ready = {persona.id for persona in self._with_data(personas)}
        return tuple(persona for persona in personas if persona.id not in ready)

    def synthesize_and_train(self, pool: GroupPool, ready: Sequence[Persona], todo: Sequence[Persona]) -> None:
        """A persona is trained as soon as its data are there; none waits for the others."""
        apart, together = ((), todo) if self.shared else (todo, ())
        opposites = Opposites(todo) if self.request.config.learning.is_contrastive else None
        feed = SynthesisFeed(ready, apart, self._synthesized, opposites)
        with self._synthesis(together) as few_rows:
            tiles = self._tiles(together, few_rows, opposites)
            scheduler = Scheduler(self.request.config, pool, self.storage, self.progress, tiles=tiles)
            scheduler.expected = len(ready) + len(todo)
            catalog = CatalogUpdates(self.storage, self.request.config.storage.connections)

            def should_stop() -> bool:
                catalog.masked(scheduler.states["TERMINATED"])
                return feed.fault is not None or self.stop()

            try:
                finished = scheduler.run(feed.arrivals, should_stop)
            finally:
                feed.close()
            if feed.fault is not None:
                raise feed.fault
            if not finished:
                raise StoppedError(self.stop.reason)
            catalog.close()
        self.failures = scheduler.failures()

    def _tiles(self, todo: Sequence[Persona], few_rows: FewRows, opposites: Opposites | None) -> Tiles:
        """What the groups synthesize between two trainings."""
        personas = {persona.id: persona for persona in todo}

        def jobs_of(results: Sequence[SynthesisResult]) -> Iterator[PersonaJob]:
            for result in results:
                few_rows.add(result)
                job = job_of(personas[result.persona_id], result)
                yield from [job] if opposites is None else opposites.arrive(job)

        return Tiles(tiles_of(todo, self.request.config, self.request.config.group_pool.max), jobs_of)

    def synthesize(self, todo: Sequence[Persona]) -> None:
        """Data only."""
        for result in self._synthesized([persona.id for persona in todo]):
            if result.error is None:
                counts = ", ".join(f"{name} {count}" for name, count in result.counts.items())
                self.progress.say(f"data of {result.persona_id}: {counts}")
            else:
                self.failures[result.persona_id] = result.error[1]
            self.stop.check()
        self.stop.check()

    def _synthesized(self, todo: Sequence[str]) -> Iterator[SynthesisResult]:
        with self._synthesis(todo) as few_rows:
            for result in self._results(todo):
                few_rows.add(result)
                yield result

    def _results(self, todo: Sequence[str]) -> Iterator[SynthesisResult]:
        """Ends early where the job is stopped."""
        config, personas = self.request.config, self.request.manifest.personas
        if self.shared is None:
            results = synthesize(config, personas, todo, self.request.output, self.identity.references)
            yield from interruptible(results, self.stop)
            return
        asked = set(todo)
        tiles = tiles_of([p for p in personas if p.id in asked], config, config.group_pool.max)
        for _, (results, _) in self.shared.map(SYNTHESIZE, tiles, self.stop):
            yield from results

    @contextmanager
    def _synthesis(self, todo: Sequence[Any]) -> Iterator[FewRows]:
        """The phases of so many personas' synthesis, and what is to be told about their data."""
        few_rows = FewRows()
        if not todo:
            yield few_rows
            return
        settings = self.request.config.synthesis
        self._warn(foreign_rewriter(self.request.config))
        questions = len(load_question_set(settings))
        asked = min(settings.select.k, questions) * settings.rewrite.samples_per_question
        self.progress.begin(SCORING, len(todo) * questions)
        self.progress.begin(ANSWERING, len(todo) * asked)
        yield few_rows
        self.progress.end(SCORING)
        self.progress.end(ANSWERING)
        self._warn(few_rows.message())

    def _warn(self, message: str | None) -> None:
        if message:
            self.progress.say(f"warning: {message}")

    def evaluate(self, pool: GroupPool) -> None:
        """Compare the masks with the baselines."""
        masked = self._masked()
        self.progress.begin(COMPARING, len(masked))
        call = partial(self._evaluated, pool)
        if masked and not table.compare(self.request.config, masked, self.storage, call):
            raise StoppedError(self.stop.reason)
        self.progress.end(COMPARING)

    def _evaluated(self, pool: GroupPool, method: str, payloads: Sequence[Any]) -> Iterable[tuple[Any, Any]]:
        for done, answered in enumerate(pool.map(method, payloads, self.stop), 1):
            self.progress.count(COMPARING, done)
            yield answered

    def _evaluation_is_missing(self) -> bool:
        masked = self._masked()
        return bool(masked) and table.missing(self.request.config, masked, self.storage)

    def _masked(self) -> tuple[Persona, ...]:
        return masked_personas(self.request.personas, self.storage, self.identity)

    def report(self) -> int:
        """Catalog, tables, what failed, where everything is, and what to try next. Returns the exit status."""
        update_catalog(self.storage, self.request.config.storage.connections)
        masked = self._masked()
        self._forget_errors(masked)
        self.progress.close("failed" if self.failures else "done")
        if self.request.evaluation:
            for one in table.stored_tables(masked, self.storage, self.request.config.learning.ratio):
                self.progress.console.print(one)
        for persona_id, message in self.failures.items():
            self.progress.say(f"failed {persona_id}: {message}")
        url = self.storage.url
        self.progress.say(
            f"{len(masked)} of {len(self.request.personas)} personas masked; masks under {url}/{keys.MASKS}"
        )
        for line in advice(self.request.config, self._errors()):
            self.progress.say(f"try: {line}")
        steps = next_steps(self.request.config, url, [persona.id for persona in masked])
        self.progress.say("\nnext:  " + "\n       ".join(steps))
        return EXIT_PERSONAS_FAILED if self.failures else 0

    def _errors(self) -> list[dict[str, Any]]:
        """errors/<id>.json of the personas that failed."""
        keys_of_errors = [item.key for item in self.storage.list(keys.ERRORS)] if self.failures else []
        failed = [key for key in keys_of_errors if keys.persona_of(key, keys.ERRORS) in self.failures]
        return [dict(json.loads(self.storage.get(key))) for key in failed]

    def _forget_errors(self, masked: Sequence[Persona]) -> None:
        done = {persona.id for persona in masked}
        for item in list(self.storage.list(keys.ERRORS)):
            if keys.persona_of(item.key, keys.ERRORS) in done:
                self.storage.delete(item.key)
