"""The main job: manifest in, masks out. Checks everything, claims the output, trains what is missing, and tells."""

import json
import logging
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console

from persona_pruner.config.schema import RunConfig
from persona_pruner.errors import EXIT_PERSONAS_FAILED, EXIT_STOPPED, SourceError, StorageError, UserError
from persona_pruner.manifest import Manifest, Persona
from persona_pruner.masks.catalog import build_catalog, write_catalog
from persona_pruner.run.identity import Identity, check_run, identify
from persona_pruner.run.lease import Lease
from persona_pruner.run.plan import Plan, make_plan
from persona_pruner.run.preflight import gpus_of_nodes, preflight
from persona_pruner.scheduling.persona_job import PersonaJob
from persona_pruner.storage import keys
from persona_pruner.storage.base import Storage
from persona_pruner.storage.open import open_storage

if TYPE_CHECKING:
    from persona_pruner.synthesis.pipeline import SynthesisResult

logger = logging.getLogger(__name__)


class Stop:
    """Says when to leave: SIGTERM or SIGINT, the time budget, or a lost claim on the output."""

    def __init__(self, config: RunConfig, lease: Lease) -> None:
        self._lease = lease
        self._asked = threading.Event()
        budget = config.scheduler.time_budget_seconds
        self._deadline = None if budget is None else time.monotonic() + budget
        self.reason = ""
        self.listen()

    def listen(self) -> None:
        """Take the signals over; ray.init installs handlers of its own, so again after it."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: object) -> None:
        self.reason = signal.Signals(number).name
        self._asked.set()

    def __call__(self) -> bool:
        if self._lease.lost.is_set():
            self.reason = "another job has taken over the output"
            return True
        if self._deadline is not None and time.monotonic() > self._deadline:
            self.reason = "scheduler.time_budget_seconds is over"
            return True
        return self._asked.is_set()


def run_job(
    config: RunConfig,
    manifest: Manifest,
    output: str,
    *,
    console: Console,
    synthesis: bool = True,
    training: bool = True,
) -> int:
    """Run to the end or to a stop; returns the exit status (errors.py). Raises UserError before anything is started.

    `synthesis` and `training` say which half to do: with one off, the other one's data must be there.
    """
    storage = open_storage(output, config.storage)
    preflight(config, synthesis=synthesis, nodes=gpus_of_nodes(config))
    identity = identify(config, manifest.personas, storage)
    _check(config, storage, identity)
    for warning in manifest.warnings:
        console.print(f"warning: {warning}", markup=False, highlight=False)
    plan = make_plan(manifest, storage, identity)
    todo = plan.to_synthesize if synthesis else ()
    ready = plan.to_train if training else ()
    if todo:
        from persona_pruner.synthesis.sources import load_questions

        load_questions(config.synthesis)
        if len(identity.references) < 2 and not config.synthesis.references.path:
            raise SourceError("one persona has no references; set synthesis.references.path to a file of personas")
    with Lease(storage, config.scheduler.lease_seconds) as lease:
        stop = Stop(config, lease)
        storage.put_if_absent(keys.RUN, json.dumps(identity.document(), indent=1).encode())
        check_run(storage, identity)
        _tell_plan(console, manifest, plan, synthesis)
        job = _Job(config, manifest, output, storage, identity, console, stop)
        return job.run(plan, todo, ready, training)


def _check(config: RunConfig, storage: Storage, identity: Identity) -> None:
    from persona_pruner.evaluation.table import read_conversations

    storage.check_writable()
    check_run(storage, identity)
    if config.evaluation.enabled:
        read_conversations(config)


def _tell_plan(console: Console, manifest: Manifest, plan: Plan, synthesis: bool) -> None:
    console.print(
        f"{len(manifest.personas)} personas: {len(plan.done)} masked already, {len(plan.to_train)} with data, "
        f"{len(plan.to_synthesize)} {'to synthesize' if synthesis else 'without data'}"
        + (f", {len(plan.failed_before)} failed before" if plan.failed_before else ""),
        markup=False,
        highlight=False,
    )


class _Job:
    def __init__(
        self,
        config: RunConfig,
        manifest: Manifest,
        output: str,
        storage: Storage,
        identity: Identity,
        console: Console,
        stop: Stop,
    ) -> None:
        self.config, self.manifest, self.output, self.storage = config, manifest, output, storage
        self.identity, self.console, self.stop = identity, console, stop

    def run(self, plan: Plan, todo: Sequence[Persona], ready: Sequence[Persona], training: bool) -> int:
        evaluation = training and self.config.evaluation.enabled
        work = bool(todo or ready)
        if not work and not (evaluation and self._evaluation_missing()):
            self.console.print("nothing to do: every mask is there", highlight=False)
            return self._finish({}, evaluation)
        start_ray(self.config)
        self.stop.listen()
        from persona_pruner.run.progress import ProgressReporter
        from persona_pruner.scheduling.group_pool import GroupPool
        from persona_pruner.scheduling.scheduler import Scheduler

        pool = GroupPool(self.config, self.output, self.identity.run_id)
        watcher = ProgressReporter(
            self.console, self.storage, self.identity.run_id, len(self.manifest.personas), len(plan.done)
        )
        scheduler = Scheduler(self.config, pool, self.storage, watcher)
        state = "failed"
        try:
            if not training:
                failed, finished = self._synthesize_only(todo)
            else:
                finished = self._train(scheduler, todo, ready)
                failed = {t.persona.id: t.message or "" for t in scheduler.trials.values() if t.state == "ERROR"}
            if finished and evaluation:
                finished = self._evaluate(pool)
            state = "stopped" if not finished else "failed" if failed else "done"
        finally:
            watcher.close(scheduler, state)
            pool.close()
        if not finished:
            self.console.print(f"stopped ({self.stop.reason}); submit again to go on", markup=False)
            return EXIT_STOPPED
        return self._finish(failed, evaluation)

    def _train(self, scheduler: Any, todo: Sequence[Persona], ready: Sequence[Persona]) -> bool:
        arrivals: queue.Queue[PersonaJob | None] = queue.Queue()
        for persona in ready:
            arrivals.put(PersonaJob(persona))
        scheduler.expected = len(ready) + len(todo)
        faults: list[Exception] = []
        thread = threading.Thread(target=self._feed, args=(todo, arrivals, faults), name="synthesis", daemon=True)
        thread.start()
        finished = scheduler.run(arrivals, lambda: bool(faults) or self.stop())
        if faults:
            raise faults[0]
        return bool(finished)

    def _feed(
        self, todo: Sequence[Persona], arrivals: "queue.Queue[PersonaJob | None]", faults: list[Exception]
    ) -> None:
        """Synthesize and hand over each persona as soon as its data are there."""
        by_id = {persona.id: persona for persona in todo}
        try:
            for result in self._synthesized(todo):
                persona = by_id[result.persona_id]
                if result.error is None:
                    arrivals.put(PersonaJob(persona))
                else:
                    cause, message = result.error
                    arrivals.put(PersonaJob(persona, state="ERROR", attempts=1, cause=cause, message=message))
                if self.stop():
                    return
        except Exception as error:
            faults.append(error)
        finally:
            arrivals.put(None)

    def _synthesized(self, todo: Sequence[Persona]) -> "Iterator[SynthesisResult]":
        from persona_pruner.synthesis.pipeline import synthesize

        ids = [persona.id for persona in todo]
        return synthesize(self.config, self.manifest.personas, ids, self.output, self.identity.references)

    def _synthesize_only(self, todo: Sequence[Persona]) -> tuple[dict[str, str], bool]:
        failed: dict[str, str] = {}
        for result in self._synthesized(todo):
            if result.error is None:
                counts = ", ".join(f"{name} {count}" for name, count in result.counts.items())
                self.console.print(f"data of {result.persona_id}: {counts}", markup=False, highlight=False)
            else:
                failed[result.persona_id] = result.error[1]
            if self.stop():
                return failed, False
        return failed, True

    def _masked(self) -> list[Persona]:
        there = set(self._catalog(columns=()).column("persona_id").to_pylist())
        return [persona for persona in self.manifest.personas if persona.id in there]

    def _catalog(self, **options: Any) -> Any:
        return build_catalog(self.storage, self.config.storage.connections, **options)

    def _evaluation_missing(self) -> bool:
        from persona_pruner.evaluation import table

        masked = self._masked()
        return bool(masked) and table.missing(self.config, masked, self.storage)

    def _evaluate(self, pool: Any) -> bool:
        from persona_pruner.evaluation import table
        from persona_pruner.scheduling.scheduler import run_all

        self.console.print("comparing the masks with the baselines", highlight=False)
        masked = self._masked()

        def call(method: str, payloads: Sequence[Any]) -> Any:
            return run_all(pool, method, payloads, self.stop)

        return not masked or table.compare(self.config, masked, self.storage, call)

    def _finish(self, failed: dict[str, str], evaluation: bool) -> int:
        """Catalog, tables, where everything is, and what to try next."""
        catalog = self._catalog()
        write_catalog(self.storage, catalog)
        masked = self._masked()
        for persona in masked:
            self.storage.delete(keys.error(persona.id))
        if evaluation:
            from persona_pruner.evaluation import table

            for one in table.stored_tables(masked, self.storage, self.config.learning.ratio):
                self.console.print(one)
        for persona_id, message in failed.items():
            self.console.print(f"failed {persona_id}: {message}", markup=False, highlight=False)
        where = self.storage.url
        self.console.print(
            f"{len(masked)} of {len(self.manifest.personas)} personas masked; masks under {where}/{keys.MASKS}\n\n"
            f"next:  persona-pruner status {where}\n"
            f"       persona-pruner inspect {where} --persona {self.manifest.personas[0].id}\n"
            f"       persona-pruner export {where}/{keys.mask(self.manifest.personas[0].id)} "
            f"--backbone {self.config.backbone.path} --to exported/{self.manifest.personas[0].id}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
        return EXIT_PERSONAS_FAILED if failed else 0


def start_ray(config: RunConfig) -> None:
    """Attach to the cluster that this job was submitted to (RAY_ADDRESS), else start a local one for it alone."""
    import ray

    if ray.is_initialized():
        return
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if os.environ.get("RAY_ADDRESS"):
        ray.init(**options)
        return
    # A cluster of one process has nobody to keep out, and should not leave a token file behind.
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    groups, actors = config.groups, config.synthesis.actors
    needed = groups.min * groups.shards * groups.num_cpus + actors.min * actors.num_cpus + 0.25
    cpus = max(os.cpu_count() or 1, int(-(-needed // 1)))
    try:
        ray.init(address="local", num_cpus=cpus, include_dashboard=False, **options)
    except Exception as error:
        raise StorageError(f"a local Ray could not be started: {str(error).splitlines()[0]}") from None


def main(run: Callable[[], int]) -> int:
    """Run a job's body; a user's fault becomes its lines on stderr and its exit status."""
    errors = Console(stderr=True)
    try:
        return run()
    except UserError as error:
        errors.print(str(error), markup=False, highlight=False, style="red", soft_wrap=True)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
