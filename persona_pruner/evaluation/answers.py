"""Answers to held-out questions in a persona's voice under every arm: asked, measured, and stored as one Parquet object
per persona, one row per answer with everything that made it.

Shape suffixes: T tokens.
"""

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from persona_pruner.backbone.decoding import Prompt
from persona_pruner.backbone.prompts import persona_prefix, question_suffix
from persona_pruner.dataset import Row
from persona_pruner.evaluation.likelihood import read_rows
from persona_pruner.evaluation.questions import evaluation_questions
from persona_pruner.evaluation.subject import Subject
from persona_pruner.evaluation.wording import repetition, words
from persona_pruner.learning.encoding import seeded
from persona_pruner.storage import keys
from persona_pruner.storage.base import Storage

SCHEMA = pa.schema(
    [
        ("persona_id", pa.string()),
        ("persona_sha256", pa.string()),
        ("arm", pa.string()),
        ("mask", pa.string()),
        ("mask_sha256", pa.string()),
        ("backbone_fingerprint", pa.string()),
        ("question", pa.string()),
        ("number", pa.int32()),
        ("seed", pa.int64()),
        ("temperature", pa.float64()),
        ("top_p", pa.float64()),
        ("max_new_tokens", pa.int32()),
        ("text", pa.string()),
        ("tokens", pa.int32()),
        ("ended", pa.bool_()),
        ("words", pa.int32()),
        ("repetition", pa.float64()),
        ("own_loss", pa.float64()),
        ("rank", pa.int32()),
        ("candidates", pa.int32()),
        ("similarity", pa.float64()),
        ("ability", pa.string()),
        ("passed", pa.bool_()),
        ("turn", pa.int32()),
    ]
)
"""`mask` says whose mask it is (empty: none), `mask_sha256` names the kept channels. `own_loss`: nats per token of the
answer under the unpruned backbone and the persona's own prompt; `rank`: how many of `candidates` descriptions make the
answer at least as likely, 1 is best; `similarity`: cosine with the unpruned answer's mean final hidden state; `ability`
and `passed`: of a task (abilities.py); `turn`, from 1: of a conversation (dialogues.py)."""


def digest_of(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


def answer_questions(subject: Subject) -> list[dict[str, Any]]:
    """Rows of the persona's held-out questions under every arm: arm by arm, questions in order.

    1. Answer all questions under all arms in one stream of batches, each arm's prompt prefix run once.
    2. Read the answers with the unpruned backbone under the candidates' descriptions.
    Raises PersonaError.
    """
    questions = evaluation_questions(subject.config, subject.persona.id, subject.data)
    rows = ask(subject, under_every_arm(subject, questions))
    measure(subject, rows)
    return rows


@dataclass(frozen=True)
class Question:
    arm: int
    """Its number in the subject's arms."""
    number: int
    text: str
    earlier: tuple[tuple[str, str], ...] = ()
    """Questions and answers before it in the same conversation."""


def under_every_arm(subject: Subject, texts: Sequence[str]) -> list[Question]:
    """Arm by arm, texts in order."""
    return [Question(arm, number, text) for arm in range(len(subject.arms)) for number, text in enumerate(texts)]


def ask(subject: Subject, questions: Sequence[Question], seed: str = "answers") -> list[dict[str, Any]]:
    """Rows without measures, in the order of `questions`. `seed` tells samples of one number apart."""
    config, persona, tokenizer = subject.config, subject.persona, subject.backbone.tokenizer
    settings = config.evaluation.answers
    prefix = tuple(persona_prefix(tokenizer, config.prompt, persona.description))
    prompts = []
    for one in questions:
        suffix = question_suffix(tokenizer, config.prompt, persona.description, one.text, one.earlier)
        prompts.append(Prompt(prefix, tuple(suffix), draws(subject, seed, one.number), one.arm))
    rows = []
    for one, answer in zip(questions, subject.decode(prompts), strict=True):
        arm, text = subject.arms[one.arm], tokenizer.decode(answer.tokens, skip_special_tokens=True).strip()
        rows.append(
            {
                "persona_id": persona.id, "persona_sha256": persona.sha256, "arm": arm.name, "mask": arm.mask,
                "mask_sha256": arm.digest, "backbone_fingerprint": subject.backbone.fingerprint,
                "question": one.text, "number": one.number, "seed": settings.seed,
                "temperature": settings.temperature, "top_p": settings.top_p,
                "max_new_tokens": settings.max_new_tokens, "text": text, "tokens": len(answer.tokens),
                "ended": answer.finished, "words": words(text), "repetition": repetition(text),
            }
        )  # fmt: skip
    return rows


def draws(subject: Subject, seed: str, number: int) -> Tensor:
    """Uniform numbers [T] that decide one answer, the same for every arm."""
    settings = subject.config.evaluation.answers
    source = seeded(f"evaluation {seed}", settings.seed, subject.persona.id, subject.persona.sha256, number)
    return torch.rand(settings.max_new_tokens, generator=source, dtype=torch.float64)


def measure(subject: Subject, rows: Sequence[dict[str, Any]]) -> None:
    """Add what the unpruned backbone makes of each answer."""
    backbone, config = subject.backbone, subject.config
    texts = [Row(row["question"], row["text"], bool(row["ended"]) or not row["text"]) for row in rows]
    reading = read_rows(backbone, config, subject.persona.description, texts)
    losses = [read_rows(backbone, config, description, texts).losses_R for description in subject.others]
    unpruned = {row["number"]: position for position, row in enumerate(rows) if row["arm"] == "unpruned"}
    for position, row in enumerate(rows):
        row["own_loss"] = reading.losses_R[position].item()
        if losses:
            row["rank"] = 1 + sum(int(loss_R[position] <= reading.losses_R[position]) for loss_R in losses)
            row["candidates"] = 1 + len(losses)
        pair = reading.states_RD[[position, unpruned[row["number"]]]]
        row["similarity"] = torch.cosine_similarity(pair[0], pair[1], dim=0).item()


def store_rows(storage: Storage, kind: str, persona_id: str, digest: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Store a persona's rows of a kind in the place of those of another digest."""
    stream = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([dict(row) for row in rows], SCHEMA), stream, compression="zstd")
    key = keys.evaluation_rows(kind, persona_id, digest)
    storage.put(key, stream.getvalue())
    for item in list(storage.list(keys.evaluation_rows(kind, persona_id))):
        if item.key != key:
            storage.delete(item.key)
