"""How far a run is: phases and counts, for the display, for status.json, TensorBoard and Ray's metrics.

The job says which phase begins; the workers' processes count (activity.py); the scheduler tells every change of a
persona's job. A thread of its own tells it on, so that neither the job nor the scheduler waits for it.
"""

import json
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from rich.console import Console

from persona_pruner.activity import Activity, Count
from persona_pruner.errors import StorageError
from persona_pruner.run.display import LiveDisplay, PlainDisplay
from persona_pruner.run.phases import TRAINING, Phase
from persona_pruner.run.status import status_of
from persona_pruner.storage import keys
from persona_pruner.storage.base import Storage

if TYPE_CHECKING:
    # The display shows before torch and ray are imported.
    from persona_pruner.run.telemetry import EventFiles, Metrics
    from persona_pruner.scheduling.persona_job import PersonaJob
    from persona_pruner.scheduling.scheduler import Scheduler

TICK_SECONDS = 0.5
STATUS_SECONDS = 5.0
SHOWN_JOBS = 12


@dataclass
class _Output:
    """Where status, events and gauges go once the output is ours."""

    storage: Storage
    key: str
    events: "EventFiles"
    metrics: "Metrics | None" = None
    next_status: float = 0.0


class ProgressReporter:
    """Shows and stores how a job goes on, from construction to `close`."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self.console, self.clock = console, clock
        self.phases: dict[str, Phase] = {}
        self.doing: Counter[str] = Counter()
        """What workers do that is not counted, with their number."""
        self.total = self.done_before = 0
        self.running: dict[str, PersonaJob] = {}
        self.finished: deque[PersonaJob] = deque(maxlen=SHOWN_JOBS)
        self.state = "running"
        self.run_id = self.part = ""
        self.waiting_for = ""
        """Resources that groups wait for, in words."""
        self.lease_age: Callable[[], float] = float
        self._steps = 1
        self.scheduler: Scheduler | None = None
        self._read_activities: Callable[[], Sequence[Activity]] = list
        self._explain_waiting: Callable[[int], str] = _no_explanation
        self._explained = float("-inf")
        self._ticking = threading.Lock()
        self._output: _Output | None = None
        self._masked_since: deque[PersonaJob] = deque()
        self.began = clock()
        self.since = datetime.now(UTC).isoformat(timespec="seconds")
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._tick_until_closed, name="progress", daemon=True)
        self._display = LiveDisplay(self) if console.is_terminal else PlainDisplay(self)

    def __enter__(self) -> "ProgressReporter":
        self._display.start()
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close("failed")

    def say(self, text: str) -> None:
        """A line that stays."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def begin(self, name: str, total: int = 0, detail: str = "") -> None:
        """A phase begins; one that counts nothing ends those before it that count nothing."""
        now = self.clock()
        if not total:
            self._end_uncounted(now)
        self.phases[name] = Phase(name, now, total, detail=detail)
        self._display.phase_began(self.phases[name])

    def end(self, name: str) -> None:
        if name in self.phases:
            self.phases[name].ended = self.clock()

    def _end_uncounted(self, now: float) -> None:
        for phase in self.phases.values():
            if not phase.total and phase.ended is None:
                phase.ended = now

    def count(self, name: str, done: float, tokens: int = 0) -> None:
        """`done` of a phase's total, as a sum."""
        phase = self.phases.get(name)
        if phase is None or (not done and not tokens):
            return
        phase.count(self.clock(), min(done, phase.total), tokens)

    def attach(self, storage: Storage, run_id: str, part: str = "") -> None:
        """From now on the output is this job's: status and events go there. `part` names its part of the manifest."""
        from persona_pruner.run.telemetry import EventFiles

        self.run_id, self.part = run_id, part
        self._output = _Output(storage, keys.status(part), EventFiles(storage, part))

    def attach_cluster(
        self, activities: Callable[[], Sequence[Activity]], explain_waiting: Callable[[int], str]
    ) -> None:
        """Ray is up: `activities` is what workers do, `explain_waiting` says what so many waiting groups lack."""
        from persona_pruner.run.telemetry import Metrics

        self._read_activities, self._explain_waiting = activities, explain_waiting
        if self._output is not None:
            self._output.metrics = Metrics()

    def detach_cluster(self) -> None:
        """Ray goes down: touch it no more."""
        with self._ticking:
            self._scheduler_figures()
            self._read_activities, self._explain_waiting, self.waiting_for = list, _no_explanation, ""
            self.doing.clear()
            if self._output is not None:
                self._output.metrics = None

    def train(self, total: int, done_before: int, steps: int) -> None:
        """Training begins: `total` personas, of which `done_before` had their masks; a training has `steps` steps."""
        self.total, self.done_before, self._steps = total, done_before, max(1, steps)

    def changed(self, job: "PersonaJob") -> None:
        """Observer of the scheduler."""
        if job.state == "RUNNING":
            if TRAINING not in self.phases:
                self.begin(TRAINING, self.total - self.done_before)
            self.running[job.persona.id] = job
            return
        self.running.pop(job.persona.id, None)
        if job.state in ("TERMINATED", "ERROR"):
            self.finished.appendleft(job)
        if job.state == "TERMINATED":
            self._masked_since.append(job)

    def turn(self, scheduler: "Scheduler") -> None:
        """Observer of the scheduler."""
        self.scheduler = scheduler

    def _tick_until_closed(self) -> None:
        while not self._ended.wait(TICK_SECONDS):
            self.tick()

    def tick(self) -> None:
        """Bring everything up to date, and tell what is due."""
        with self._ticking:
            self._tick()

    def _tick(self) -> None:
        now = self.clock()
        self._count_activities(self._read_activities())
        self._scheduler_figures()
        masked = []
        while self._masked_since:
            masked.append(self._masked_since.popleft())
        self._display.tick(now, masked)
        output = self._output
        if output is not None:
            for job in masked:
                output.events.masked(job)
            if now >= output.next_status:
                output.next_status = now + STATUS_SECONDS
                self._write(output)

    def _count_activities(self, activities: Sequence[Activity]) -> None:
        self.doing = Counter(activity.phase for activity in activities if activity.phase)
        sums: dict[str, Count] = {}
        for activity in activities:
            for name, value in activity.counts.items():
                sums[name] = sums.get(name, Count()) + value
        for name, value in sums.items():
            self.count(name, value.done, value.tokens)

    def _scheduler_figures(self) -> None:
        scheduler = self.scheduler
        if scheduler is None:
            return
        states = scheduler.states
        running = list(self.running.values())
        partial = sum(min(1.0, job.step / self._steps) for job in running)
        tokens = scheduler.tokens + sum(job.tokens for job in running)
        self.count(TRAINING, states["TERMINATED"] + states["ERROR"] + partial, tokens)
        placing, now = scheduler.pool.placing, self.clock()
        if not placing:
            self.waiting_for = ""
        elif now > self._explained + STATUS_SECONDS:
            self._explained = now
            self.waiting_for = self._explain_waiting(placing)

    def _write(self, output: _Output) -> None:
        status = status_of(self)
        output.events.figures(status)
        if output.metrics is not None:
            output.metrics.write(status)
        try:
            output.storage.put(output.key, json.dumps(status, indent=1).encode())
            output.events.store()
        except StorageError as error:
            self.say(f"status could not be written: {error}")

    def close(self, state: str) -> None:
        """The last word; `state` is done, failed or stopped. Later calls do nothing."""
        if self._ended.is_set():
            return
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
        self.state = state
        self.tick()
        self._display.stop()
        if self._output is not None:
            self._write(self._output)
            self._output.events.close()


def _no_explanation(count: int) -> str:
    return ""
