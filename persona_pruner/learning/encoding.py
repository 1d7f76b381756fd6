"""A persona's rows: as text, as tokens, and in the order in which the steps see them."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from persona_pruner.backbone.prompts import answer_tokens, persona_prefix, question_suffix
from persona_pruner.config.schema import PromptConfig
from persona_pruner.dataset import PersonaData, Row
from persona_pruner.errors import PersonaError


@dataclass(frozen=True)
class EncodedRow:
    """Token ids behind the persona's prefix: question and answer, of which the last `answer` are the answer."""

    tokens: tuple[int, ...]
    answer: int


@dataclass(frozen=True)
class Encoded:
    persona_id: str
    prefix: tuple[int, ...]
    train: tuple[EncodedRow, ...]
    heldout: tuple[EncodedRow, ...]
    sha256: str


def encode_rows(
    tokenizer: Any, prompt: PromptConfig, description: str, rows: Sequence[Row], max_row_tokens: int, who: str = "rows"
) -> tuple[EncodedRow, ...]:
    """Rows as tokens. Raises PersonaError (row_too_long) naming the row's number from 0 and both lengths."""
    prefix = persona_prefix(tokenizer, prompt, description)
    encoded = []
    for number, row in enumerate(rows):
        question = question_suffix(tokenizer, prompt, description, row.question)
        answer = answer_tokens(tokenizer, row.answer)
        if not row.finished:
            answer = answer[:-1]  # the end token: this answer did not end here
        length = len(prefix) + len(question) + len(answer)
        if length > max_row_tokens:
            raise PersonaError(
                "row_too_long",
                f"{who}: row {number} has {length} tokens with its prompt, learning.max_row_tokens is {max_row_tokens}",
            )
        encoded.append(EncodedRow((*question, *answer), len(answer)))
    return tuple(encoded)


def encode(tokenizer: Any, prompt: PromptConfig, data: PersonaData, max_row_tokens: int) -> Encoded:
    """All rows of a persona as tokens. Raises PersonaError: empty (no row to train on), row_too_long."""
    if not data.train:
        raise PersonaError("empty", f"{data.persona_id}: no rows to train on")
    prefix = tuple(persona_prefix(tokenizer, prompt, data.description))
    parts = [
        encode_rows(tokenizer, prompt, data.description, rows, max_row_tokens, f"{data.persona_id} ({part})")
        for part, rows in (("train", data.train), ("held out", data.heldout))
    ]
    return Encoded(data.persona_id, prefix, parts[0], parts[1], data.sha256)


def seeded(*what: object) -> torch.Generator:
    """A generator decided by `what` alone: nothing depends on global random state, or on what ran before."""
    digest = hashlib.sha256("\0".join(map(str, what)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def batch(rows: int, rows_per_step: int, step: int, seed: int, sha256: str) -> list[int]:
    """Row numbers of a step: consecutive pieces of one shuffled epoch after another. The step is the whole cursor."""
    size = min(rows, rows_per_step)
    picked = []
    for place in range(step * size, (step + 1) * size):
        epoch, offset = divmod(place, rows)
        picked.append(_epoch(rows, seed, sha256, epoch)[offset])
    return picked


@lru_cache(maxsize=64)
def _epoch(rows: int, seed: int, sha256: str, epoch: int) -> list[int]:
    return torch.randperm(rows, generator=seeded("order", seed, sha256, epoch)).tolist()
