"""catalog.parquet: one row a mask. An index only: it can be made again from the masks at any time."""

import io
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from persona_pruner.masks.format import Mask
from persona_pruner.storage import keys
from persona_pruner.storage.base import NotFoundError, ObjectInfo, Storage
from persona_pruner.storage.open import read_parquet

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
        ("keep", pa.binary()),
    ]
)
"""`kept` counts the kept channels of all layers; `keep` holds their packed bits, so that similarities need no other
object."""


OBJECT = ("persona_id", "key", "size", "modified")


def build_catalog(
    storage: Storage, connections: int = 16, fresh: bool = False, columns: Sequence[str] = tuple(SCHEMA.names)
) -> pa.Table:
    """One row for each mask below `storage`, in order of ids; OBJECT and the `columns` asked for.

    Rows of an existing catalog are taken over where size and time of the object are unchanged, unless `fresh`. Every
    other mask is read and verified. Raises MaskError naming the key of one that does not verify.
    """
    schema = pa.schema([field for field in SCHEMA if field.name in (*OBJECT, *columns)])
    known = {} if fresh else {row["key"]: row for row in read_catalog(storage, schema.names).to_pylist()}
    found = list(mask_objects(storage))

    def row_of(item: ObjectInfo) -> dict[str, Any]:
        old = known.get(item.key)
        if old and (old["size"], old["modified"]) == (item.size, item.modified):
            return old
        return {name: value for name, value in _row(storage, item).items() if name in schema.names}

    with ThreadPoolExecutor(connections) as pool:
        rows = list(pool.map(row_of, found))
    return pa.Table.from_pylist(sorted(rows, key=lambda row: row["persona_id"]), schema)


def mask_objects(storage: Storage) -> Iterator[ObjectInfo]:
    """The mask objects below `storage`."""
    for item in storage.list(keys.MASKS):
        if item.key == keys.mask(keys.persona_of(item.key, keys.MASKS)):
            yield item


def _row(storage: Storage, item: ObjectInfo) -> dict[str, Any]:
    where = f"{storage.url}/{item.key}"
    data = storage.get(item.key)
    mask = Mask.from_bytes(data, where)
    persona_id = keys.persona_of(item.key, keys.MASKS)
    mask.check(where, persona_id=persona_id)
    values = {name: getattr(mask.metadata, name) for name in SCHEMA.names if hasattr(mask.metadata, name)}
    values["kept"] = sum(mask.metadata.kept)
    return values | {"key": item.key, "size": item.size, "modified": item.modified, "keep": mask.packed()}


def read_catalog(storage: Storage, columns: Sequence[str] = tuple(SCHEMA.names)) -> pa.Table:
    """The stored catalog; empty where there is none or it cannot be read."""
    schema = pa.schema([SCHEMA.field(name) for name in columns])
    try:
        table = read_parquet(storage.get(keys.CATALOG), schema.names)
        return table.select(schema.names).cast(schema)
    except (NotFoundError, pa.ArrowException, KeyError, OSError, ValueError):
        return schema.empty_table()


def write_catalog(storage: Storage, table: pa.Table) -> None:
    stream = io.BytesIO()
    pq.write_table(table, stream, compression="zstd")
    storage.put(keys.CATALOG, stream.getvalue())
