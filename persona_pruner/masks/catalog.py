"""The catalog: one row per mask, in Parquet files below catalog/ that are never changed, only replaced.

An index only: it can be made again from the masks at any time. An update lists the masks, reads those that no part
holds as they are now, and writes new parts for them and for what is left of parts with rows that are out of date.
"""

import hashlib
import io
import itertools
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from persona_pruner.errors import MaskError
from persona_pruner.storage import keys
from persona_pruner.storage.base import NotFoundError, ObjectInfo, Storage
from persona_pruner.storage.open import read_parquet_columns

if TYPE_CHECKING:
    from persona_pruner.masks.format import Mask

T = TypeVar("T")

SCHEMA = pa.schema(
    [
        ("persona_id", pa.string()),
        ("key", pa.string()),
        ("size", pa.int64()),
        ("modified", pa.float64()),
        ("persona_sha256", pa.string()),
        ("backbone", pa.string()),
        ("backbone_fingerprint", pa.string()),
        ("run_id", pa.string()),
        ("method", pa.string()),
        ("ratio", pa.float64()),
        ("layers", pa.int32()),
        ("channels", pa.int32()),
        ("kept", pa.int64()),
        ("seed", pa.int64()),
        ("steps", pa.int32()),
        ("unpruned_loss", pa.float64()),
        ("masked_loss", pa.float64()),
        ("data_sha256", pa.string()),
        ("opposite_sha256", pa.string()),
        ("recovery_loss_before", pa.float64()),
        ("recovery_loss_after", pa.float64()),
        ("keep", pa.binary()),
    ]
)
"""`kept` counts the kept channels of all layers; `keep` holds their packed bits, so that similarities need no other
object. A mask of single weights has no layers, channels and bits here, and `kept` counts its weights."""


OBJECT = ("persona_id", "key", "size", "modified")
METADATA = tuple(name for name in SCHEMA.names if name != "keep")
PART_ROWS = 2048
"""Rows of a part at most: some 60 MB with the bits of 28 x 8192 channels."""
MAX_UPDATES = 20
SMALL_PARTS = 8
"""So many parts that are less than half full are put together, so that many small updates leave few parts."""


@dataclass(frozen=True)
class _Part:
    item: ObjectInfo
    rows: pa.Table
    current: pa.Array
    """Rows of masks that are still as they were."""


def mask_objects(storage: Storage) -> dict[str, ObjectInfo]:
    """Persona id to mask object, of all masks below `storage`."""
    masks: dict[str, ObjectInfo] = {}
    for item in storage.match(*keys.EVERY_MASK):
        persona_id = keys.persona_of_mask(item.key)
        if persona_id is not None and (persona_id not in masks or item.key == keys.mask(persona_id)):
            masks[persona_id] = item
    return masks


def build_catalog(
    storage: Storage,
    connections: int = 16,
    columns: Sequence[str] = METADATA,
    faults: list[str] | None = None,
) -> pa.Table:
    """One row for each mask that is there now, in order of ids: OBJECT and the `columns` asked for. Writes nothing.

    Masks that no stored part holds as they are now are read and verified. One that does not verify is left out and
    its fault is added to `faults`; where that is None, MaskError is raised.
    """
    schema = pa.schema([field for field in SCHEMA if field.name in (*OBJECT, *columns)])
    masks = mask_objects(storage)
    parts = _read_parts(storage, masks, schema.names, connections)
    rows = list(_read_rows(storage, _unknown(masks, parts), connections, schema.names, faults))
    tables = [part.rows.take(part.current) for part in parts]
    return pa.concat_tables([*tables, pa.Table.from_pylist(rows, schema)]).sort_by("persona_id")


def update_catalog(storage: Storage, connections: int = 16, fresh: bool = False, again: Collection[str] = ()) -> int:
    """Bring the stored parts up to date, or make them all again (`fresh`); returns how many masks there are.
    The rows of `again` are made again though their masks have not changed.

    Only masks that are new or changed are read. Jobs on parts of a manifest may do this at the same time: who has
    deleted parts looks again, since another may have deleted those that held the same rows. Raises MaskError naming
    the key of one that does not verify; nothing is deleted then.
    """
    for attempt in range(1, MAX_UPDATES + 1):
        try:
            count, deleted = _update(storage, connections, fresh, set(again))
        except NotFoundError:  # a part that another job has just replaced
            if attempt == MAX_UPDATES:
                raise
            continue
        if not deleted:
            break
        fresh, again = False, ()
    return count


def _update(storage: Storage, connections: int, fresh: bool, again: Set[str]) -> tuple[int, bool]:
    """How many masks there are, and whether parts were deleted."""
    masks = mask_objects(storage)
    unchanged = {persona_id: item for persona_id, item in masks.items() if persona_id not in again}
    parts = _read_parts(storage, unchanged, OBJECT, connections)
    if fresh:
        replaced = parts
        unknown: list[ObjectInfo] = list(masks.values())
    else:
        replaced = [part for part in parts if len(part.current) < max(part.rows.num_rows, 1)]
        small = [part for part in parts if part not in replaced and len(part.current) < PART_ROWS // 2]
        replaced += small if len(small) >= SMALL_PARTS else []
        unknown = _unknown(masks, parts)
    carried = (row for part in replaced for row in _carried(storage, part)) if not fresh else ()
    written = {
        _write_part(storage, rows)
        for rows in _batches(itertools.chain(carried, _read_rows(storage, unknown, connections, SCHEMA.names)))
    }
    unneeded = [part.item.key for part in replaced if part.item.key not in written]
    if storage.exists(keys.CATALOG_OF_FORMAT_1):
        unneeded.append(keys.CATALOG_OF_FORMAT_1)
    for key in unneeded:
        storage.delete(key)
    return len(masks), bool(unneeded)


def _read_parts(
    storage: Storage, masks: Mapping[str, ObjectInfo], columns: Sequence[str], connections: int
) -> list[_Part]:
    """All stored parts; of two rows of one mask the first is current. One that cannot be read counts as empty."""
    schema = pa.schema([SCHEMA.field(name) for name in columns])

    def read(item: ObjectInfo) -> pa.Table:
        try:
            return read_parquet_columns(storage, item, schema.names).cast(schema)
        except (NotFoundError, pa.ArrowException, KeyError, OSError, ValueError):
            return schema.empty_table()

    items = list(storage.list(keys.CATALOG))
    with ThreadPoolExecutor(connections) as pool:
        tables = list(pool.map(read, items))
    taken: set[str] = set()
    parts = []
    for item, table in zip(items, tables, strict=True):
        current = []
        objects = zip(*(table.column(name).to_pylist() for name in OBJECT), strict=True)
        for number, (persona_id, *stored) in enumerate(objects):
            if persona_id not in taken and persona_id in masks and tuple(stored) == masks[persona_id]:
                taken.add(persona_id)
                current.append(number)
        parts.append(_Part(item, table, pa.array(current, pa.int64())))
    return parts


def _unknown(masks: Mapping[str, ObjectInfo], parts: Sequence[_Part]) -> list[ObjectInfo]:
    known = {name for part in parts for name in part.rows.column("persona_id").take(part.current).to_pylist()}
    return [item for persona_id, item in masks.items() if persona_id not in known]


def _carried(storage: Storage, part: _Part) -> Iterator[dict[str, Any]]:
    """The rows of a part that are still right, in full."""
    if len(part.current):
        yield from read_parquet_columns(storage, part.item, SCHEMA.names).take(part.current).to_pylist()


def _read_rows(
    storage: Storage,
    items: Sequence[ObjectInfo],
    connections: int,
    columns: Sequence[str],
    faults: list[str] | None = None,
) -> Iterator[dict[str, Any]]:
    """Rows of masks that are read and verified, a block at a time: what waits in a pool takes memory."""

    tuned = {keys.persona_of(item.key, keys.RECOVERED) for item in storage.list(keys.RECOVERED)} if items else set()

    def read(item: ObjectInfo) -> dict[str, Any] | None:
        try:
            row = _row(storage, item, keys.persona_of_mask(item.key) in tuned)
            return {name: value for name, value in row.items() if name in columns}
        except MaskError as error:
            if faults is None:
                raise
            faults.append(str(error))
            return None

    with ThreadPoolExecutor(connections) as pool:
        for block in _batches(items):
            yield from (row for row in pool.map(read, block) if row is not None)


def _row(storage: Storage, item: ObjectInfo, tuned: bool) -> dict[str, Any]:
    # torch takes seconds to import, and most rows are in a part
    from persona_pruner.masks.weight_mask import WeightMask, read_mask

    where = f"{storage.url}/{item.key}"
    mask = read_mask(storage.get(item.key), where)
    mask.check(where, persona_id=keys.persona_of_mask(item.key))
    values = {name: getattr(mask.metadata, name, None) for name in SCHEMA.names}
    if isinstance(mask, WeightMask):
        values["kept"] = sum(rows * kept for rows, _, kept in mask.metadata.matrices.values())
    else:
        values |= {"kept": sum(mask.metadata.kept), "keep": mask.packed()}
        values |= _recovery(storage, mask) if tuned else {}
    return values | {"key": item.key, "size": item.size, "modified": item.modified}


def _recovery(storage: Storage, mask: "Mask") -> dict[str, float | None]:
    """Held-out losses before and after the tuning of this very mask's model, where there was one."""
    result = json.loads(storage.get(keys.recovered(mask.metadata.persona_id)))
    if result["keep_sha256"] != hashlib.sha256(mask.packed()).hexdigest():
        return {}
    return {f"recovery_{name}": result[name] for name in ("loss_before", "loss_after")}


def _batches(values: Iterable[T]) -> Iterator[list[T]]:
    iterator = iter(values)
    while batch := list(itertools.islice(iterator, PART_ROWS)):
        yield batch


def _write_part(storage: Storage, rows: Sequence[Mapping[str, Any]]) -> str:
    """Store rows under a name made of their content, so that a part is never changed. Returns its key."""
    stream = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows), SCHEMA), stream, compression="zstd", use_dictionary=list(METADATA))
    data = stream.getvalue()
    key = keys.catalog_part(hashlib.sha256(data).hexdigest()[:16])
    storage.put(key, data)
    return key
