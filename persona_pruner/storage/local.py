"""Objects in a local directory."""

import contextlib
import errno
import os
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from persona_pruner.config.schema import StorageConfig
from persona_pruner.errors import StorageError
from persona_pruner.storage.base import NotFoundError, ObjectInfo, T, TransientError, check_key, until_deadline

PART = ".part-"
"""Beginning of the names of files that are still being written."""
THREADS = 8
"""That look at files at once: where directories are not in memory, each look waits for the disk."""
BLOCK = 500
"""Files that one of them looks at in a row."""


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
        return self._walk(f"{directory}/" if directory else "", prefix)

    def _walk(self, directory: str, prefix: str) -> Iterator[ObjectInfo]:
        """`directory` is a key that ends with "/", or empty for all."""
        try:
            with os.scandir(self.root / directory) as scan:
                entries = sorted((f"{entry.name}/" if entry.is_dir() else entry.name, entry) for entry in scan)
        except (FileNotFoundError, NotADirectoryError):
            return
        for name, entry in entries:
            key = directory + name
            if name.endswith("/"):
                if key.startswith(prefix) or prefix.startswith(key):
                    yield from self._walk(key, prefix)
            elif key.startswith(prefix) and not name.startswith(PART):
                with contextlib.suppress(FileNotFoundError):
                    status = entry.stat()
                    yield ObjectInfo(key, status.st_size, status.st_mtime)

    def match(self, *patterns: str) -> Iterator[ObjectInfo]:
        with ThreadPoolExecutor(THREADS) as pool:
            for pattern in patterns:
                *above, name = pattern.split("*")
                places = [""]
                for between in above:
                    places = [
                        f"{place}{between}{child}" for place in places for child in self._children(place + between)
                    ]
                keys = [place + name for place in places]
                blocks = (keys[start : start + BLOCK] for start in range(0, len(keys), BLOCK))
                for items in pool.map(self._files, blocks):
                    yield from items

    def _children(self, directory: str) -> Sequence[str]:
        try:
            return sorted(os.listdir(self.root / directory))
        except (FileNotFoundError, NotADirectoryError):
            return ()

    def _files(self, keys: Iterable[str]) -> Sequence[ObjectInfo]:
        """Those of `keys` that are there."""
        items = []
        for key in keys:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                status = os.stat(f"{self.root}/{key}")
                if stat.S_ISREG(status.st_mode):
                    items.append(ObjectInfo(key, status.st_size, status.st_mtime))
        return items

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

    def check_writable(self) -> None:
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

    def honours_conditions(self) -> bool:
        return True

    def check_readable(self, prefix: str = "") -> None:
        return

    def incomplete_writes(self, before: float, remove: bool = False) -> Sequence[str]:
        parts = (Path(place, name) for place, _, names in os.walk(self.root) for name in names if name.startswith(PART))
        old = [path for path in sorted(parts) if path.stat().st_mtime < before]
        for path in old if remove else ():
            path.unlink(missing_ok=True)
        return [path.relative_to(self.root).as_posix() for path in old]

    def share(self, key: str, seconds: int) -> str:
        raise StorageError(f"{self.url}: links are given by object storage only; use an s3:// output")
