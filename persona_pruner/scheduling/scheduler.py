"""Trains one mask per persona on a pool of shard groups, as personas' data come in. One thread, no state to lose.

What a kill would lose is in the output: masks, checkpoints, errors. The scheduler only decides who trains where.
"""

import heapq
import itertools
import json
import logging
import queue
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import ray
from ray.exceptions import RayError

from persona_pruner.config.schema import RunConfig
from persona_pruner.errors import StorageError
from persona_pruner.learning.outcome import Progress, TrainingResult, TrainingStatus
from persona_pruner.manifest import Persona
from persona_pruner.scheduling.group_pool import GroupCall, GroupPool, PoolEvent
from persona_pruner.scheduling.persona_job import Event, PersonaJob, transition
from persona_pruner.storage import keys
from persona_pruner.storage.base import Storage

logger = logging.getLogger(__name__)
TICK_SECONDS = 0.5
PROGRESS_SECONDS = 2.0
STOP_SECONDS = 15.0


class Scheduler:
    """`arrivals` gives a trial for each persona whose data are there or have failed; None says that no more come."""

    def __init__(
        self,
        config: RunConfig,
        pool: GroupPool,
        storage: Storage,
        watch: Callable[["Scheduler"], None] = lambda scheduler: None,
    ) -> None:
        self.config, self.pool, self.storage, self._watch = config, pool, storage, watch
        self.trials: dict[str, PersonaJob] = {}
        self.expected = 0
        """Personas still to arrive."""
        self.retries = 0
        self.groups_lost = 0
        self.tokens = 0
        self.busy_seconds = 0.0
        """Time that groups have spent on finished calls."""
        self._waiting: list[tuple[float, int, int, str]] = []
        self._order = itertools.count()
        self._polls: list[Any] = []
        self._next_poll = 0.0

    def states(self) -> Counter[str]:
        counts: Counter[str] = Counter(trial.state for trial in self.trials.values())
        counts["PENDING"] += self.expected
        return counts

    def add(self, trial: PersonaJob) -> None:
        self.trials[trial.persona.id] = trial
        self.expected -= 1
        if trial.state == "ERROR":
            self._store_error(trial)
        else:
            self._push(trial)

    def run(self, arrivals: "queue.Queue[PersonaJob | None]", should_stop: Callable[[], bool]) -> bool:
        """Train everything that arrives. True when all is through, False when stopped before."""
        open_end = True
        while True:
            while open_end:
                try:
                    trial = arrivals.get_nowait()
                except queue.Empty:
                    break
                if trial is None:
                    open_end = False
                else:
                    self.add(trial)
            if should_stop():
                self._stop()
                return False
            unfinished = sum(t.state in ("PENDING", "RUNNING") for t in self.trials.values())
            if not unfinished and not open_end:
                return True
            self.pool.scale(max(-(-unfinished // self.config.learning.personas_per_step), int(open_end)))
            self._assign()
            for event in self.pool.poll(TICK_SECONDS):
                self._take(event)
            self._read_progress()
            self._watch(self)

    def _push(self, trial: PersonaJob) -> None:
        heapq.heappush(self._waiting, (trial.not_before, -trial.persona.priority, next(self._order), trial.persona.id))

    def _assign(self) -> None:
        limit = self.config.scheduler.max_concurrent or len(self.trials)
        running = sum(t.state == "RUNNING" for t in self.trials.values())
        while running < limit and (group := self.pool.free()):
            cohort = self._next(min(self.config.learning.personas_per_step, limit - running))
            if not cohort:
                return
            self.pool.submit(group, "train", cohort, [persona.id for persona in cohort])
            for persona in cohort:
                self._change(persona.id, Event("started", group=group.name))
            running += len(cohort)

    def _next(self, count: int) -> list[Persona]:
        """Who is due, by priority and then in order of arrival."""
        now = time.monotonic()
        due = [entry for entry in self._waiting if entry[0] <= now]
        if not due:
            return []
        chosen = heapq.nsmallest(count, due, key=lambda entry: entry[1:])
        for entry in chosen:
            self._waiting.remove(entry)
        heapq.heapify(self._waiting)
        return [self.trials[entry[3]].persona for entry in chosen]

    def _take(self, event: PoolEvent) -> None:
        if event.kind == "started":
            logger.info("group %s is up", event.group)
        elif event.kind == "lost":
            self.groups_lost += 1
            logger.warning("%s", event.message)
        elif event.ticket is not None:
            self._take_answer(event, event.ticket)

    def _take_answer(self, event: PoolEvent, ticket: GroupCall) -> None:
        if event.kind == "result":
            for result in event.value:
                self.busy_seconds += result.busy_seconds
                self._change(result.persona_id, _event_of(result))
            return
        for persona_id in ticket.what:
            if event.kind == "dropped":
                self._change(persona_id, Event("returned"))
            elif event.value is None:
                self._change(persona_id, Event("lost", cause="group_lost", message=event.message))
            else:
                self._change(persona_id, Event("failed", cause="exception", message=event.message))

    def _change(self, persona_id: str, event: Event) -> None:
        trial = transition(self.trials[persona_id], event, self.config.scheduler, time.monotonic())
        self.trials[persona_id] = trial
        if trial.state == "PENDING":
            self._push(trial)
            if event.kind != "returned":
                self.retries += 1
                logger.warning("%s: %s; it is tried again", persona_id, trial.message)
        elif trial.state == "ERROR":
            self._store_error(trial)
            logger.error("%s: %s", persona_id, trial.message)
        elif trial.state == "TERMINATED":
            self.tokens += trial.tokens

    def _store_error(self, trial: PersonaJob) -> None:
        value = {
            "persona_id": trial.persona.id,
            "cause": trial.cause,
            "message": trial.message,
            "attempts": trial.attempts,
            "groups_lost": trial.losses,
        }
        self.storage.put(keys.error(trial.persona.id), json.dumps(value, indent=1).encode())

    def _read_progress(self) -> None:
        """Ask the groups now and then where they are; never wait for them."""
        now = time.monotonic()
        if self._polls:
            done, self._polls = ray.wait(self._polls, num_returns=len(self._polls), timeout=0)
            for ref in done:
                try:
                    for progress in ray.get(ref):
                        self._note(progress)
                except RayError:
                    continue
        if now >= self._next_poll:
            self._polls = self.pool.control("progress")
            self._next_poll = now + PROGRESS_SECONDS

    def _note(self, progress: Progress) -> None:
        trial = self.trials.get(progress.persona_id)
        if trial is not None and trial.state == "RUNNING":
            self.trials[progress.persona_id] = transition(
                trial,
                Event(
                    "progressed",
                    step=progress.step,
                    heldout_loss=progress.heldout_loss,
                    seconds=progress.seconds,
                    tokens=progress.tokens,
                ),
                self.config.scheduler,
                time.monotonic(),
            )

    def _stop(self) -> None:
        """Let the groups checkpoint what runs, for at most STOP_SECONDS."""
        deadline = time.monotonic() + STOP_SECONDS
        self.pool.control("stop")
        while any(group.calls for group in self.pool.groups) and time.monotonic() < deadline:
            for event in self.pool.poll(TICK_SECONDS):
                if event.kind == "result" and event.ticket is not None:
                    self._take(event)
        self._watch(self)


def run_all(pool: GroupPool, method: str, payloads: Sequence[Any], should_stop: Callable[[], bool]) -> Iterable[Any]:
    """(payload, answer) of calls spread over the pool. A lost group's calls go to another, three times at most."""
    left = [(payload, 0) for payload in reversed(payloads)]
    open_calls = 0
    while left or open_calls:
        if should_stop():
            return
        pool.scale(len(left) + open_calls)
        while left and (group := pool.free()):
            payload, tries = left.pop()
            pool.submit(group, method, payload, (payload, tries))
            open_calls += 1
        for event in pool.poll(TICK_SECONDS):
            if event.ticket is None:
                continue
            open_calls -= 1
            payload, tries = event.ticket.what
            if event.kind == "result":
                yield payload, event.value
            elif event.kind == "dropped" or (event.value is None and tries < 3):
                left.append((payload, tries + (event.kind == "error")))
            else:
                raise event.value or StorageError(event.message)


def _event_of(result: TrainingResult) -> Event:
    if result.status is TrainingStatus.FAILED:
        return Event("failed", cause=result.cause, message=result.message)
    return Event(
        "paused" if result.status is TrainingStatus.PAUSED else "done",
        step=result.step,
        heldout_loss=result.heldout_loss,
        seconds=result.seconds,
        tokens=result.tokens,
    )
