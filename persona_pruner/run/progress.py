"""What a run tells while it works: a live table or plain lines, status.json, TensorBoard events, Ray metrics."""

import json
import shutil
import tempfile
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from persona_pruner.errors import StorageError
from persona_pruner.run.lease import holder
from persona_pruner.storage import keys
from persona_pruner.storage.base import NotFoundError, Storage

if TYPE_CHECKING:
    # `persona-pruner status` reads through this module: it must not wait for ray and torch.
    from persona_pruner.scheduling.scheduler import Scheduler

STATUS_SECONDS = 5.0
LINE_SECONDS = 10.0
STATES = ("PENDING", "RUNNING", "PAUSED", "TERMINATED", "ERROR")


class ProgressReporter:
    """Called by the scheduler at every turn; writes at its own pace and never holds the scheduler up."""

    def __init__(self, console: Console, storage: Storage, run_id: str, total: int, done: int) -> None:
        self._console, self._storage, self._run_id = console, storage, run_id
        self._total, self._done = total, done
        self._began = time.monotonic()
        self._since = datetime.now(UTC).isoformat(timespec="seconds")
        self._next_status = self._next_line = 0.0
        self._writer: threading.Thread | None = None
        self._live = Live(console=console, refresh_per_second=2) if console.is_terminal else None
        self._board = _Board(storage)
        self._metrics = _Metrics()
        self._told: set[str] = set()
        if self._live:
            self._live.start()

    def __call__(self, scheduler: "Scheduler") -> None:
        now = time.monotonic()
        if self._live:
            self._live.update(self._table(scheduler))
        else:
            self._tell(scheduler, now)
        if now >= self._next_status and not (self._writer and self._writer.is_alive()):
            self._next_status = now + STATUS_SECONDS
            status = self.status(scheduler, "running")
            self._board.write(scheduler)
            self._metrics.write(status)
            self._writer = threading.Thread(target=self._write, args=(status,), daemon=True)
            self._writer.start()

    def close(self, scheduler: "Scheduler", state: str) -> None:
        """The last word; `state` is done, failed or stopped."""
        if self._live:
            self._live.update(self._table(scheduler))
            self._live.stop()
        if self._writer:
            self._writer.join()
        status = self.status(scheduler, state)
        self._board.write(scheduler)
        self._metrics.write(status)
        self._write(status)
        self._board.close()

    def status(self, scheduler: "Scheduler", state: str) -> dict[str, Any]:
        counts = scheduler.states()
        seconds = time.monotonic() - self._began
        finished = counts["TERMINATED"] + counts["ERROR"]
        left = self._total - self._done - finished
        eta = seconds / finished * left if finished else None
        groups = scheduler.pool.groups
        return {
            "run_id": self._run_id,
            "state": state,
            "since": self._since,
            "updated": datetime.now(UTC).isoformat(timespec="seconds"),
            "personas": self._total,
            "done_before": self._done,
            "trials": {name: counts[name] for name in STATES},
            "groups": {"up": sum(g.usable for g in groups), "busy": sum(bool(g.calls) for g in groups)},
            "groups_lost": scheduler.groups_lost,
            "retries": scheduler.retries,
            "utilization": round(min(1.0, scheduler.busy_seconds / max(scheduler.pool.up_seconds, 1e-9)), 3),
            "tokens": scheduler.tokens,
            "tokens_per_second": round(scheduler.tokens / seconds, 1) if seconds else 0.0,
            "personas_per_hour": round(finished / seconds * 3600, 1) if seconds else 0.0,
            "seconds": round(seconds, 1),
            "eta_seconds": None if eta is None else round(eta),
            "running": [
                {"id": t.persona.id, "group": t.group, "step": t.step, "heldout_loss": t.heldout_loss}
                for t in scheduler.trials.values()
                if t.state == "RUNNING"
            ],
        }

    def _write(self, status: dict[str, Any]) -> None:
        try:
            self._storage.put(keys.STATUS, json.dumps(status, indent=1).encode())
            self._board.store()
        except StorageError as error:
            self._console.print(f"status could not be written: {error}", markup=False)

    def _tell(self, scheduler: "Scheduler", now: float) -> None:
        """A line for each persona that is through, and where all is every few seconds."""
        for trial in list(scheduler.trials.values()):
            if trial.state == "TERMINATED" and trial.persona.id not in self._told:
                self._told.add(trial.persona.id)
                loss = "" if trial.heldout_loss is None else f", held-out loss {trial.heldout_loss:.3f}"
                line = f"masked {trial.persona.id}: {trial.step} steps, {trial.seconds:.1f} s{loss}"
                self._console.print(line, markup=False, highlight=False)
        if now >= self._next_line:
            self._next_line = now + LINE_SECONDS
            self._console.print(_line(self.status(scheduler, "running")), markup=False, highlight=False)

    def _table(self, scheduler: "Scheduler") -> Table:
        status = self.status(scheduler, "running")
        table = Table(title=_line(status), title_justify="left")
        for name in ("persona", "state", "group", "step", "held-out loss", "seconds"):
            table.add_column(name, justify="left" if name in ("persona", "state", "group") else "right")
        shown = sorted(scheduler.trials.values(), key=lambda t: STATES.index(t.state) if t.state != "RUNNING" else -1)
        for trial in shown[:12]:
            loss = "" if trial.heldout_loss is None else f"{trial.heldout_loss:.3f}"
            row = (trial.persona.id, trial.state, trial.group or "", str(trial.step), loss, f"{trial.seconds:.0f}")
            table.add_row(*row)
        return table


class _Board:
    """TensorBoard events, written beside and copied to the output: where that has no room, the writer of the events
    would die and leave its caller waiting."""

    def __init__(self, storage: Storage) -> None:
        from tensorboardX import SummaryWriter

        self._storage = storage
        self._directory = Path(tempfile.mkdtemp(prefix="persona-pruner-"))
        self._writer = SummaryWriter(str(self._directory))
        self._seen: set[str] = set()

    def write(self, scheduler: "Scheduler") -> None:
        for name, count in scheduler.states().items():
            self._writer.add_scalar(f"trials/{name}", count, int(time.time()))
        for trial in list(scheduler.trials.values()):
            if trial.state == "TERMINATED" and trial.persona.id not in self._seen and trial.heldout_loss is not None:
                self._seen.add(trial.persona.id)
                self._writer.add_scalar("mask/heldout_loss", trial.heldout_loss, len(self._seen))
                self._writer.add_scalar("mask/seconds", trial.seconds, len(self._seen))
        self._writer.flush()

    def store(self) -> None:
        for file in self._directory.iterdir():
            self._storage.put(f"{keys.TENSORBOARD}/{file.name}", file.read_bytes())

    def close(self) -> None:
        self._writer.close()
        shutil.rmtree(self._directory, ignore_errors=True)


class _Metrics:
    """Gauges at the cluster's metrics endpoint; Ray puts `ray_` before the names."""

    def __init__(self) -> None:
        from ray.util.metrics import Gauge

        self._trials = Gauge("persona_pruner_trials", "Trials by state", tag_keys=("state",))
        self._gauges = {
            name: Gauge(f"persona_pruner_{name}", text)
            for name, text in (
                ("personas_per_hour", "Personas masked or failed in an hour"),
                ("tokens_per_second", "Tokens trained on in a second"),
                ("retries", "Trials that were tried again"),
                ("groups_lost", "Shard groups that were lost"),
                ("groups_busy", "Share of shard groups that work"),
            )
        }

    def write(self, status: dict[str, Any]) -> None:
        for state, count in status["trials"].items():
            self._trials.set(count, tags={"state": state})
        values = status | {"groups_busy": status["groups"]["busy"] / max(1, status["groups"]["up"])}
        for name, gauge in self._gauges.items():
            gauge.set(float(values[name]))


def _line(status: dict[str, Any]) -> str:
    trials = status["trials"]
    done = status["done_before"] + trials["TERMINATED"]
    eta = "" if status["eta_seconds"] is None else f", about {timedelta(seconds=status['eta_seconds'])} left"
    failed = f", {trials['ERROR']} failed" if trials["ERROR"] else ""
    groups = status["groups"]
    return (
        f"{done}/{status['personas']} masked, {trials['RUNNING']} training, {trials['PENDING']} waiting{failed}; "
        f"groups {groups['busy']} busy of {groups['up']}{eta}"
    )


def read_status(storage: Storage) -> dict[str, Any]:
    """The last status of a run, and whether a job works there now. Raises NotFoundError where none ever did."""
    try:
        status = dict(json.loads(storage.get(keys.STATUS)))
    except NotFoundError:
        raise NotFoundError(f"{storage.url}: no run has worked here ({keys.STATUS} is missing)") from None
    claim = holder(storage)
    if claim is None and status["state"] == "running":
        status["state"] = "dead"
    return status | {"holder": claim}
