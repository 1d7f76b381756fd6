"""Answers to held-out questions in a persona's voice under every arm: unpruned, its own mask, one mask for all,
another persona's, a baseline's. One Parquet object per persona, one row per answer with everything that made it.

Shape suffixes: M masks (one per arm), L layers, I FFN channels, T tokens.
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

from persona_pruner.backbone.continuous import decoder_for
from persona_pruner.backbone.decoding import Prompt, Sampled, Sampling
from persona_pruner.backbone.forward import BackboneRunner
from persona_pruner.backbone.load import Backbone
from persona_pruner.backbone.prompts import answer_tokens, persona_prefix, question_suffix
from persona_pruner.config.schema import RunConfig
from persona_pruner.dataset import PersonaData, Row, read_persona_data, uses_unfinished_answers
from persona_pruner.errors import PersonaError
from persona_pruner.evaluation.likelihood import read_rows
from persona_pruner.evaluation.questions import evaluation_questions
from persona_pruner.evaluation.wording import repetition, words
from persona_pruner.learning.encoding import seeded
from persona_pruner.learning.estimators import topk_mask
from persona_pruner.learning.training_free import activation, magnitude, random
from persona_pruner.manifest import Persona
from persona_pruner.masks.format import Mask
from persona_pruner.storage import keys
from persona_pruner.storage.base import Storage

ARMS = ("unpruned", "own", "global", "other", "baseline")
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
    ]
)
"""`mask` says whose mask it is (empty: none), `mask_sha256` names the kept channels. `own_loss`: nats per token of the
answer under the unpruned backbone and the persona's own prompt; `rank`: how many of `candidates` descriptions make the
answer at least as likely, 1 is best; `similarity`: cosine with the unpruned answer's mean final hidden state."""


@dataclass(frozen=True, kw_only=True)
class AnswerTask:
    """One persona to be asked. Names only: the worker reads masks and data itself."""

    persona_id: str
    other_id: str | None
    """Whose mask the arm "other" is."""
    candidates: tuple[str, ...]
    """Personas whose descriptions stand beside the own one in the classifier."""
    global_key: str | None
    digest: str
    """Of everything that decides the rows."""


def digest_of(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


def is_answered(storage: Storage, task: AnswerTask) -> bool:
    return storage.exists(keys.evaluation_answers(task.persona_id, task.digest))


def answer_task(backbone: Backbone, config: RunConfig, storage: Storage, task: AnswerTask) -> int:
    """Ask one persona under every arm, measure, and store the rows. Returns how many; every rank of a group calls it.

    1. Read its masks and data, and make the baseline's mask.
    2. Answer all questions under all arms in one stream of batches, each arm's prompt prefix run once.
    3. Read the answers with the unpruned backbone under the candidates' descriptions.
    Raises PersonaError, MaskError, StorageError.
    """
    own = _load(storage, keys.mask(task.persona_id), backbone)
    if not own.metadata.persona_description:
        raise PersonaError("no_description", "its mask carries no description: make the mask again with this release")
    persona = Persona(task.persona_id, own.metadata.persona_description)
    data = _data(storage, config, persona)
    questions = evaluation_questions(config, persona.id, data)
    arms = _arms(backbone, config, storage, task, own, data)
    rows = _ask(backbone, config, persona, questions, arms)
    candidates = [_load(storage, keys.mask(name), backbone).metadata.persona_description for name in task.candidates]
    _measure(backbone, config, persona.description, [text for text in candidates if text], rows)
    if backbone.world.rank == 0:
        store_answers(storage, task, rows)
    return len(rows)


def _load(storage: Storage, key: str, backbone: Backbone) -> Mask:
    where = f"{storage.url}/{key}"
    mask = Mask.from_bytes(storage.get(key), where)
    mask.check(where, backbone_fingerprint=backbone.fingerprint)
    return mask


def _data(storage: Storage, config: RunConfig, persona: Persona) -> PersonaData | None:
    """None where the data were removed, or never there: an imported mask."""
    try:
        return read_persona_data(storage, persona, unfinished=uses_unfinished_answers(config))
    except PersonaError as error:
        if error.cause != "no_data":
            raise
        return None


@dataclass(frozen=True)
class _Arm:
    name: str
    mask: str
    keep_LI: Tensor

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.keep_LI.cpu().numpy().tobytes()).hexdigest() if self.mask else ""


def _arms(
    backbone: Backbone, config: RunConfig, storage: Storage, task: AnswerTask, own: Mask, data: PersonaData | None
) -> list[_Arm]:
    """Those that there are, in the order of ARMS."""
    arms = [_Arm("unpruned", "", torch.ones_like(own.keep_LI)), _Arm("own", task.persona_id, own.keep_LI)]
    for name, whose, key in (
        ("global", "global", task.global_key),
        ("other", task.other_id or "", keys.mask(task.other_id) if task.other_id else None),
    ):
        if key is not None:
            arms.append(_Arm(name, whose, _load(storage, key, backbone).keep_LI))
    method = config.evaluation.answers.baseline
    if method == "activation" and data is None:
        return arms
    if method == "activation" and data is not None:
        scores_LI = activation(backbone, config, data)
    else:
        scores_LI = magnitude(backbone) if method == "magnitude" else random(backbone, config.learning.seed)
    return [*arms, _Arm("baseline", method, topk_mask(scores_LI.cpu(), own.keep_LI.sum(1)))]


def _ask(
    backbone: Backbone, config: RunConfig, persona: Persona, questions: Sequence[str], arms: Sequence[_Arm]
) -> list[dict[str, Any]]:
    settings, tokenizer = config.evaluation.answers, backbone.tokenizer
    prefix = tuple(persona_prefix(tokenizer, config.prompt, persona.description))
    suffixes = [tuple(question_suffix(tokenizer, config.prompt, persona.description, text)) for text in questions]
    asked = [(arm, number) for arm in range(len(arms)) for number in range(len(questions))]
    prompts = [Prompt(prefix, suffixes[number], _draws(config, persona, number), arm) for arm, number in asked]
    sampling = Sampling(settings.temperature, settings.top_p, answer_tokens(tokenizer, "a")[-1], settings.batch_size)
    sampled = _decode(backbone, sampling, prompts, torch.stack([arm.keep_LI for arm in arms]))
    rows = []
    for (position, number), answer in zip(asked, sampled, strict=True):
        arm, text = arms[position], tokenizer.decode(answer.tokens, skip_special_tokens=True).strip()
        rows.append(
            {
                "persona_id": persona.id, "persona_sha256": persona.sha256, "arm": arm.name, "mask": arm.mask,
                "mask_sha256": arm.digest, "backbone_fingerprint": backbone.fingerprint,
                "question": questions[number], "number": number, "seed": settings.seed,
                "temperature": settings.temperature, "top_p": settings.top_p,
                "max_new_tokens": settings.max_new_tokens, "text": text, "tokens": len(answer.tokens),
                "ended": answer.finished, "words": words(text), "repetition": repetition(text),
            }
        )  # fmt: skip
    return rows


def _draws(config: RunConfig, persona: Persona, number: int) -> Tensor:
    """Uniform numbers [T] that decide one answer, the same for every arm."""
    settings = config.evaluation.answers
    source = seeded("evaluation", settings.seed, persona.id, persona.sha256, number)
    return torch.rand(settings.max_new_tokens, generator=source, dtype=torch.float64)


def _decode(backbone: Backbone, sampling: Sampling, prompts: Sequence[Prompt], masks_MLI: Tensor) -> list[Sampled]:
    """In the order of `prompts`; each rank decodes its part, and all ranks get the whole."""
    order = sorted(range(len(prompts)), key=lambda i: (prompts[i].mask, len(prompts[i].suffix), i))
    mine = order[backbone.world.rank :: backbone.world.size]
    with BackboneRunner(backbone) as runner:
        decoder = decoder_for(runner, sampling, prompts, masks_MLI.to(backbone.device))
        own = dict(zip(mine, decoder.decode([prompts[i] for i in mine]), strict=True))
    sampled: dict[int, Sampled] = {}
    for of_rank in backbone.gather(own):
        sampled |= of_rank
    return [sampled[i] for i in range(len(prompts))]


def _measure(
    backbone: Backbone, config: RunConfig, own: str, others: Sequence[str], rows: Sequence[dict[str, Any]]
) -> None:
    """Add what the unpruned backbone makes of each answer."""
    texts = [Row(row["question"], row["text"], bool(row["ended"]) or not row["text"]) for row in rows]
    reading = read_rows(backbone, config, own, texts)
    losses = [read_rows(backbone, config, description, texts).losses_R for description in others]
    unpruned = {row["number"]: position for position, row in enumerate(rows) if row["arm"] == "unpruned"}
    for position, row in enumerate(rows):
        row["own_loss"] = reading.losses_R[position].item()
        if others:
            row["rank"] = 1 + sum(int(loss_R[position] <= reading.losses_R[position]) for loss_R in losses)
            row["candidates"] = 1 + len(others)
        pair = reading.states_RD[[position, unpruned[row["number"]]]]
        row["similarity"] = torch.cosine_similarity(pair[0], pair[1], dim=0).item()


def store_answers(storage: Storage, task: AnswerTask, rows: Sequence[Mapping[str, Any]]) -> None:
    stream = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([dict(row) for row in rows], SCHEMA), stream, compression="zstd")
    key = keys.evaluation_answers(task.persona_id, task.digest)
    storage.put(key, stream.getvalue())
    for item in list(storage.list(keys.evaluation_answers(task.persona_id))):
        if item.key != key:
            storage.delete(item.key)
