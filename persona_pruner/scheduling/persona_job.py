"""The states of a persona's job (the training of its mask), in Tune's words, and the one function that changes them."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from persona_pruner.config.schema import SchedulerConfig
from persona_pruner.learning.outcome import Progress, TrainingResult, TrainingStatus
from persona_pruner.manifest import Persona

State = Literal["PENDING", "RUNNING", "PAUSED", "TERMINATED", "ERROR"]
STATES: tuple[State, ...] = ("PENDING", "RUNNING", "PAUSED", "TERMINATED", "ERROR")
MAX_LOSSES = 10
"""Groups that may die under one persona before it is held to be the cause."""
HOPELESS = frozenset({"empty", "no_data", "bad_data", "row_too_long", "not_finite", "few_answers"})
"""Causes that another try with the same data cannot mend."""


@dataclass(frozen=True, slots=True)
class PersonaJob:
    persona: Persona
    state: State = "PENDING"
    attempts: int = 0
    """Failures of its own making."""
    losses: int = 0
    """Groups that were lost under it."""
    group: str | None = None
    step: int = 0
    heldout_loss: float | None = None
    """Of its mask, nats per token."""
    seconds: float = 0.0
    tokens: int = 0
    not_before: float = 0.0
    """Monotonic time of the next try."""
    cause: str | None = None
    message: str | None = None


@dataclass(frozen=True, slots=True)
class Event:
    """What happened to a job: started on a group, progressed, was paused, is done, failed, lost its group, or was
    returned unstarted by a group that is gone."""

    kind: Literal["started", "progressed", "paused", "done", "failed", "lost", "returned"]
    group: str | None = None
    step: int = 0
    heldout_loss: float | None = None
    seconds: float = 0.0
    tokens: int = 0
    cause: str = ""
    message: str = ""

    @classmethod
    def of_result(cls, result: TrainingResult) -> "Event":
        if result.status is TrainingStatus.FAILED:
            return cls("failed", cause=result.cause, message=result.message)
        kind: Literal["done", "paused"] = "done" if result.status is TrainingStatus.DONE else "paused"
        return cls(
            kind, step=result.step, heldout_loss=result.heldout_loss, seconds=result.seconds, tokens=result.tokens
        )

    @classmethod
    def of_progress(cls, progress: Progress) -> "Event":
        return cls(
            "progressed",
            step=progress.step,
            heldout_loss=progress.heldout_loss,
            seconds=progress.seconds,
            tokens=progress.tokens,
        )


def transition(job: PersonaJob, event: Event, settings: SchedulerConfig, now: float) -> PersonaJob:
    """The job after an event. A lost group does not count against `max_failures`, only against MAX_LOSSES."""
    match event.kind:
        case "started":
            return dataclasses.replace(job, state="RUNNING", group=event.group)
        case "progressed":
            return _measured(job, event, "RUNNING", job.group)
        case "paused":
            return _measured(job, event, "PAUSED", None)
        case "done":
            return _measured(job, event, "TERMINATED", None)
        case "returned":
            return dataclasses.replace(job, state="PENDING", group=None)
        case "lost":
            losses = job.losses + 1
            state: State = "ERROR" if losses > MAX_LOSSES else "PENDING"
            return _blamed(dataclasses.replace(job, losses=losses, state=state), event)
        case "failed":
            attempts = job.attempts + 1
            job = _blamed(dataclasses.replace(job, attempts=attempts), event)
            if event.cause in HOPELESS or attempts > settings.max_failures:
                return dataclasses.replace(job, state="ERROR")
            wait = settings.backoff_seconds * 2 ** (attempts - 1)
            return dataclasses.replace(job, state="PENDING", not_before=now + wait)


def _measured(job: PersonaJob, event: Event, state: State, group: str | None) -> PersonaJob:
    return dataclasses.replace(
        job,
        state=state,
        step=event.step,
        heldout_loss=event.heldout_loss if event.heldout_loss is not None else job.heldout_loss,
        seconds=event.seconds,
        tokens=event.tokens,
        group=group,
    )


def _blamed(job: PersonaJob, event: Event) -> PersonaJob:
    return dataclasses.replace(job, group=None, cause=event.cause, message=event.message)
