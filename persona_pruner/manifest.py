"""The persona rows of a run: JSON Lines, CSV or Parquet, local or s3://. All faults of a file are told in one go."""

import contextlib
import csv
import hashlib
import io
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa

from persona_pruner.errors import ManifestError, StorageError
from persona_pruner.storage.base import NotFoundError
from persona_pruner.storage.open import read_parquet, read_url

ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
ID_RULE = "1 to 128 of A-Z a-z 0-9 . _ -, beginning with a letter or digit"
MAX_DESCRIPTION = 20_000
COLUMNS = ("id", "description", "priority", "metadata", "opposite")


@dataclass(frozen=True)
class Persona:
    id: str
    description: str
    priority: int = 0
    """Higher ones are trained first."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    opposite: "Persona | None" = None
    """Whom the contrastive methods contrast it with; the opposed persona's own one is left out."""

    @property
    def sha256(self) -> str:
        """Hex digest of the description (UTF-8)."""
        return hashlib.sha256(self.description.encode()).hexdigest()


@dataclass(frozen=True)
class Manifest:
    source: str
    personas: tuple[Persona, ...]
    warnings: tuple[str, ...] = ()


def read_manifest(url: str) -> Manifest:
    """Personas in the order of the file. Raises ManifestError with one line a fault, StorageError."""
    try:
        data = read_url(url)
    except NotFoundError:
        raise ManifestError([f"{url}: no such manifest"]) from None
    except StorageError as error:
        if url.startswith("s3://"):
            raise
        raise ManifestError([str(error)]) from None
    faults: list[str] = []
    personas: list[Persona] = []
    warnings: dict[str, str] = {}
    first_seen: dict[str, int] = {}
    opposites: dict[str, str] = {}
    number = 0
    for number, row in _rows(url, data, faults):
        persona = _persona(f"{url}:{number}", row, faults)
        for column in row:
            if column not in COLUMNS:
                warnings.setdefault(
                    column, f"{url}:{number}: column {_short(column)} is not known and ignored; put it under metadata"
                )
        if persona is None:
            continue
        if persona.id in first_seen:
            faults.append(f"{url}:{number}: id {persona.id!r} is already that of row {first_seen[persona.id]}")
        first_seen.setdefault(persona.id, number)
        if row.get("opposite") is not None:
            opposites[persona.id] = row["opposite"]
        personas.append(persona)
    personas = _with_opposites(url, personas, opposites, first_seen, faults)
    if not number and not faults:
        faults.append(f"{url}: holds no persona; write rows of id and description")
    if faults:
        raise ManifestError(faults)
    return Manifest(url, tuple(personas), tuple(warnings.values()))


def check_opposites(personas: Iterable[Persona], method: str) -> None:
    """Raise ManifestError, a line for each, where some have no opposite: `method` contrasts two personas."""
    faults = [
        f"{persona.id}: has no opposite, and learning.method = {method} contrasts two personas; name the id of another "
        "row in the column opposite"
        for persona in personas
        if persona.opposite is None
    ]
    if faults:
        raise ManifestError(faults)


def _with_opposites(
    url: str,
    personas: list[Persona],
    opposites: Mapping[str, Any],
    row_of: Mapping[str, int],
    faults: list[str],
) -> list[Persona]:
    """Each persona with the one that its row names as `opposite`, or else with the only one that names it."""
    by_id = {persona.id: persona for persona in personas}
    named_by: dict[str, list[str]] = {}
    for own, other in opposites.items():
        if not isinstance(other, str) or other not in by_id or other == own:
            faults.append(f"{url}:{row_of[own]}: opposite {_short(other)} must be the id of another row")
        else:
            named_by.setdefault(other, []).append(own)
    for other, owns in named_by.items():
        if other not in opposites and len(owns) > 1:
            faults.append(
                f"{url}:{row_of[other]}: {other!r} is the opposite of {' and '.join(map(repr, owns[:3]))}; name its own"
            )
    if faults:
        return personas
    opposite_of = {other: owns[0] for other, owns in named_by.items()} | dict(opposites)
    return [replace(p, opposite=by_id[opposite_of[p.id]]) if p.id in opposite_of else p for p in personas]


def _rows(url: str, data: bytes, faults: list[str]) -> Iterable[tuple[int, dict[str, Any]]]:
    """(row, values): the line of a JSONL or CSV file, the row of a Parquet file from 1."""
    kind = PurePosixPath(url).suffix.lower()
    if kind == ".parquet":
        yield from _parquet_rows(url, data, faults)
        return
    if kind not in (".jsonl", ".ndjson", ".json", ".csv"):
        faults.append(f"{url}: unknown kind of manifest {kind!r}; use .jsonl, .csv or .parquet")
        return
    if kind == ".csv":
        text = _decoded(url, 1, data, 0, faults)
        if text is not None:
            yield from _csv_rows(url, text.removeprefix("\ufeff"), faults)
        return
    offset = 0
    for number, line in enumerate(data.split(b"\n"), 1):
        text = _decoded(url, number, line, offset, faults)
        offset += len(line) + 1
        if text is None or not (text := text.removeprefix("\ufeff").strip()):
            continue
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            faults.append(f"{url}:{number}: broken JSON: {error}")
            continue
        if isinstance(row, dict):
            yield number, row
        else:
            faults.append(f"{url}:{number}: must be an object with id and description, not {type(row).__name__}")


def _decoded(url: str, row: int, data: bytes, offset: int, faults: list[str]) -> str | None:
    """Text of `data`, which begins at `row` and byte `offset` of the file; None and a fault where it is not UTF-8."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        row += data.count(b"\n", 0, error.start)
        byte = f"byte 0x{data[error.start]:02x} at offset {offset + error.start}"
        faults.append(f"{url}:{row}: not UTF-8: {byte}; save the file as UTF-8")
        return None


def _parquet_rows(url: str, data: bytes, faults: list[str]) -> Iterable[tuple[int, dict[str, Any]]]:
    try:
        table = read_parquet(data)
        rows = table.to_pylist()
    except UnicodeDecodeError as error:
        faults.append(f"{url}: holds text that is not UTF-8: byte 0x{error.object[error.start]:02x}")
        return
    except (pa.ArrowException, OSError) as error:
        faults.append(f"{url}: not a readable Parquet file: {str(error).splitlines()[0]}")
        return
    if _has_columns(url, table.column_names, faults):
        yield from enumerate(rows, 1)


def _csv_rows(url: str, text: str, faults: list[str]) -> Iterable[tuple[int, dict[str, Any]]]:
    csv.field_size_limit(2**31 - 1)
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        if reader.fieldnames is None or not _has_columns(url, reader.fieldnames, faults):
            return
        for row in reader:
            if None in row:
                faults.append(f"{url}:{reader.line_num}: has more fields than the header; quote text that holds commas")
                continue
            values: dict[str, Any] = {name: value for name, value in row.items() if value not in (None, "")}
            for name, read in (("priority", int), ("metadata", json.loads)):
                with contextlib.suppress(ValueError):
                    if name in values:
                        values[name] = read(values[name])
            yield reader.line_num, values
    except csv.Error as error:
        faults.append(f"{url}:{reader.line_num}: broken CSV: {error}")


def _has_columns(url: str, names: Iterable[str], faults: list[str]) -> bool:
    missing = [name for name in ("id", "description") if name not in names]
    if missing:
        faults.append(f"{url}: no column {' and '.join(missing)}; found {', '.join(map(str, names))}")
    return not missing


def _persona(where: str, row: Mapping[str, Any], faults: list[str]) -> Persona | None:
    before = len(faults)
    identity, description = row.get("id"), row.get("description")
    if "id" not in row or identity is None:
        faults.append(f"{where}: id is missing")
    elif not isinstance(identity, str) or not ID.fullmatch(identity):
        faults.append(f"{where}: id {_short(identity)} is not usable: {ID_RULE}")
    if "description" not in row or description is None:
        faults.append(f"{where}: description is missing")
    elif not isinstance(description, str) or not description.strip():
        faults.append(f"{where}: description is {_short(description)}; it must be text")
    elif len(description) > MAX_DESCRIPTION:
        faults.append(
            f"{where}: description has {len(description):,} characters, at most {MAX_DESCRIPTION:,} are allowed"
        )
    elif "\0" in description:
        faults.append(f"{where}: description holds a null byte")
    elif any("\ud800" <= character <= "\udfff" for character in description):
        faults.append(f"{where}: description holds half of a surrogate pair, which is no text")
    priority, metadata = row.get("priority"), row.get("metadata")
    if priority is not None and (not isinstance(priority, int) or isinstance(priority, bool)):
        faults.append(f"{where}: priority {_short(priority)} must be a whole number")
    if metadata is not None and not isinstance(metadata, Mapping):
        faults.append(f"{where}: metadata {_short(metadata)} must be an object")
    if len(faults) > before:
        return None
    return Persona(str(identity), str(description), priority or 0, metadata or {})


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
