"""Masks for whoever deploys them: load, pull, verify and share what a run has written.

from persona_pruner import MaskStore
MaskStore("s3://bucket/run").load("alice").apply(model)
"""

import contextlib
import io
import itertools
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from persona_pruner.config.schema import StorageConfig
from persona_pruner.errors import ConfigError, Faults, MaskError, StorageError, UserError
from persona_pruner.manifest import Persona
from persona_pruner.masks.catalog import build_catalog, mask_objects
from persona_pruner.masks.format import Mask, MaskMetadata
from persona_pruner.masks.indices import load_keep_indices
from persona_pruner.masks.weight_mask import WeightMask, read_mask
from persona_pruner.storage import keys
from persona_pruner.storage.base import NotFoundError, Storage, check_key
from persona_pruner.storage.open import open_storage, read_parquet

ORPHAN_SECONDS = 24 * 3600
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
        self.storage.check_readable(keys.MASKS)

    def ids(self) -> list[str]:
        """Personas that have a mask, sorted."""
        return sorted(mask_objects(self.storage))

    def read(self, persona_id: str) -> tuple[bytes, Mask | WeightMask]:
        """A mask and its bytes, verified. Raises MaskError naming the key, NotFoundError."""
        key, data = self._get(persona_id)
        where = f"{self.storage.url}/{key}"
        mask = read_mask(data, where)
        mask.check(where, persona_id=persona_id)
        return data, mask

    def _get(self, persona_id: str) -> tuple[str, bytes]:
        for key in (keys.mask(persona_id), keys.mask_of_format_1(persona_id)):
            with contextlib.suppress(NotFoundError):
                return key, self.storage.get(key)
        raise NotFoundError(f"{self.storage.url}/{keys.mask(persona_id)}: there is no mask of persona {persona_id!r}")

    def load(self, persona_id: str) -> Mask | WeightMask:
        """A mask of FFN channels, or of single weights (learning.method). Raises MaskError, NotFoundError."""
        return self.read(persona_id)[1]

    def load_channels(self, persona_id: str) -> Mask:
        """For what needs a mask of FFN channels. Raises MaskError, also where it is one of single weights."""
        key, data = self._get(persona_id)
        where = f"{self.storage.url}/{key}"
        mask = Mask.from_bytes(data, where)
        mask.check(where, persona_id=persona_id)
        return mask

    def where(self, conditions: Sequence[str]) -> list[str]:
        """Ids of the masks whose metadata and evaluation meet all conditions such as `ratio==0.5` or `judge>=75`; what
        was not evaluated meets no condition on it. Raises ConfigError."""
        table = select(self.table(), conditions)
        return list(table["persona_id"].to_pylist())

    def table(self) -> pa.Table:
        """The catalog with the columns of the evaluation, if there was one; null where a persona was not evaluated."""
        catalog = build_catalog(self.storage, self.config.connections)
        evaluated = read_evaluation(self.storage)
        if evaluated is None:
            return catalog
        return catalog.join(evaluated, "persona_id", join_type="left outer", use_threads=False).sort_by("persona_id")

    def pull(self, persona_ids: Iterable[str], to: Path, *, indices: bool = False) -> Iterator[Pulled]:
        """Copy masks into a directory, `connections` at once, each verified and moved into place whole.

        What is there already and verifies is left alone. With `indices`, <id>.pt for the published exporter is written
        instead. A mask that cannot be pulled does not stop the others: after the last one its fault is raised
        (MaskError, NotFoundError, StorageError), or Faults where there are several.
        """
        target = open_storage(to, self.config)

        def one(persona_id: str) -> Pulled | UserError:
            try:
                return self._pull(persona_id, to, target, indices)
            except (MaskError, StorageError) as error:
                return error

        faults, waiting = [], iter(persona_ids)
        with ThreadPoolExecutor(self.config.connections) as pool:
            # In blocks: the calls that wait in the pool take memory.
            while block := list(itertools.islice(waiting, 64 * self.config.connections)):
                for result in pool.map(one, block):
                    if isinstance(result, Pulled):
                        yield result
                    else:
                        faults.append(result)
        if len(faults) == 1:
            raise faults[0]
        if faults:
            raise Faults([str(fault) for fault in faults])

    def _pull(self, persona_id: str, to: Path, target: Storage, indices: bool) -> Pulled:
        key = f"{persona_id}.pt" if indices else keys.mask(persona_id)
        if not indices and self._verified(target, persona_id):
            return Pulled(persona_id, to / key, False)
        data, _ = self.read(persona_id)
        if indices:
            stream = io.BytesIO()
            self.load_channels(persona_id).save_keep_indices(stream)
            data = stream.getvalue()
        target.put(key, data)
        return Pulled(persona_id, to / key, True)

    def _verified(self, target: Storage, persona_id: str) -> bool:
        key = keys.mask(persona_id)
        try:
            read_mask(target.get(key), key).check(key, persona_id=persona_id)
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
        self.read(persona_id)
        return self.storage.share(self._get(persona_id)[0], seconds)

    def import_indices(
        self,
        path: Path,
        persona: Persona,
        *,
        layers: int,
        channels: int,
        backbone: str,
        backbone_fingerprint: str,
    ) -> Mask:
        """Store an index file of the published code (masks/indices.py) as the mask of a persona.

        `layers` and `channels` are those of the backbone's FFNs. Raises MaskError where the file does not fit them or
        another mask of this persona is there, StorageError.
        """
        key = keys.mask(persona.id)
        check_key(key)
        keep_LI = load_keep_indices(path, channels)
        if len(keep_LI) != layers:
            raise MaskError(f"{path}: has {len(keep_LI)} layers, the backbone {layers}")
        kept = tuple(keep_LI.sum(1).tolist())
        if not any(kept):
            raise MaskError(f"{path}: keeps no channel at all")
        metadata = MaskMetadata(
            persona_id=persona.id, persona_sha256=persona.sha256, persona_description=persona.description,
            backbone=backbone, backbone_fingerprint=backbone_fingerprint, layers=layers, channels=channels, kept=kept,
            method="imported", ratio=1 - sum(kept) / keep_LI.numel(), seed=0, steps=0,
        )  # fmt: skip
        mask = Mask(keep_LI, metadata)
        older = self.storage.exists(keys.mask_of_format_1(persona.id))
        if older or not self.storage.put_if_absent(key, mask.to_bytes()):
            raise MaskError(f"{self.storage.url}/{key}: another mask is there; remove it first")
        return mask


def stored_global_mask(storage: Storage) -> str | None:
    """Key of the one mask for all: of the newest of the comparison, else of the one that the personas start from."""
    stored = sorted(storage.list(keys.GLOBAL_MASKS), key=lambda item: item.modified)
    if stored:
        return stored[-1].key
    return keys.POOLED_MASK if storage.exists(keys.POOLED_MASK) else None


def read_evaluation(storage: Storage) -> pa.Table | None:
    """What the last evaluation says of each persona's mask: one row each; None where there was none."""
    try:
        return read_parquet(storage.get(keys.EVALUATION_SUMMARY))
    except NotFoundError:
        return None


def select(table: pa.Table, conditions: Sequence[str]) -> pa.Table:
    """The rows of a catalog that meet all conditions. Raises ConfigError."""
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
    return table


def garbage(storage: Storage, *, data: bool = False) -> list[str]:
    """Keys that no further run needs: checkpoints, stored answers and errors of personas that have a mask; where
    `data`, their questions and answers too, which `inspect` and the evaluation read. Personas whose mask does not
    verify keep everything."""
    masked = set(build_catalog(storage, columns=(), faults=[]).column("persona_id").to_pylist())
    unneeded = []
    for prefix in (keys.CHECKPOINTS, keys.ANSWERS, keys.ERRORS, *([keys.SYNTHESIS] if data else [])):
        unneeded += [item.key for item in storage.list(prefix) if keys.persona_of(item.key, prefix) in masked]
    return unneeded


def orphans(storage: Storage, remove: bool = False) -> list[str]:
    """Writes that were begun over a day ago and never finished: their writers are dead. Removed where asked."""
    return list(storage.incomplete_writes(time.time() - ORPHAN_SECONDS, remove))
