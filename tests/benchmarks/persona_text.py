"""Personas of ../shared/data, and of the shipped example, with two kinds of text, for the benchmarks of mask learning.

Synthesized: answers that the backbone samples (temperature 1) as that persona, as the backend `self` does. Real: what
the persona says in the data. Kept in --cache between runs, since sampling takes longer than most of what follows.
"""

import argparse
import gzip
import hashlib
import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from persona_pruner.backbone.load import Backbone
from persona_pruner.backbone.prompts import persona_prefix, question_suffix
from persona_pruner.config.schema import RunConfig
from persona_pruner.dataset import PersonaData, Row
from persona_pruner.evaluation.table import read_conversations
from persona_pruner.manifest import Persona as Described
from persona_pruner.manifest import read_manifest
from persona_pruner.synthesis.rewrite.backbone import SelfRewriter
from persona_pruner.synthesis.rewrite.base import Request
from persona_pruner.synthesis.sources import load_question_set, normalize_whitespace

SHARED = Path(__file__).parents[3] / "shared" / "data"
EXAMPLE = Path(__file__).parents[2] / "manifests" / "quickstart"
MAX_NEW_TOKENS = 64
ROLEPLAY = ("rolebench-af277108fc", "rolebench-62726ebf77", "rolebench-3938a5ad79", "character-llm-40d00d6c80")


@dataclass(frozen=True)
class Persona:
    """`train` and `heldout` are synthesized, `real` is the persona's own held-out conversation."""

    id: str
    description: str
    train: tuple[Row, ...]
    heldout: tuple[Row, ...]
    real: tuple[Row, ...]

    def data(self, rows: int | None = None) -> PersonaData:
        train = self.train[:rows]
        digest = hashlib.sha256(json.dumps([asdict(row) for row in train]).encode()).hexdigest()
        return PersonaData(self.id, self.description, train, self.heldout, digest)


def read_jsonl(name: str) -> list[dict[str, str]]:
    with gzip.open(SHARED / name, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def personas(
    backbone: Backbone, config: RunConfig, count: int, cache: Path, train: int = 256, heldout: int = 64
) -> list[Persona]:
    """The `count` personas with the most held-out conversation, in turn from each source."""
    rows = read_jsonl("roleplay.jsonl.gz")
    by_source: dict[str, dict[str, list[dict[str, str]]]] = {}
    for row in rows:
        if row["split"] == "heldout":
            by_source.setdefault(row["source"].split("/")[0], {}).setdefault(row["persona_id"], []).append(row)
    ranked = [
        sorted(by_source[source].values(), key=lambda own: (-len(own), own[0]["persona_id"]))
        for source in ("rolebench", "character-llm", "spc")
    ]
    chosen = [own for turn in zip(*ranked, strict=False) for own in turn][:count]
    questions = pool()
    return [_persona(backbone, config, own, questions, cache, train, heldout) for own in chosen]


def shipped_personas(config: RunConfig, count: int) -> list[Persona]:
    """The first `count` personas of the shipped example, with their real text only."""
    spoken = read_conversations(config)
    people = read_manifest(str(EXAMPLE / "personas.jsonl")).personas[:count]
    return [Persona(p.id, p.description, (), (), tuple(spoken[p.id])) for p in people]


def pool() -> list[str]:
    """Short questions of RoleBench and Alpaca, sorted."""
    found = {r["question"] for r in read_jsonl("roleplay.jsonl.gz") if r["source"] == "rolebench/general"}
    found = {question for question in found if len(question.split()) < 25}
    found |= {a["instruction"] for a in read_jsonl("alpaca.jsonl.gz") if not a["input"] and len(a["instruction"]) < 90}
    return sorted(found)


def generic(rows: int = 128) -> PersonaData:
    """Generic instruction data with its own answers, under no particular persona."""
    pool = [a for a in read_jsonl("alpaca.jsonl.gz") if not a["input"] and len(a["output"].split()) < 60]
    picked = random.Random(0).sample(pool, rows)
    return PersonaData(
        "generic", "A helpful assistant.", tuple(Row(a["instruction"], a["output"]) for a in picked), (), "generic"
    )


def foreign(count: int) -> list[Row]:
    """Rows of nobody's whom the benchmarks prune for: half are instructions, half what other characters say in the
    training split, without a question that is held out."""
    spoken = read_jsonl("roleplay.jsonl.gz")
    heldout = {normalize_whitespace(row["question"]).lower() for row in spoken if row["split"] == "heldout"}
    others = [
        Row(row["question"], row["answer"])
        for row in spoken
        if row["split"] == "train"
        and row["source"].split("/")[0] in ("rolebench", "character-llm")
        and row["persona_id"] not in ROLEPLAY
        and normalize_whitespace(row["question"]).lower() not in heldout
        and _is_short(row)
    ]
    instructions = [Row(a["instruction"], a["output"]) for a in read_jsonl("alpaca.jsonl.gz") if not a["input"]]
    draw = random.Random(0)
    rows = [*draw.sample(others, count // 2), *draw.sample(instructions, count - count // 2)]
    draw.shuffle(rows)
    return rows


def _is_short(row: dict[str, str]) -> bool:
    return len(row["question"].split()) <= 60 and 8 <= len(row["answer"].split()) <= 80


def _persona(
    backbone: Backbone,
    config: RunConfig,
    own: list[dict[str, str]],
    questions: list[str],
    cache: Path,
    train: int,
    heldout: int,
) -> Persona:
    name, description = own[0]["persona_id"], own[0]["persona"]
    real = tuple(Row(row["question"], row["answer"]) for row in own[:64])
    file = cache / f"{name}-{train}-{heldout}.json"
    if file.exists():
        rows = [Row(**row) for row in json.loads(file.read_text(encoding="utf-8"))]
    else:
        asked = random.Random(name).sample(questions, 2 * (train + heldout))
        rows = sample(backbone, config, description, asked, train + heldout)
        cache.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps([asdict(row) for row in rows]), encoding="utf-8")
    return Persona(name, description, tuple(rows[heldout:]), tuple(rows[:heldout]), real)


@torch.no_grad()
def sample(backbone: Backbone, config: RunConfig, description: str, questions: list[str], wanted: int) -> list[Row]:
    """Answers drawn at temperature 1; those that do not end in time are dropped."""
    torch.manual_seed(0)
    tokenizer, prompt = backbone.tokenizer, config.prompt
    prefix = persona_prefix(tokenizer, prompt, description)
    rows: list[Row] = []
    for start in range(0, len(questions), 64):
        block = questions[start : start + 64]
        prompts = [prefix + question_suffix(tokenizer, prompt, description, question) for question in block]
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        out = backbone.model.generate(  # type: ignore[operator]
            ids, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
            max_new_tokens=MAX_NEW_TOKENS, pad_token_id=0,
        )  # fmt: skip
        for question, answer in zip(block, out[:, width:].tolist(), strict=True):
            if tokenizer.eos_token_id in answer:
                text = tokenizer.decode(answer[: answer.index(tokenizer.eos_token_id)], skip_special_tokens=True)
                rows += [Row(question, text.strip())] if text.strip() else []
        if len(rows) >= wanted:
            break
    return rows[:wanted]


@dataclass(frozen=True)
class Speaker:
    """`texts`: held-out rows by kind of text, `answers` of the backbone and `conversations` that it did not write."""

    data: PersonaData
    texts: dict[str, tuple[Row, ...]]

    @property
    def id(self) -> str:
        return self.data.persona_id


def roleplay(count: int, rows: int) -> list[tuple[Described, tuple[Row, ...]]]:
    """Personas of the shared data, with short held-out conversations."""
    spoken: dict[str, list[dict[str, str]]] = {persona_id: [] for persona_id in ROLEPLAY[:count]}
    for row in read_jsonl("roleplay.jsonl.gz"):
        if row["split"] == "heldout" and _is_short(row):
            spoken.get(row["persona_id"], []).append(row)
    return [
        (Described(own[0]["persona_id"], own[0]["persona"]), tuple(Row(r["question"], r["answer"]) for r in own[:rows]))
        for own in spoken.values()
    ]


def speakers(backbone: Backbone, config: RunConfig, options: argparse.Namespace, people_file: Path) -> list[Speaker]:
    """Half of the personas from each source, with answers sampled once and the same held-out questions for all."""
    conversations = read_conversations(config)
    example = read_manifest(str(people_file)).personas[: options.personas - options.personas // 2]
    people = roleplay(options.personas // 2, options.heldout)
    people += [(persona, conversations[persona.id][: options.heldout]) for persona in example]
    questions = sorted(load_question_set(config.synthesis), key=lambda question: question.id)
    rewriter = SelfRewriter(backbone, config)
    found = []
    for persona, spoken in people:
        file = options.cache / f"answers-{persona.id}.json"
        if not file.exists():
            rest = questions[options.heldout :]
            asked = [Request(persona, question, 0) for question in questions[: options.heldout]]
            train = random.Random(persona.id).sample(rest, min(options.answers, len(rest)))
            asked += [Request(persona, train[n % len(rest)], n // len(rest)) for n in range(options.answers)]
            rows = [
                Row(request.question.text, answer.text, answer.finished)
                for request, answer in zip(asked, rewriter.answers(asked), strict=True)
            ]
            file.write_text(json.dumps([asdict(row) for row in rows]), encoding="utf-8")
        rows = [Row(**row) for row in json.loads(file.read_text(encoding="utf-8"))]
        heldout, train = (
            tuple(row for row in some if row.answer) for some in (rows[: options.heldout], rows[options.heldout :])
        )
        data = PersonaData(persona.id, persona.description, train, heldout, f"{persona.id}-{len(train)}")
        found.append(Speaker(data, {"answers": heldout, "conversations": spoken}))
    return found
