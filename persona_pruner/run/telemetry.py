"""Figures of a run for other programs: TensorBoard events in the output, gauges at Ray's metrics endpoint."""

import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from persona_pruner.scheduling.persona_job import PersonaJob
from persona_pruner.storage import keys
from persona_pruner.storage.base import Storage

PART_BYTES = 256 * 1024
"""A file of events that is larger is followed by another: copying to the output costs at most so much each time."""


class EventFiles:
    """TensorBoard events, written beside and copied to the output: where that has no room, the writer of the events
    would die and leave its caller waiting. TensorBoard reads the parts of one directory one after the other."""

    def __init__(self, storage: Storage, name: str = "", part_bytes: int = PART_BYTES) -> None:
        self._storage, self._name, self._part_bytes = storage, name, part_bytes
        self._directory = Path(tempfile.mkdtemp(prefix="persona-pruner-"))
        self._parts = self._masked = 0
        self._copied = 0
        self._new_part()

    def _new_part(self) -> None:
        from tensorboardX import SummaryWriter

        self._parts += 1
        self._copied = 0
        suffix = f".{self._name}{self._parts:05d}"
        self._writer = SummaryWriter(str(self._directory), filename_suffix=suffix)

    def masked(self, job: PersonaJob) -> None:
        self._masked += 1
        self._writer.add_scalar("mask/seconds", job.seconds, self._masked)
        if job.heldout_loss is not None:
            self._writer.add_scalar("mask/heldout_loss", job.heldout_loss, self._masked)

    def figures(self, status: Mapping[str, Any]) -> None:
        now = int(time.time())
        for state, count in status["jobs"].items():
            self._writer.add_scalar(f"personas/{state}", count, now)
        for name in ("personas_per_hour", "tokens_per_second"):
            self._writer.add_scalar(name, status[name], now)
        for phase in status["phases"]:
            self._writer.add_scalar(f"phase/{phase['name']}", phase["done"], now)

    def store(self) -> None:
        """Copy what is new to the output. Raises StorageError; the next call copies what this one did not."""
        self._writer.flush()
        *_, last = sorted(self._directory.iterdir())
        if last.stat().st_size > self._part_bytes:
            self._writer.close()
            self._new_part()
        *full, last = sorted(self._directory.iterdir())
        for file in full:
            self._storage.put(f"{keys.TENSORBOARD}/{file.name}", file.read_bytes())
            file.unlink()
        size = last.stat().st_size
        if size > self._copied:
            self._storage.put(f"{keys.TENSORBOARD}/{last.name}", last.read_bytes())
            self._copied = size

    def close(self) -> None:
        self._writer.close()
        shutil.rmtree(self._directory, ignore_errors=True)


class Metrics:
    """Gauges at the cluster's metrics endpoint; Ray puts `ray_` before the names."""

    def __init__(self) -> None:
        from ray.util.metrics import Gauge

        self._personas = Gauge("persona_pruner_personas", "Personas by state", tag_keys=("state",))
        self._phases = Gauge("persona_pruner_phase_done", "Units of a phase that are done", tag_keys=("phase",))
        self._gauges = {
            name: Gauge(f"persona_pruner_{name}", text)
            for name, text in (
                ("personas_per_hour", "Personas masked or failed per hour"),
                ("tokens_per_second", "Tokens trained on per second"),
                ("eta_seconds", "Estimated seconds until the last persona is through; 0 where not known"),
                ("retries", "Trainings that were tried again"),
                ("storage_errors", "Storage calls of the driver that failed and were made again"),
                ("lease_age_seconds", "Seconds since the job last renewed its claim on the output"),
                ("groups_lost", "Shard groups that were lost"),
                ("groups_waiting", "Shard groups that wait for resources"),
                ("groups_busy", "Share of shard groups that work"),
            )
        }

    def write(self, status: Mapping[str, Any]) -> None:
        for state, count in status["jobs"].items():
            self._personas.set(count, tags={"state": state})
        for phase in status["phases"]:
            self._phases.set(phase["done"], tags={"phase": phase["name"]})
        groups = status["groups"]
        shares = {"groups_busy": groups["busy"] / max(1, groups["up"]), "groups_waiting": groups["waiting"]}
        for name, gauge in self._gauges.items():
            gauge.set(float((dict(status) | shares)[name] or 0))
