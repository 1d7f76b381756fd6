"""Trains one mask per persona on a pool of shard groups, as the personas' data come in. One thread, no state to lose.

What a kill would lose is in the output: masks, checkpoints, errors. The scheduler only decides who trains where. What a
turn costs does not depend on the number of personas.
"""

import json
import logging
import queue
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, Protocol

from persona_pruner.config.schema import RunConfig
from persona_pruner.learning.outcome import TrainingResult
from persona_pruner.manifest import Persona
from persona_pruner.scheduling.actor_group import GroupLostError, WorkerError, one_line
from persona_pruner.scheduling.group_pool import TICK_SECONDS, GroupPool
from persona_pruner.scheduling.persona_job import STATES, Event, PersonaJob, transition
from persona_pruner.scheduling.pool_events import (
    CallDone,
    CallFailed,
    CallLost,
    CallReturned,
    GroupLost,
    GroupStarted,
    PoolEvent,
)
from persona_pruner.scheduling.tiles import SYNTHESIZE, Tiles
from persona_pruner.scheduling.waiting import WaitingJobs
from persona_pruner.storage import keys
from persona_pruner.storage.base import Storage

logger = logging.getLogger(__name__)
PROGRESS_SECONDS = 2.0
PROGRESS_GROUPS = 64
"""Groups that are asked for their progress at once; the others are asked later."""
STOP_SECONDS = 15.0


class Observer(Protocol):
    def changed(self, job: PersonaJob) -> None:
        """A job has changed."""

    def turn(self, scheduler: "Scheduler") -> None:
        """The scheduler has gone around once."""


class Scheduler:
    """`observer` is told what happens; `clock` is monotonic."""

    def __init__(
        self,
        config: RunConfig,
        pool: GroupPool,
        storage: Storage,
        observer: Observer | None = None,
        clock: Callable[[], float] = time.monotonic,
        tiles: Tiles | None = None,
    ) -> None:
        self.config, self.pool, self.storage, self._observer, self._clock = config, pool, storage, observer, clock
        self.tiles = tiles or Tiles()
        self.jobs: dict[str, PersonaJob] = {}
        self.states: Counter[str] = Counter(dict.fromkeys(STATES, 0))
        """Arrived jobs by state."""
        self.expected = 0
        """Personas still to arrive."""
        self.retries = 0
        self.groups_lost = 0
        self.tokens = 0
        self._trained_seconds = 0.0
        self._waiting = WaitingJobs()
        self._arriving = True
        self._asked: set[Any] = set()
        self._next_question = 0.0

    @property
    def unfinished(self) -> int:
        """Arrived jobs that are to be trained."""
        return self.states["PENDING"] + self.states["RUNNING"]

    @property
    def busy_seconds(self) -> float:
        """Time that groups have spent on finished calls."""
        return self._trained_seconds + self.tiles.busy_seconds

    def failures(self) -> dict[str, str]:
        """What is wrong with each persona that has failed."""
        return {job.persona.id: job.message or "" for job in self.jobs.values() if job.state == "ERROR"}

    def run(self, arrivals: "queue.Queue[PersonaJob | None]", should_stop: Callable[[], bool]) -> bool:
        """Train everything that arrives and that the tiles give. True when all is through, False when stopped before.

        `arrivals` gives a job for each persona whose data are there or have failed; None says that no more come.
        """
        while True:
            self._take_arrivals(arrivals)
            if should_stop():
                self._stop()
                return False
            if not self.unfinished and not self._arriving and not self.tiles.left:
                return True
            cohorts = -(-self.unfinished // self.config.learning.personas_per_step)
            self.pool.scale(max(cohorts + self.tiles.left, int(self._arriving)))
            self._assign()
            self.tiles.assign(self.pool)
            for event in self.pool.poll(TICK_SECONDS):
                self._take(event)
            self._read_progress()
            self._tell()

    def _take_arrivals(self, arrivals: "queue.Queue[PersonaJob | None]") -> None:
        while self._arriving:
            try:
                job = arrivals.get_nowait()
            except queue.Empty:
                return
            if job is None:
                self._arriving = False
            else:
                self.add(job)

    def add(self, job: PersonaJob) -> None:
        self.expected -= 1
        self._set(job)
        if job.state == "ERROR":
            self._store_error(job)
        else:
            self._push(job)

    def _set(self, job: PersonaJob) -> None:
        """The one place where a job changes, so that the counts hold."""
        before = self.jobs.get(job.persona.id)
        if before is not None:
            self.states[before.state] -= 1
        self.states[job.state] += 1
        self.jobs[job.persona.id] = job
        if self._observer is not None:
            self._observer.changed(job)

    def _push(self, job: PersonaJob) -> None:
        self._waiting.push(job.persona.id, job.persona.priority, job.not_before, self._clock())

    def _assign(self) -> None:
        limit = self.config.scheduler.max_concurrent or len(self.jobs)
        while (room := limit - self.states["RUNNING"]) > 0 and (group := self.pool.free()):
            ids = self._waiting.pop(min(self.config.learning.personas_per_step, room), self._clock())
            if not ids:
                return
            cohort: list[Persona] = [self.jobs[persona_id].persona for persona_id in ids]
            self.pool.submit(group, "train", cohort, ids)
            for persona_id in ids:
                self._change(persona_id, Event("started", group=group.name))

    def _take(self, event: PoolEvent) -> None:
        if not isinstance(event, GroupStarted | GroupLost) and event.call.method == SYNTHESIZE:
            for job in self.tiles.take(event):
                self.add(job)
            return
        match event:
            case GroupStarted(group):
                logger.info("group %s is up", group)
            case GroupLost(_, message):
                self.groups_lost += 1
                logger.warning("%s", message)
            case CallDone(_, results):
                self._take_results(results)
            case CallFailed(call, error):
                message = one_line(error)
                self._change_all(call.context, Event("failed", cause="exception", message=message))
            case CallLost(call, message):
                self._change_all(call.context, Event("lost", cause="group_lost", message=message))
            case CallReturned(call):
                self._change_all(call.context, Event("returned"))

    def _take_results(self, results: list[TrainingResult]) -> None:
        for result in results:
            self._trained_seconds += result.busy_seconds
            self._change(result.persona_id, Event.of_result(result))

    def _change_all(self, persona_ids: list[str], event: Event) -> None:
        for persona_id in persona_ids:
            self._change(persona_id, event)

    def _change(self, persona_id: str, event: Event) -> None:
        job = transition(self.jobs[persona_id], event, self.config.scheduler, self._clock())
        self._set(job)
        if job.state == "PENDING":
            self._push(job)
            if event.kind != "returned":
                self.retries += 1
                logger.warning("%s: %s; it is tried again", persona_id, job.message)
        elif job.state == "ERROR":
            self._store_error(job)
            logger.error("%s: %s", persona_id, job.message)
        elif job.state == "TERMINATED":
            self.tokens += job.tokens

    def _store_error(self, job: PersonaJob) -> None:
        value = {
            "persona_id": job.persona.id,
            "cause": job.cause,
            "message": job.message,
            "attempts": job.attempts,
            "groups_lost": job.losses,
        }
        self.storage.put(keys.error(job.persona.id), json.dumps(value, indent=1).encode())

    def _read_progress(self) -> None:
        """Ask some groups now and then where they are; never wait for them."""
        if self._asked:
            for ref in self.pool.resolved(self._asked):
                self._asked.discard(ref)
                try:
                    reports = self.pool.answer(ref)
                except (WorkerError, GroupLostError):
                    continue
                for progress in reports:
                    job = self.jobs.get(progress.persona_id)
                    if job is not None and job.state == "RUNNING":
                        self._change(progress.persona_id, Event.of_progress(progress))
        now = self._clock()
        if now >= self._next_question:
            self._asked = set(self.pool.ask("progress", PROGRESS_GROUPS))
            self._next_question = now + PROGRESS_SECONDS

    def _tell(self) -> None:
        if self._observer is not None:
            self._observer.turn(self)

    def _stop(self) -> None:
        """Let the groups checkpoint what runs, for at most STOP_SECONDS."""
        deadline = self._clock() + STOP_SECONDS
        self.pool.ask("stop", len(self.pool.groups))
        while self.pool.busy and self._clock() < deadline:
            for event in self.pool.poll(TICK_SECONDS):
                if isinstance(event, CallDone):
                    self._take(event)
        self._tell()
