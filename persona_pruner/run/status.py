"""status.json: the document of a job's progress, written while it works, and read by `persona-pruner status`."""

import json
import socket
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from persona_pruner.run.lease import holders
from persona_pruner.run.phases import TRAINING
from persona_pruner.storage import keys
from persona_pruner.storage.base import NotFoundError, Storage, retries

if TYPE_CHECKING:
    from persona_pruner.run.progress import ProgressReporter

TOLD_JOBS = 100
"""Running personas that are listed."""


def status_of(progress: "ProgressReporter") -> dict[str, Any]:
    """The document of a job."""
    now, scheduler = progress.clock(), progress.scheduler
    phases = list(progress.phases.values())
    jobs = {**scheduler.states, "PENDING": scheduler.states["PENDING"] + scheduler.expected} if scheduler else {}
    training = progress.phases.get(TRAINING)
    training_seconds = training.seconds(now) if training else 0.0
    finished = jobs.get("TERMINATED", 0) + jobs.get("ERROR", 0)
    lefts = [left for phase in phases if (left := phase.left(now)) is not None]
    pool = scheduler.pool if scheduler else None
    busy_seconds, up_seconds = (scheduler.busy_seconds, scheduler.pool.up_seconds) if scheduler else (0.0, 0.0)
    return {
        "run_id": progress.run_id,
        "part": progress.part,
        "state": progress.state,
        "host": socket.gethostname(),
        "since": progress.since,
        "updated": datetime.now(UTC).isoformat(timespec="seconds"),
        "personas": progress.total,
        "done_before": progress.done_before,
        "masked": progress.done_before + jobs.get("TERMINATED", 0),
        "jobs": jobs,
        "phases": [phase.to_dict(now) for phase in phases],
        "doing": dict(progress.doing),
        "waiting_for": progress.waiting_for,
        "groups": {
            "up": pool.up if pool else 0,
            "busy": pool.busy if pool else 0,
            "starting": pool.starting if pool else 0,
            "waiting": pool.placing if pool else 0,
        },
        "groups_lost": scheduler.groups_lost if scheduler else 0,
        "retries": scheduler.retries if scheduler else 0,
        "storage_errors": retries.total,
        "lease_age_seconds": round(progress.lease_age(), 1),
        "utilization": round(min(1.0, busy_seconds / up_seconds), 3) if up_seconds else 0.0,
        "tokens": training.tokens if training else 0,
        "tokens_per_second": round(training.tokens_per_second(now), 1) if training else 0.0,
        "personas_per_hour": round(finished / training_seconds * 3600, 1) if training_seconds else 0.0,
        "seconds": round(now - progress.began, 1),
        "eta_seconds": round(max(lefts)) if lefts else None,
        "running": [
            {"id": job.persona.id, "group": job.group, "step": job.step, "heldout_loss": job.heldout_loss}
            for job in list(progress.running.values())[:TOLD_JOBS]
        ],
    }


def read_statuses(storage: Storage) -> list[dict[str, Any]]:
    """The last status of each job (one, or one for each part of the manifest), with `part`, and `holder` where a job
    works there now. Raises NotFoundError where none ever did."""
    claims = holders(storage)
    statuses = []
    for item in storage.list(keys.STATUS.removesuffix(".json")):
        status = dict(json.loads(storage.get(item.key)))
        claim = claims.get(status["part"])
        if claim is None and status["state"] == "running":
            status["state"] = "dead"
        statuses.append(status | {"holder": claim})
    if not statuses:
        raise NotFoundError(f"{storage.url}: no run has worked here ({keys.STATUS} is missing)")
    return statuses


def describe(status: dict[str, Any], output: str) -> Iterator[str]:
    """Lines for a reader."""
    part = f", {status['part']}" if status["part"] else ""
    yield f"{output}{part}: {status['state']}, run {status['run_id']}, last word {status['updated']}"
    if claim := status["holder"]:
        yield f"working: host {claim['host']}, pid {claim['pid']}, since {claim['since']}"
    jobs = ", ".join(f"{count} {name}" for name, count in status["jobs"].items() if count)
    yield f"personas: {status['masked']} of {status['personas']} masked, this job: {jobs or 'nothing yet'}"
    for phase in status["phases"]:
        if phase["total"]:
            rate = f", {phase['tokens_per_second']:,} tokens per second" if phase["tokens"] else ""
            left = f", about {phase['left_seconds']} s left" if phase["left_seconds"] else ""
            yield f"{phase['name']}: {phase['done']:,} of {phase['total']:,} {phase['unit']}{rate}{left}"
        elif not phase["ended"]:
            yield f"{phase['name']}: {phase['seconds']:.0f} s"
    if status["waiting_for"]:
        yield status["waiting_for"]
    groups = status["groups"]
    yield f"groups: {groups['busy']} busy of {groups['up']}, lost {status['groups_lost']}"
    if status["personas_per_hour"]:
        yield f"{status['personas_per_hour']:,} personas per hour, {status['tokens_per_second']:,} tokens per second"
    if status["eta_seconds"] is not None and status["state"] == "running":
        yield f"about {status['eta_seconds']} s left"
