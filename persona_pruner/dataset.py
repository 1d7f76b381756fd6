"""The rows that a mask learns from: one Parquet file per persona with what it was asked, what it answered, why that
question, and what it is used for."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from persona_pruner.config.schema import RunConfig
from persona_pruner.errors import ConfigError, PersonaError
from persona_pruner.manifest import Persona
from persona_pruner.storage import keys
from persona_pruner.storage.base import NotFoundError, Storage
from persona_pruner.storage.open import read_parquet, read_url

EXAMPLE_ROWS = Path(__file__).parent / "example" / "instructions.jsonl"


@dataclass(frozen=True)
class Row:
    question: str
    answer: str
    finished: bool = True
    """False where the answer was cut off at the token limit: nobody knows its end, so no end token is learned."""
    earlier: tuple[tuple[str, str], ...] = ()
    """Questions and answers before it in the same conversation, the oldest first. They are read, not learned."""


@dataclass(frozen=True)
class PersonaData:
    """What one persona learns from. `sha256` is the digest of its rows (hex)."""

    persona_id: str
    description: str
    train: tuple[Row, ...]
    heldout: tuple[Row, ...]
    sha256: str
    opposite: "PersonaData | None" = None
    """Of the opposed persona, for the methods that contrast two."""


SCHEMA = pa.schema(
    [
        ("question_id", pa.string()),
        ("question", pa.string()),
        ("original_answer", pa.string()),
        ("answer", pa.string()),
        ("score", pa.float32()),
        ("backend", pa.string()),
        ("model", pa.string()),
        ("filter", pa.string()),
        ("split", pa.string()),
        ("sample", pa.int32()),
        ("earlier", pa.list_(pa.list_(pa.string()))),
    ]
)
"""`earlier`: pairs of question and answer before it in the same conversation; null or empty where there are none."""
USABLE = "ok"
"""Value of the column `filter` of an answer without fault."""
CUT_OFF = "cut_off"
"""The same where the only fault is that the answer was cut off at the token limit."""
GENERIC_COLUMNS = (("question", "instruction"), ("answer", "output"))
NOT_SELECTED = "not_selected"
"""The same of a question that was scored and neither selected nor answered."""


def split_of(question_id: str, heldout_fraction: float) -> str:
    """heldout or train, decided by the question's hash alone."""
    return "heldout" if int(question_id[:8], 16) < heldout_fraction * 2**32 else "train"


def uses_unfinished_answers(config: RunConfig) -> bool:
    """Whether rows count whose answer was cut off: distillation compares next tokens, and those are there."""
    return config.learning.objective.distillation > 0


def read_table(storage: Storage, persona_id: str) -> pa.Table:
    """The stored rows. Raises PersonaError (no_data, bad_data)."""
    key = keys.persona_data(persona_id)
    try:
        table = read_parquet(storage.get(key))
        if "earlier" not in table.column_names:  # made by a release that knew no conversations
            table = table.append_column(SCHEMA.field("earlier"), pa.nulls(len(table), SCHEMA.field("earlier").type))
        return table.select(SCHEMA.names).cast(SCHEMA.with_metadata(table.schema.metadata))
    except NotFoundError:
        raise PersonaError("no_data", f"{storage.url}/{key}: not there; synthesize first") from None
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise PersonaError("bad_data", f"{storage.url}/{key}: not usable: {str(error).splitlines()[0]}") from None


def is_current(storage: Storage, persona: Persona) -> bool:
    """Whether the stored data are of this description."""
    try:
        metadata = read_table(storage, persona.id).schema.metadata or {}
    except PersonaError:
        return False
    return metadata.get(b"persona_sha256", b"").decode() == persona.sha256


def read_persona_data(storage: Storage, persona: Persona, *, unfinished: bool = False) -> PersonaData:
    """Usable rows by split; with `unfinished` also those whose answer was cut off.

    Raises PersonaError (no_data, bad_data, empty).
    """
    table = read_table(storage, persona.id)
    usable = {USABLE, CUT_OFF} if unfinished else {USABLE}
    splits: dict[str, list[Row]] = {"train": [], "heldout": []}
    digest = hashlib.sha256()
    for row in table.to_pylist():
        if row["filter"] not in usable or row["split"] not in splits:
            continue
        if not row["question"] or not row["answer"]:
            raise PersonaError("bad_data", f"{keys.persona_data(persona.id)}: a row has no question or no answer")
        finished = row["filter"] != CUT_OFF
        earlier = tuple((asked, answered) for asked, answered in row["earlier"] or ())
        splits[row["split"]].append(Row(row["question"], row["answer"], finished, earlier))
        end = "" if finished else "\0unfinished"
        end += f"\0{json.dumps(earlier)}" if earlier else ""
        digest.update(f"{row['split']}\0{row['question']}\0{row['answer']}{end}\n".encode())
    if not splits["train"]:
        raise PersonaError("empty", f"{keys.persona_data(persona.id)}: holds no usable row to train on")
    return PersonaData(
        persona.id, persona.description, tuple(splits["train"]), tuple(splits["heldout"]), digest.hexdigest()
    )


def read_generic_rows(path: str | None) -> tuple[Row, ...]:
    """Rows of text without a persona, from JSON Lines; the shipped example's where `path` is None.

    Raises ConfigError with file and line.
    """
    where = str(path or EXAMPLE_ROWS)
    rows = []
    try:
        lines = read_url(where).decode("utf-8").splitlines()
    except (NotFoundError, UnicodeDecodeError) as error:
        raise ConfigError(f"learning.objective.generic_rows = {where!r}: {error}") from None
    for number, line in enumerate(lines, 1):
        try:
            value = json.loads(line)
            question, answer = (str(value[a] if a in value else value[b]) for a, b in GENERIC_COLUMNS)
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{where}:{number}: no row of question and answer, or instruction and output: {error}"
            ) from None
        if question and answer:
            rows.append(Row(question, answer))
    if not rows:
        raise ConfigError(f"learning.objective.generic_rows = {where!r}: has no row with a question and an answer")
    return tuple(rows)
