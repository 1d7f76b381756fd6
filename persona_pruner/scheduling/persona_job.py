"""The states of a trial (one persona's training), in Tune's words, and the one function that changes them."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from persona_pruner.config.schema import SchedulerConfig
from persona_pruner.manifest import Persona

State = Literal["PENDING", "RUNNING", "PAUSED", "TERMINATED", "ERROR"]
MAX_LOSSES = 10
"""Groups that may die under one persona before it is held to be the cause."""
HOPELESS = frozenset({"empty", "no_data", "bad_data", "row_too_long", "not_finite", "few_answers"})
"""Causes that another try with the same data cannot mend."""


@dataclass(frozen=True)
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


@dataclass(frozen=True)
class Event:
    """What happened to a trial: started on a group, progressed, was paused, is done, failed, lost its
    group, or was returned unstarted by a group that is gone."""

    kind: Literal["started", "progressed", "paused", "done", "failed", "lost", "returned"]
    group: str | None = None
    step: int = 0
    heldout_loss: float | None = None
    seconds: float = 0.0
    tokens: int = 0
    cause: str = ""
    message: str = ""


def transition(trial: PersonaJob, event: Event, settings: SchedulerConfig, now: float) -> PersonaJob:
    """The trial after an event. A lost group does not count against `max_failures`, only against MAX_LOSSES."""
    if event.kind == "started":
        return dataclasses.replace(trial, state="RUNNING", group=event.group)
    if event.kind in ("progressed", "paused", "done"):
        state: State = {"progressed": "RUNNING", "paused": "PAUSED", "done": "TERMINATED"}[event.kind]  # type: ignore[assignment]
        return dataclasses.replace(
            trial,
            state=state,
            step=event.step,
            heldout_loss=event.heldout_loss if event.heldout_loss is not None else trial.heldout_loss,
            seconds=event.seconds,
            tokens=event.tokens,
            group=trial.group if event.kind == "progressed" else None,
        )
    if event.kind == "returned":
        return dataclasses.replace(trial, state="PENDING", group=None)
    told = dataclasses.replace(trial, group=None, cause=event.cause, message=event.message)
    if event.kind == "lost":
        losses = trial.losses + 1
        return dataclasses.replace(told, losses=losses, state="ERROR" if losses > MAX_LOSSES else "PENDING")
    attempts = trial.attempts + 1
    if event.cause in HOPELESS or attempts > settings.max_failures:
        return dataclasses.replace(told, attempts=attempts, state="ERROR")
    wait = settings.backoff_seconds * 2 ** (attempts - 1)
    return dataclasses.replace(told, attempts=attempts, state="PENDING", not_before=now + wait)
