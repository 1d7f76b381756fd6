"""One job at a time on an output, without a server: leases with rising numbers, made by create-if-absent.

The highest number holds. It is renewed in place; one that is no longer renewed, or whose process is dead on this very
machine, is taken over by creating the next number, which exactly one of several contenders can do. Each part of a
manifest has leases of its own; a job whose part overlaps with that of a working one is refused.
"""

import json
import logging
import os
import socket
import threading
import time
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from persona_pruner.errors import OutputBusyError, StorageError
from persona_pruner.run.part import WHOLE, Part
from persona_pruner.storage import keys
from persona_pruner.storage.base import NotFoundError, Storage

logger = logging.getLogger(__name__)


class Lease:
    """Holds an output from construction to `release`. Raises OutputBusyError where another job works there."""

    def __init__(self, storage: Storage, seconds: float, part: Part = WHOLE) -> None:
        self._storage, self._seconds, self._part = storage, seconds, part
        self._claim = {
            "owner": uuid.uuid4().hex,
            "host": socket.gethostname(),
            "boot": _boot_id(),
            "pid": os.getpid(),
            "job": os.environ.get("RAY_JOB_ID") or os.environ.get("RAY_JOB_SUBMISSION_ID") or "",
            "since": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": seconds,
            "part": [part.number, part.count],
        }
        self._epoch = self._take()
        self._renewed = time.monotonic()
        self.lost = threading.Event()
        """Set when another job has taken over; stop then."""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    def _take(self) -> int:
        while True:
            self._refuse_overlap()
            epochs = sorted(_epochs(self._storage, self._part))
            if epochs:
                holder = _read(self._storage, keys.lease(epochs[-1], self._part.name))
                if holder is not None and not _expired(holder):
                    raise OutputBusyError(self._busy(holder))
            epoch = epochs[-1] + 1 if epochs else 1
            if self._storage.put_if_absent(self._key(epoch), self._body()):
                # A listing taken while another contender took over may have missed both the old number and the new.
                if max(_epochs(self._storage, self._part), default=epoch) > epoch:
                    self._storage.delete(self._key(epoch))
                    continue
                try:
                    self._refuse_overlap()  # again, with our claim in place: of two that overlap, at most one goes on
                except OutputBusyError:
                    self._storage.delete(self._key(epoch))
                    raise
                for old in epochs:
                    self._storage.delete(self._key(old))
                return epoch

    def _refuse_overlap(self) -> None:
        for holder in holders(self._storage).values():
            part = Part(*holder["part"])
            if part != self._part and part.overlaps(self._part):
                raise OutputBusyError(self._busy(holder))

    def _busy(self, holder: dict[str, Any]) -> str:
        part = Part(*holder["part"])
        return (
            f"{self._storage.url}: another job works there"
            f"{'' if part.is_whole else f' on part {part.number}/{part.count}'} since {holder['since']} "
            f"(host {holder['host']}, pid {holder['pid']}{', ' + holder['job'] if holder['job'] else ''}); "
            f"wait for it, stop it, or use another output"
        )

    def _key(self, epoch: int) -> str:
        return keys.lease(epoch, self._part.name)

    def _body(self) -> bytes:
        return json.dumps(self._claim | {"renewed": time.time()}).encode()

    def age(self) -> float:
        """Seconds since the claim was last renewed; beyond `scheduler.lease_seconds` another job may take over."""
        return time.monotonic() - self._renewed

    def _renew(self) -> None:
        while not self._ended.wait(self._seconds / 3):
            try:
                if max(_epochs(self._storage, self._part), default=self._epoch) != self._epoch:
                    self.lost.set()
                    return
                self._storage.put(self._key(self._epoch), self._body())
                self._renewed = time.monotonic()
            except StorageError as error:
                logger.warning("the claim on the output could not be renewed: %s", error)

    def release(self) -> None:
        self._ended.set()
        self._thread.join(timeout=5)
        if not self.lost.is_set():
            try:
                self._storage.delete(self._key(self._epoch))
            except StorageError as error:
                logger.warning("the claim on the output could not be given back: %s", error)

    def __enter__(self) -> "Lease":
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()


def holders(storage: Storage) -> dict[str, dict[str, Any]]:
    """The claims of those that work on this output now, by the name of their part ("" for the whole manifest)."""
    last: dict[str, str] = {}
    for item in storage.list(keys.LEASES):
        last[item.key.removeprefix(keys.LEASES).rpartition("/")[0]] = item.key  # keys come in order
    claims = {part: _read(storage, key) for part, key in last.items()}
    return {part: claim for part, claim in claims.items() if claim is not None and not _expired(claim)}


def _epochs(storage: Storage, part: Part) -> list[int]:
    prefix = keys.lease(0, part.name).rpartition("/")[0] + "/"
    names = (item.key.removeprefix(prefix).removesuffix(".json") for item in storage.list(prefix))
    return [int(name) for name in names if name.isdigit()]


def _read(storage: Storage, key: str) -> dict[str, Any] | None:
    try:
        return {"part": [1, 1]} | json.loads(storage.get(key))
    except (NotFoundError, ValueError):
        return None


def _expired(claim: dict[str, Any]) -> bool:
    if time.time() > claim["renewed"] + claim["seconds"]:
        return True
    return claim["host"] == socket.gethostname() and claim["boot"] == _boot_id() and not _alive(claim["pid"])


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return Path("/proc/self").exists() is False
    return state != "Z"


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
