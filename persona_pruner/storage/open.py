"""Objects under a prefix: a local directory, or a bucket of any S3-compatible server.

Writes are atomic on both. `put_if_absent` decides races: of several writers exactly one sees True. Everything that
goes wrong is a StorageError of one line; transient faults are retried until `storage.deadline_seconds` have passed.
Credentials, region and endpoint come from the standard AWS places (environment, profile, instance role) only.
"""

import contextlib
import errno
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar
from urllib.parse import urlparse

import pyarrow as pa
import pyarrow.parquet as pq
from tenacity import Retrying, retry_if_exception, stop_after_delay, wait_random_exponential

from persona_pruner.config import StorageConfig
from persona_pruner.errors import StorageError

DEFAULTS = StorageConfig()
AT_START = StorageConfig(deadline_seconds=6)
"""For what a command reads before it starts: a wrong endpoint is told within 15 s."""
T = TypeVar("T")
PART = ".part-"
"""Beginning of the names of files that are still being written."""
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

    def delete(self, key: str) -> None:
        """Remove; it is fine if nothing is there."""

    def probe(self) -> None:
        """Raise StorageError within seconds if this place cannot be read and written. Leaves nothing behind."""

    def reach(self, prefix: str = "") -> None:
        """Raise StorageError within seconds if the server cannot be reached or does not let us list `prefix`."""

    def abandoned(self, before: float, remove: bool = False) -> Sequence[str]:
        """Writes begun before that time (Unix seconds) and never finished; removed where asked."""

    def share(self, key: str, seconds: int) -> str:
        """A presigned link that reads `key` without credentials for so long. Raises StorageError on a directory."""


def open_storage(url: str | Path, config: StorageConfig = DEFAULTS) -> Storage:
    """Storage below s3://bucket/prefix or a local directory (made with the first object)."""
    text = str(url)
    if text.startswith("s3://"):
        parsed = urlparse(text)
        if not parsed.netloc:
            raise StorageError(f"{text}: no bucket; write s3://bucket/prefix")
        from persona_pruner.storage_s3 import S3Storage

        return S3Storage(parsed.netloc, parsed.path.strip("/"), config)
    if "://" in text:
        raise StorageError(f"{text}: unknown kind of storage; use a local directory or s3://bucket/prefix")
    return LocalStorage(Path(text).absolute(), config)


def read_url(url: str, config: StorageConfig = AT_START) -> bytes:
    """A local file or an s3:// object. Raises NotFoundError, StorageError."""
    if url.startswith("s3://"):
        parent, _, name = url.rpartition("/")
        return open_storage(parent, config).get(name)
    try:
        return Path(url).read_bytes()
    except FileNotFoundError:
        raise NotFoundError(f"{url}: no such file") from None
    except OSError as error:
        raise StorageError(f"{url}: cannot be read: {error.strerror}") from None


def read_parquet(data: bytes, columns: Sequence[str] | None = None) -> pa.Table:
    """A Parquet file's table, without those of `columns` that it lacks. Raises pyarrow.ArrowException.

    Read in the calling thread: one of Arrow's own threads may be the last to let go of `data`, and where the process
    ends in that moment, it is aborted (std::terminate in the thread that waits for the interpreter's lock).
    """
    return pq.ParquetFile(pa.BufferReader(data)).read(columns=columns, use_threads=False)


def local_copy(url: str, cache: Path | None = None) -> Path:
    """A local path with the content of an s3:// object or prefix; a local path comes back as it is.

    The copy is named by keys, sizes and times of what it holds, so that a changed source is fetched anew.
    """
    if not url.startswith("s3://"):
        return Path(url)
    bucket, _, key = url.removeprefix("s3://").rstrip("/").partition("/")
    source = open_storage(f"s3://{bucket}")
    found = [o for o in source.list(key) if o.size and (o.key == key or o.key.startswith(f"{key}/"))]
    if not found:
        raise NotFoundError(f"{url}: nothing is there")
    version = hashlib.sha256(repr((url, found)).encode()).hexdigest()[:16]
    root = (cache or Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "persona-pruner") / version
    copy = LocalStorage(root, StorageConfig())
    for item in found:
        name = item.key[len(key) - len(Path(key).name) :]
        check_key(name)
        if not copy.exists(name):
            copy.put_pieces(name, partial(_pieces, source, item))
    return root / Path(key).name


def _pieces(source: Storage, item: ObjectInfo) -> Iterator[bytes]:
    """An object, if large in pieces: weights may take more than memory, and more time than one call has."""
    if item.size <= PIECE_BYTES:
        yield source.get(item.key)
        return
    for start in range(0, item.size, PIECE_BYTES):
        yield source.get_range(item.key, start, PIECE_BYTES)


def check_key(key: str) -> None:
    """Raise StorageError unless `key` stays below its prefix on every implementation."""
    parts = key.split("/")
    if not key or "\\" in key or any(ord(c) < 32 for c in key) or any(part in ("", ".", "..") for part in parts):
        raise StorageError(f"key {key!r} would leave its prefix or cannot be stored")


def until_deadline(seconds: float, call: Callable[[], T]) -> T:
    retrying = Retrying(
        retry=retry_if_exception(lambda error: isinstance(error, TransientError)),
        wait=wait_random_exponential(multiplier=0.1, max=3),
        stop=stop_after_delay(seconds),
        reraise=True,
    )
    return retrying(call)


class LocalStorage:
    def __init__(self, root: Path, config: StorageConfig) -> None:
        self.root = root
        self.url = str(root)
        self._seconds = config.deadline_seconds

    def _path(self, key: str) -> Path:
        check_key(key)
        return self.root / key

    def _try(self, key: str, call: Callable[[], T]) -> T:
        def once() -> T:
            try:
                return call()
            except (FileNotFoundError, NotADirectoryError):
                raise NotFoundError(f"{self.url}/{key}: no such object") from None
            except OSError as error:
                kind = TransientError if error.errno in (errno.ENOSPC, errno.EIO, errno.ESTALE) else StorageError
                raise kind(f"{self.url}/{key}: {error.strerror}") from None

        return until_deadline(self._seconds, once)

    def get(self, key: str) -> bytes:
        return self._try(key, self._path(key).read_bytes)

    def get_range(self, key: str, start: int, length: int) -> bytes:
        def call() -> bytes:
            with self._path(key).open("rb") as file:
                file.seek(start)
                return file.read(length)

        return self._try(key, call)

    def put(self, key: str, data: bytes) -> None:
        self._write(key, lambda: (data,), os.replace)

    def put_pieces(self, key: str, pieces: Callable[[], Iterable[bytes]]) -> None:
        """As `put`, of content that does not fit into memory. `pieces` is called again for another try."""
        self._write(key, pieces, os.replace)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        try:
            self._write(key, lambda: (data,), os.link)
        except FileExistsError:
            return False
        return True

    def _write(self, key: str, pieces: Callable[[], Iterable[bytes]], publish: Callable[[str, Path], None]) -> None:
        target = self._path(key)

        def call() -> bool:
            target.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=PART)
            try:
                with os.fdopen(handle, "wb") as file:
                    for piece in pieces():
                        file.write(piece)
                    file.flush()
                    os.fsync(file.fileno())
                os.chmod(temporary, 0o644)
                publish(temporary, target)
            except FileExistsError:
                return False
            finally:
                Path(temporary).unlink(missing_ok=True)
            return True

        if not self._try(key, call):
            raise FileExistsError(key)

    def exists(self, key: str) -> bool:
        return self._path(key).is_file()

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        if directory := prefix.rpartition("/")[0]:
            check_key(directory)
        return self._walk(self.root / prefix.rpartition("/")[0], prefix)

    def _walk(self, directory: Path, prefix: str) -> Iterator[ObjectInfo]:
        try:
            entries = sorted(os.scandir(directory), key=lambda e: f"{e.name}/" if e.is_dir() else e.name)
        except (FileNotFoundError, NotADirectoryError):
            return
        for entry in entries:
            key = Path(entry.path).relative_to(self.root).as_posix()
            if entry.is_dir():
                if f"{key}/".startswith(prefix) or prefix.startswith(f"{key}/"):
                    yield from self._walk(Path(entry.path), prefix)
            elif key.startswith(prefix) and not entry.name.startswith(PART):
                with contextlib.suppress(FileNotFoundError):
                    status = entry.stat()
                    yield ObjectInfo(key, status.st_size, status.st_mtime)

    def delete(self, key: str) -> None:
        path = self._path(key)
        path.unlink(missing_ok=True)
        for parent in path.parents:
            if parent == self.root:
                break
            try:
                parent.rmdir()
            except OSError:
                break

    def probe(self) -> None:
        existing = self.root
        while not existing.exists() and existing != existing.parent:
            existing = existing.parent
        if not existing.is_dir():
            raise StorageError(f"{self.url}: cannot be written: {existing} is no directory")
        try:
            handle, temporary = tempfile.mkstemp(dir=existing, prefix=PART)
            os.close(handle)
            os.unlink(temporary)
        except OSError as error:
            raise StorageError(f"{self.url}: cannot be written: {error.strerror}") from None

    def reach(self, prefix: str = "") -> None:
        return

    def abandoned(self, before: float, remove: bool = False) -> Sequence[str]:
        old = [path for path in sorted(self.root.rglob(f"{PART}*")) if path.stat().st_mtime < before]
        for path in old if remove else ():
            path.unlink(missing_ok=True)
        return [path.relative_to(self.root).as_posix() for path in old]

    def share(self, key: str, seconds: int) -> str:
        raise StorageError(f"{self.url}: links are given by object storage only; use an s3:// output")
