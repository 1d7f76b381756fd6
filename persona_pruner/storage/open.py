"""Storage by its address, and what reads a single file or a whole prefix by its address.

Credentials, region and endpoint come from the standard AWS places (environment, profile, instance role) only.
"""

import hashlib
import io
import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from urllib.parse import urlparse

import pyarrow as pa
import pyarrow.parquet as pq

from persona_pruner.config.schema import StorageConfig
from persona_pruner.errors import StorageError
from persona_pruner.storage.base import PIECE_BYTES, NotFoundError, ObjectInfo, Storage, check_key
from persona_pruner.storage.local import LocalStorage

DEFAULTS = StorageConfig()
WHOLE_BYTES = 2**20
"""A Parquet file up to this size is read in one request, whichever columns are wanted."""
AT_START = StorageConfig(deadline_seconds=6)
"""For what a command reads before it starts: a wrong endpoint is told within 15 s."""


def open_storage(url: str | Path, config: StorageConfig = DEFAULTS) -> Storage:
    """Storage below s3://bucket/prefix or a local directory (made with the first object)."""
    text = str(url)
    if text.startswith("s3://"):
        parsed = urlparse(text)
        if not parsed.netloc:
            raise StorageError(f"{text}: no bucket; write s3://bucket/prefix")
        from persona_pruner.storage.s3 import S3Storage

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


class _Ranges(io.RawIOBase):
    """An object as a file of which only what is asked for is read."""

    def __init__(self, storage: Storage, item: ObjectInfo) -> None:
        self._storage, self._item, self._at = storage, item, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._item.size}[whence]
        return self._at

    def read(self, size: int = -1) -> bytes:
        wanted = self._item.size - self._at if size < 0 else size
        data = self._storage.get_range(self._item.key, self._at, wanted) if wanted else b""
        self._at += len(data)
        return data


def read_parquet_columns(storage: Storage, item: ObjectInfo, columns: Sequence[str]) -> pa.Table:
    """Those columns of a stored Parquet file; of a large one no others are fetched. Raises pyarrow.ArrowException,
    KeyError where a column is missing, StorageError."""
    if item.size <= WHOLE_BYTES:
        table = read_parquet(storage.get(item.key), columns)
    else:
        file = pq.ParquetFile(pa.PythonFile(_Ranges(storage, item), mode="r"))
        table = file.read(columns=list(columns), use_threads=False)
    return table.select(list(columns))


def local_copy(url: str, cache: Path | None = None) -> Path:
    """A local path with the content of an s3:// object or prefix; a local path comes back as it is.

    The copy is named by keys, sizes and times of what it holds, so that a changed source is fetched anew.
    """
    if not url.startswith("s3://"):
        return Path(url)
    bucket, _, key = url.removeprefix("s3://").rstrip("/").partition("/")
    source = open_storage(f"s3://{bucket}")
    objects = [o for o in source.list(key) if o.size and (o.key == key or o.key.startswith(f"{key}/"))]
    if not objects:
        raise NotFoundError(f"{url}: nothing is there")
    version = hashlib.sha256(repr((url, objects)).encode()).hexdigest()[:16]
    root = (cache or Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "persona-pruner") / version
    copy = LocalStorage(root, StorageConfig())
    for item in objects:
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
