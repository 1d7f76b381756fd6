"""The question set: instruction data of several sources, mixed, deduplicated, with ids that never change."""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from persona_pruner.config.schema import SourceConfig, SynthesisConfig
from persona_pruner.errors import SourceError
from persona_pruner.storage.base import NotFoundError
from persona_pruner.storage.open import local_copy

_FORMATS = {".jsonl": "json", ".json": "json", ".ndjson": "json", ".csv": "csv", ".parquet": "parquet"}
MAX_CHARACTERS = 100_000


@dataclass(frozen=True)
class Question:
    id: str
    """First 16 hex digits of the sha256 of the text with its white space normalised."""
    text: str
    """Instruction and input, joined as the source says."""
    answer: str | None
    """The source's own answer."""
    key: str = ""
    """Instruction and input as questions are compared, however they are joined: see `comparison_key`."""
    earlier: tuple[tuple[str, str], ...] = ()
    """Questions and answers before it in the same conversation."""


def normalize_whitespace(text: str) -> str:
    """Every run of white space as one space, none at the ends."""
    return " ".join(text.split())


def comparison_key(instruction: str, extra: str = "") -> str:
    """What two questions have in common when they are the same, whatever stands between instruction and input."""
    return normalize_whitespace(f"{instruction} {extra}")


def question_id(text: str) -> str:
    return hashlib.sha256(normalize_whitespace(text).encode()).hexdigest()[:16]


def load_question_set(config: SynthesisConfig) -> list[Question]:
    """All questions in an order that depends on the sources, weights and seed only. Raises SourceError."""
    if not config.sources:
        raise SourceError("synthesis.sources is empty; name at least one file or data set of questions")
    seen: set[str] = set()
    by_source: list[list[Question]] = []
    for source in config.sources:
        new: dict[str, Question] = {}
        for question in _read(source):
            if question.id not in seen:
                new.setdefault(question.id, question)
        by_source.append(list(new.values()))
        seen |= new.keys()
    limit = config.max_questions
    if limit is not None and limit < sum(map(len, by_source)):
        by_source = _cut(by_source, [source.weight for source in config.sources], limit, config.seed)
    return [question for questions in by_source for question in questions]


def _cut(by_source: list[list[Question]], weights: Sequence[float], limit: int, seed: int) -> list[list[Question]]:
    """`limit` questions in all, shares by weight; what a small source cannot give the others do."""
    taken = [0] * len(by_source)
    for _ in range(limit):
        unexhausted = [i for i, questions in enumerate(by_source) if taken[i] < len(questions)]
        taken[min(unexhausted, key=lambda i: (taken[i] + 1) / weights[i])] += 1
    drawn = []
    for questions, count in zip(by_source, taken, strict=True):
        chosen = set(random.Random(f"{seed}").sample(range(len(questions)), count))
        drawn.append([question for i, question in enumerate(questions) if i in chosen])
    return drawn


def _read(source: SourceConfig) -> list[Question]:
    where = f"source {source.path}"
    rows = _rows(source, where)
    _require_columns(source, where, rows.column_names)
    questions = []
    for number, row in enumerate(rows, 1):
        if source.messages is not None:
            questions.append(_conversation(row[source.messages], f"{where}, row {number}: {source.messages}"))
            continue
        text = row[source.question]
        extra = row.get(source.input) if source.input else None
        answer = row[source.answer] if source.answer else None
        if not isinstance(text, str) or not text.strip():
            raise SourceError(f"{where}, row {number}: {source.question} is {text!r}; it must be text")
        if source.answer and not isinstance(answer, str):
            raise SourceError(
                f"{where}, row {number}: {source.answer} is {answer!r}; set answer: null if there are no answers"
            )
        extra = extra.strip() if isinstance(extra, str) else ""
        joined = f"{text.strip()}{source.join}{extra}" if extra else text.strip()
        if len(joined) > MAX_CHARACTERS:
            raise SourceError(
                f"{where}, row {number}: {len(joined):,} characters, at most {MAX_CHARACTERS:,} are allowed"
            )
        questions.append(Question(question_id(joined), joined, answer, comparison_key(text, extra)))
    if not questions:
        raise SourceError(f"{where}: has no rows")
    return questions


def _conversation(messages: Any, where: str) -> Question:
    """Its last question, with what was said before. Raises SourceError."""
    try:
        spoken = [(one["role"], one["content"].strip()) for one in messages if one["role"] != "system"]
    except (TypeError, KeyError, AttributeError):
        raise SourceError(f"{where} is no list of objects with role and content") from None
    roles, said = [role for role, _ in spoken], [text for _, text in spoken]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2) or not all(said):
        raise SourceError(
            f"{where} has the roles {', '.join(map(str, roles)) or 'of nobody'}; user and assistant must take turns, "
            "each with a text, and the assistant must be the last"
        )
    if sum(map(len, said)) > MAX_CHARACTERS:
        raise SourceError(f"{where}: more than {MAX_CHARACTERS:,} characters")
    *before, question, answer = said
    earlier = tuple(zip(before[::2], before[1::2], strict=True))
    return Question(question_id("\0".join(said[:-1])), question, answer, comparison_key(question), earlier)


def check_columns(source: SourceConfig) -> None:
    """Raise SourceError where a source cannot be read or lacks a column. Reads no more than its beginning."""
    _require_columns(source, f"source {source.path}", list(first_row(source)))


def first_row(source: SourceConfig) -> dict[str, Any]:
    """Raises SourceError."""
    where = f"source {source.path}"
    rows = _rows(source, where, streaming=True)
    try:
        first = next(iter(rows), None)
    except Exception as error:
        raise SourceError(f"{where}: cannot be read: {str(error.__cause__ or error).strip()[:200]}") from None
    if first is None:
        raise SourceError(f"{where}: has no rows")
    return dict(first)


def _require_columns(source: SourceConfig, where: str, columns: Sequence[str]) -> None:
    for column in (source.question, source.answer) if source.messages is None else (source.messages,):
        if column is not None and column not in columns:
            raise SourceError(f"{where}: no column {column!r}; found {', '.join(columns)}")


def _rows(source: SourceConfig, where: str, *, streaming: bool = False) -> Any:
    """A datasets.Dataset, or an IterableDataset where `streaming`."""
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        path = local_copy(source.path)
    except NotFoundError as error:
        raise SourceError(f"{where}: {error}") from None
    try:
        if path.exists():
            files = sorted(p for p in path.rglob("*") if _format(p)) if path.is_dir() else [path]
            kinds = {_format(file) for file in files}
            if len(kinds) != 1 or None in kinds:
                raise SourceError(f"{where}: needs files of one kind out of {', '.join(_FORMATS)} (or .gz of them)")
            kind = str(kinds.pop())
            if all(file.stat().st_size == 0 for file in files):
                raise SourceError(f"{where}: is empty")
            return datasets.load_dataset(
                kind, data_files=[str(file) for file in files], split="train", streaming=streaming
            )
        return datasets.load_dataset(source.path, split=source.split, streaming=streaming)
    except SourceError:
        raise
    except Exception as error:
        cause = error.__cause__ or error
        reason = str(cause).strip().splitlines()[0][:200] if str(cause).strip() else type(cause).__name__
        kind = "cannot be read" if path.exists() else "is no local file, and the hub does not give it"
        raise SourceError(f"{where}: {kind}: {reason}") from None


def _format(path: Path) -> str | None:
    suffixes = [suffix for suffix in path.suffixes if suffix not in (".gz", ".zst")]
    return _FORMATS.get(suffixes[-1].lower()) if suffixes else None
