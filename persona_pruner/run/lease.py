"""One job at a time on an output, without a server: leases with rising numbers, made by create-if-absent.

The highest number holds. It is renewed in place; one that is no longer renewed, or whose process is dead on this very
machine, is taken over by creating the next number, which exactly one of several contenders can do.
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
from persona_pruner.storage import keys
from persona_pruner.storage.base import NotFoundError, Storage

logger = logging.getLogger(__name__)


class Lease:
    """Holds an output from construction to `release`. Raises OutputBusyError where another job works there."""

    def __init__(self, storage: Storage, seconds: float) -> None:
        self._storage, self._seconds = storage, seconds
        self._claim = {
            "owner": uuid.uuid4().hex,
            "host": socket.gethostname(),
            "boot": _boot_id(),
            "pid": os.getpid(),
            "job": os.environ.get("RAY_JOB_ID") or os.environ.get("RAY_JOB_SUBMISSION_ID") or "",
            "since": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": seconds,
        }
        self._epoch = self._take()
        self.lost = threading.Event()
        """Set when another job has taken over; stop then."""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    def _take(self) -> int:
        while True:
            epochs = sorted(_epochs(self._storage))
            if epochs:
                holder = _read(self._storage, epochs[-1])
                if holder is not None and not _expired(holder):
                    raise OutputBusyError(
                        f"{self._storage.url}: another job works there since {holder['since']} "
                        f"(host {holder['host']}, pid {holder['pid']}{', ' + holder['job'] if holder['job'] else ''}); "
                        f"wait for it, stop it, or use another output"
                    )
            epoch = epochs[-1] + 1 if epochs else 1
            if self._storage.put_if_absent(keys.lease(epoch), self._body()):
                # A listing taken while another contender took over may have missed both the old number and the new.
                if max(_epochs(self._storage), default=epoch) > epoch:
                    self._storage.delete(keys.lease(epoch))
                    continue
                for old in epochs:
                    self._storage.delete(keys.lease(old))
                return epoch

    def _body(self) -> bytes:
        return json.dumps(self._claim | {"renewed": time.time()}).encode()

    def _renew(self) -> None:
        while not self._ended.wait(self._seconds / 3):
            try:
                if max(_epochs(self._storage), default=self._epoch) != self._epoch:
                    self.lost.set()
                    return
                self._storage.put(keys.lease(self._epoch), self._body())
            except StorageError as error:
                logger.warning("the claim on the output could not be renewed: %s", error)

    def release(self) -> None:
        self._ended.set()
        self._thread.join(timeout=5)
        if not self.lost.is_set():
            try:
                self._storage.delete(keys.lease(self._epoch))
            except StorageError as error:
                logger.warning("the claim on the output could not be given back: %s", error)

    def __enter__(self) -> "Lease":
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()


def holder(storage: Storage) -> dict[str, Any] | None:
    """Who works on this output now, or None."""
    epochs = list(_epochs(storage))
    found = _read(storage, max(epochs)) if epochs else None
    return None if found is None or _expired(found) else found


def _epochs(storage: Storage) -> list[int]:
    names = (item.key.removeprefix(keys.LEASES).removesuffix(".json") for item in storage.list(keys.LEASES))
    return [int(name) for name in names if name.isdigit()]


def _read(storage: Storage, epoch: int) -> dict[str, Any] | None:
    try:
        return dict(json.loads(storage.get(keys.lease(epoch))))
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
