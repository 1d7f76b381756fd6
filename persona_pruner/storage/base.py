"""What every object storage can do, and the errors and retries that its implementations share.

Writes are atomic. `put_if_absent` decides races: of several writers exactly one sees True. Everything that goes wrong
is a StorageError of one line; transient faults are retried until `storage.deadline_seconds` have passed.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol, TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_delay, wait_random_exponential

from persona_pruner.errors import StorageError

T = TypeVar("T")
PIECE_BYTES = 64 * 2**20


class NotFoundError(StorageError):
    """There is no object under this key."""


class TransientError(StorageError):
    """Worth another try before the deadline."""


class ObjectInfo(NamedTuple):
    key: str
    size: int
    modified: float
    """Unix seconds."""


class Storage(Protocol):
    """Keys are relative, with "/" between their parts. Instances can be pickled and shared by threads."""

    url: str

    def get(self, key: str) -> bytes:
        """The whole object, verified where it was stored with its sha256. Raises NotFoundError."""

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """Bytes [start, start + length), fewer where the object ends. Raises NotFoundError."""

    def put(self, key: str, data: bytes) -> None:
        """Store atomically, over whatever is there."""

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Store atomically if nothing is there. False: another object is."""

    def exists(self, key: str) -> bool: ...

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Objects whose key begins with `prefix`, in order of their keys, fetched page by page."""

    def match(self, *patterns: str) -> Iterator[ObjectInfo]:
        """Objects whose key is one of `patterns`, where `*` stands for any whole part of a key, in any order. Among
        many objects cheaper than `list` on a directory, which is not looked into for what else it holds."""

    def delete(self, key: str) -> None:
        """Remove; it is fine if nothing is there."""

    def check_writable(self) -> None:
        """Raise StorageError within seconds if this place cannot be read and written. Leaves nothing behind."""

    def honours_conditions(self) -> bool:
        """Whether `put_if_absent` decides races here. Raises StorageError."""

    def check_readable(self, prefix: str = "") -> None:
        """Raise StorageError within seconds if the server cannot be reached or does not let us list `prefix`."""

    def incomplete_writes(self, before: float, remove: bool = False) -> Sequence[str]:
        """Writes begun before that time (Unix seconds) and never finished; removed where asked."""

    def share(self, key: str, seconds: int) -> str:
        """A presigned link that reads `key` without credentials for so long. Raises StorageError on a directory."""


def check_key(key: str) -> None:
    """Raise StorageError unless `key` stays below its prefix on every implementation."""
    parts = key.split("/")
    if not key or "\\" in key or any(ord(c) < 32 for c in key) or any(part in ("", ".", "..") for part in parts):
        raise StorageError(f"key {key!r} would leave its prefix or cannot be stored")


class RetryCount:
    """Storage calls of this process that failed and were made again."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.total = 0

    def add(self, state: RetryCallState) -> None:
        with self._lock:
            self.total += 1


retries = RetryCount()


def until_deadline(seconds: float, call: Callable[[], T]) -> T:
    retrying = Retrying(
        retry=retry_if_exception(lambda error: isinstance(error, TransientError)),
        wait=wait_random_exponential(multiplier=0.1, max=3),
        stop=stop_after_delay(seconds),
        before_sleep=retries.add,
        reraise=True,
    )
    return retrying(call)
