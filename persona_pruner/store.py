"""Masks for whoever deploys them: load, pull, verify and share what a run has written.

from persona_pruner import MaskStore
MaskStore("s3://bucket/run").load("alice").apply(model)
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from persona_pruner import layout
from persona_pruner.catalog import build_catalog, mask_objects
from persona_pruner.config import StorageConfig
from persona_pruner.errors import ConfigError, Faults, MaskError, StorageError
from persona_pruner.mask import Mask
from persona_pruner.storage import NotFoundError, S3Storage, Storage, open_storage

_CONDITION = re.compile(r"\s*(\w+)\s*(==|!=|<=|>=|<|>)\s*(.+?)\s*")
_COMPARE = {
    "==": pc.equal,
    "!=": pc.not_equal,
    "<=": pc.less_equal,
    ">=": pc.greater_equal,
    "<": pc.less,
    ">": pc.greater,
}


@dataclass(frozen=True)
class Pulled:
    persona_id: str
    path: Path
    fresh: bool
    """False where a verified copy was there already."""


class MaskStore:
    """The masks below an output: a local directory (also one that was pulled) or s3://bucket/prefix."""

    def __init__(self, url: str | Path, config: StorageConfig | None = None) -> None:
        self.config = config or StorageConfig()
        self.storage: Storage = open_storage(url, self.config)

    def ids(self) -> list[str]:
        """Personas that have a mask, sorted."""
        return sorted(layout.persona_of(item.key, layout.MASKS) for item in mask_objects(self.storage))

    def read(self, persona_id: str) -> tuple[bytes, Mask]:
        """A mask and its bytes, verified. Raises MaskError naming the key, NotFoundError."""
        key = layout.mask(persona_id)
        where = f"{self.storage.url}/{key}"
        try:
            data = self.storage.get(key)
        except NotFoundError:
            raise NotFoundError(f"{where}: there is no mask of persona {persona_id!r}") from None
        mask = Mask.from_bytes(data, where)
        mask.check(where, persona_id=persona_id)
        return data, mask

    def load(self, persona_id: str) -> Mask:
        return self.read(persona_id)[1]

    def where(self, conditions: Sequence[str]) -> list[str]:
        """Ids of the masks whose metadata meet all conditions such as `ratio==0.5`. Raises ConfigError."""
        table = build_catalog(self.storage, self.config.connections)
        for text in conditions:
            match = _CONDITION.fullmatch(text)
            if not match or match[1] not in table.column_names:
                names = ", ".join(name for name in table.column_names if name != "keep")
                raise ConfigError(f"--where {text!r}: write column==value with a column out of {names}")
            column = table[match[1]]
            value: Any = match[3].strip("'\"")
            try:
                if column.type not in ("string",):
                    value = float(value)
                table = table.filter(_COMPARE[match[2]](column, value))
            except (ValueError, TypeError):
                raise ConfigError(f"--where {text!r}: {match[3]!r} does not fit column {match[1]}") from None
        return list(table["persona_id"].to_pylist())

    def pull(self, persona_ids: Iterable[str], to: Path, *, indices: bool = False) -> Iterator[Pulled]:
        """Copy masks into a directory, `connections` at once, each verified and moved into place whole.

        What is there already and verifies is left alone. With `indices`, <id>.pt for the published exporter is written
        instead. Raises MaskError, NotFoundError, StorageError.
        """
        target = open_storage(to, self.config)

        def one(persona_id: str) -> Pulled:
            key = f"{persona_id}.pt" if indices else layout.mask(persona_id)
            path = to / key
            if not indices and self._verified(target, persona_id):
                return Pulled(persona_id, path, False)
            data, mask = self.read(persona_id)
            if indices:
                import io

                stream = io.BytesIO()
                mask.save_keep_indices(stream)
                data = stream.getvalue()
            target.put(key, data)
            return Pulled(persona_id, path, True)

        with ThreadPoolExecutor(self.config.connections) as pool:
            yield from pool.map(one, persona_ids)

    def _verified(self, target: Storage, persona_id: str) -> bool:
        key = layout.mask(persona_id)
        try:
            Mask.from_bytes(target.get(key), key).check(key, persona_id=persona_id)
        except (MaskError, StorageError):
            return False
        return True

    def verify(self) -> int:
        """Read and check every mask; returns how many there are. Raises Faults with one line for each bad one."""

        def one(persona_id: str) -> str | None:
            try:
                self.read(persona_id)
            except (MaskError, StorageError) as error:
                return str(error)
            return None

        ids = self.ids()
        with ThreadPoolExecutor(self.config.connections) as pool:
            faults = [fault for fault in pool.map(one, ids) if fault]
        if faults:
            raise Faults(faults)
        return len(ids)

    def share(self, persona_id: str, seconds: int) -> str:
        """A link that reads the mask without credentials, for so many seconds."""
        if not isinstance(self.storage, S3Storage):
            raise StorageError(f"{self.storage.url}: links are given by object storage only; use an s3:// output")
        self.read(persona_id)
        return self.storage.share(layout.mask(persona_id), seconds)


def garbage(storage: Storage) -> list[str]:
    """Keys that no further run needs: checkpoints and stored answers of personas that have a mask, their errors and
    training data. Personas whose mask does not verify keep everything."""
    store = MaskStore(storage.url)
    store.storage = storage
    masked = set()
    for persona_id in store.ids():
        try:
            store.read(persona_id)
        except MaskError:
            continue
        masked.add(persona_id)
    found = []
    for prefix in (layout.CHECKPOINTS, layout.ANSWERS, layout.ERRORS, layout.SYNTHESIS):
        found += [item.key for item in storage.list(prefix) if layout.persona_of(item.key, prefix) in masked]
    return found
