"""Rows as tokens, behind the prompt prefixes of their personas, and the order in which the steps see them."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch

from persona_pruner.backbone.prompts import answer_tokens, persona_prefix, question_suffix
from persona_pruner.config.schema import PromptConfig
from persona_pruner.dataset import PersonaData, Row
from persona_pruner.errors import PersonaError


@dataclass(frozen=True)
class EncodedRow:
    """Token ids behind a prefix: question and answer, of which the last `answer` are the answer."""

    tokens: tuple[int, ...]
    answer: int
    prefix: int = 0
    """Number of its prefix in the data that it belongs to."""


@dataclass(frozen=True)
class EncodedData:
    """What one mask learns from. A persona's rows have one prefix, pooled rows one per persona."""

    persona_id: str
    prefixes: tuple[tuple[int, ...], ...]
    train: tuple[EncodedRow, ...]
    heldout: tuple[EncodedRow, ...]
    sha256: str


@dataclass(frozen=True)
class PooledData:
    """Rows of several personas, from which one mask for all of them is learned."""

    persona_id: str
    personas: tuple[PersonaData, ...]
    description: str = ""

    @property
    def sha256(self) -> str:
        return hashlib.sha256("".join(each.sha256 for each in self.personas).encode()).hexdigest()


def encode_rows(
    tokenizer: Any, prompt: PromptConfig, description: str, rows: Sequence[Row], max_row_tokens: int, name: str = "rows"
) -> tuple[EncodedRow, ...]:
    """Rows as tokens. Raises PersonaError (row_too_long) naming the row's number from 0 and both lengths."""
    prefix = persona_prefix(tokenizer, prompt, description)
    encoded = []
    for number, row in enumerate(rows):
        question = question_suffix(tokenizer, prompt, description, row.question, row.earlier)
        answer = answer_tokens(tokenizer, row.answer)
        if not row.finished:
            answer = answer[:-1]  # the end token: this answer did not end here
        length = len(prefix) + len(question) + len(answer)
        if length > max_row_tokens:
            raise PersonaError(
                "row_too_long",
                f"{name}: row {number} has {length} tokens with its prompt, learning.max_row_tokens is "
                f"{max_row_tokens}",
            )
        encoded.append(EncodedRow((*question, *answer), len(answer)))
    return tuple(encoded)


def encode(tokenizer: Any, prompt: PromptConfig, data: PersonaData | PooledData, max_row_tokens: int) -> EncodedData:
    """All rows as tokens. Raises PersonaError: empty (no row to train on), row_too_long."""
    if isinstance(data, PooledData):
        return _pooled(data, [encode(tokenizer, prompt, each, max_row_tokens) for each in data.personas])
    if not data.train:
        raise PersonaError("empty", f"{data.persona_id}: no rows to train on")
    prefix = tuple(persona_prefix(tokenizer, prompt, data.description))
    train, heldout = (
        encode_rows(tokenizer, prompt, data.description, rows, max_row_tokens, f"{data.persona_id} ({split})")
        for split, rows in (("train", data.train), ("held out", data.heldout))
    )
    return EncodedData(data.persona_id, (prefix,), train, heldout, data.sha256)


def _pooled(data: PooledData, personas: Sequence[EncodedData]) -> EncodedData:
    """Held-out rows stay with their personas: a pooled mask is trained for a fixed number of steps."""
    train = tuple(replace(row, prefix=number) for number, each in enumerate(personas) for row in each.train)
    return EncodedData(data.persona_id, tuple(each.prefixes[0] for each in personas), train, (), data.sha256)


def seeded(*parts: object) -> torch.Generator:
    """A generator decided by `parts` alone: nothing depends on global random state, or on what ran before."""
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def batch(rows: int, rows_per_step: int, step: int, seed: int, sha256: str) -> list[int]:
    """Row numbers of a step: consecutive pieces of one shuffled epoch after another. The step is the whole cursor."""
    size = min(rows, rows_per_step)
    numbers = []
    for position in range(step * size, (step + 1) * size):
        epoch, offset = divmod(position, rows)
        numbers.append(_epoch(rows, seed, sha256, epoch)[offset])
    return numbers


@lru_cache(maxsize=64)
def _epoch(rows: int, seed: int, sha256: str, epoch: int) -> list[int]:
    return torch.randperm(rows, generator=seeded("order", seed, sha256, epoch)).tolist()
