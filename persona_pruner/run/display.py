"""What a user sees of a run: a live display on a terminal, else plain lines, one per change."""

from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from persona_pruner.run.phases import TRAINING, UNITS, Phase
from persona_pruner.run.status import status_of

if TYPE_CHECKING:
    from persona_pruner.run.progress import ProgressReporter
    from persona_pruner.scheduling.persona_job import PersonaJob

LINE_SECONDS = 10.0
LINES_OF_PERSONAS = 10
"""Personas that have a line of their own, between two lines about all."""


class LiveDisplay:
    """Phases above, the personas in training and those that ended last below; drawn again twice a second."""

    def __init__(self, progress: "ProgressReporter") -> None:
        self._progress = progress
        self._live = Live(console=progress.console, refresh_per_second=2, get_renderable=self.render, transient=False)

    def start(self) -> None:
        self._live.start()

    def stop(self) -> None:
        self._live.stop()

    def phase_began(self, phase: Phase) -> None:
        pass

    def tick(self, now: float, masked: Sequence["PersonaJob"]) -> None:
        pass

    def render(self) -> RenderableType:
        progress = self._progress
        now = progress.clock()
        phases = Table.grid(padding=(0, 2))
        for phase in list(progress.phases.values()):
            mark = "[green]✓[/green]" if phase.ended is not None else "[cyan]▸[/cyan]"
            phases.add_row(mark, phase.name, *_cells(phase, now))
        notes = [Text(note, style="yellow") for note in notes_of(progress)]
        jobs = [*list(progress.running.values())[:12], *list(progress.finished)][:12]
        if not jobs:
            return Group(phases, *notes)
        table = Table(box=None, padding=(0, 2, 0, 0))
        for name in ("persona", "state", "group", "step", "held-out loss", "seconds"):
            table.add_column(name, justify="left" if name in ("persona", "state", "group") else "right")
        for job in jobs:
            loss = "" if job.heldout_loss is None else f"{job.heldout_loss:.3f}"
            table.add_row(job.persona.id, job.state, job.group or "", str(job.step), loss, f"{job.seconds:.0f}")
        return Group(phases, *notes, table)


class PlainDisplay:
    """For logs: a line when a phase begins, for a masked persona, and every few seconds if anything has changed."""

    def __init__(self, progress: "ProgressReporter") -> None:
        self._progress = progress
        self._next_line = 0.0
        self._room = LINES_OF_PERSONAS
        self._more = 0
        self._last: dict[str, str] = {}
        """The last line about each matter, without times."""

    def start(self) -> None:
        pass

    def stop(self) -> None:
        self._summary(self._progress.clock())

    def phase_began(self, phase: Phase) -> None:
        self._say_once("phase", f"{phase.name} ..." if not phase.detail else f"{phase.name}: {phase.detail}")

    def tick(self, now: float, masked: Sequence["PersonaJob"]) -> None:
        for job in masked:
            self._masked(job)
        for note in notes_of(self._progress):
            self._say_once(note, note)
        if now >= self._next_line:
            self._next_line = now + LINE_SECONDS
            self._summary(now)

    def _masked(self, job: "PersonaJob") -> None:
        if not self._room:
            self._more += 1
            return
        self._room -= 1
        loss = "" if job.heldout_loss is None else f", held-out loss {job.heldout_loss:.3f}"
        self._progress.say(f"masked {job.persona.id}: {job.step} steps, {job.seconds:.1f} s{loss}")

    def _summary(self, now: float) -> None:
        if self._more:
            self._progress.say(f"masked {self._more} more")
        self._room, self._more = LINES_OF_PERSONAS, 0
        for phase in list(self._progress.phases.values()):
            if phase.total and phase.done:
                elapsed, left = phase.seconds(now), phase.left(now)
                times = f"; {_time(elapsed)} elapsed"
                times += f", about {_time(left)} left" if left and phase.done < phase.total else ""
                self._say_once(phase.name, line_of(self._progress, phase, now), times)

    def _say_once(self, matter: str, text: str, times: str = "") -> None:
        if self._last.get(matter) != text:
            self._last[matter] = text
            self._progress.say(text + times)


def line_of(progress: "ProgressReporter", phase: Phase, now: float) -> str:
    """Where a counted phase is, without times."""
    if phase.name != TRAINING:
        return f"{phase.name}: {int(phase.done):,} of {phase.total:,} {UNITS.get(phase.name, '')}".rstrip()
    status = status_of(progress)
    jobs, groups = status["jobs"], status["groups"]
    failed = f", {jobs['ERROR']} failed" if jobs["ERROR"] else ""
    return (
        f"{status['masked']} of {status['personas']} masked, {jobs['RUNNING']} training, {jobs['PENDING']} waiting"
        f"{failed}; groups {groups['busy']} busy of {groups['up']}"
    )


def notes_of(progress: "ProgressReporter") -> Iterator[str]:
    """What goes on that no phase counts."""
    for name, workers in sorted(progress.doing.items()):
        yield f"{workers} {'actor' if workers == 1 else 'actors'}: {name}"
    if progress.waiting_for:
        yield progress.waiting_for


def _cells(phase: Phase, now: float) -> tuple[str, str, str, str]:
    """done of total, tokens per second, elapsed, left."""
    count = f"{int(phase.done):,} of {phase.total:,}" if phase.total else phase.detail
    rate = f"{phase.tokens_per_second(now):,.0f} tokens/s" if phase.tokens else ""
    left = phase.left(now)
    return count, rate, f"{_time(phase.seconds(now))} elapsed", f"about {_time(left)} left" if left else ""


def _time(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
