"""Each persona's mask beside what else could be had at the same ratio, on two kinds of text.

*answers*: held-out questions answered in the persona's voice by the rewriting model (for the backend `self`, the
backbone's own samples). *conversations*: text of the persona that the backbone did not write. Losses are in nats per
token.

Shape suffixes: L layers, I FFN channels.
"""

import hashlib
import json
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table
from torch import Tensor

from persona_pruner.backbone.load import Backbone
from persona_pruner.config.schema import RunConfig
from persona_pruner.dataset import PersonaData, Row, read_persona_data, uses_unfinished_answers
from persona_pruner.errors import ConfigError
from persona_pruner.evaluation.likelihood import heldout_losses
from persona_pruner.learning.estimators import topk_mask
from persona_pruner.learning.training_free import random
from persona_pruner.manifest import Persona
from persona_pruner.masks.format import Mask
from persona_pruner.storage import keys
from persona_pruner.storage.base import NotFoundError, Storage
from persona_pruner.storage.open import read_url

METHODS = ("unpruned", "own", "other", "global", "activation", "random")
"""`activation` ranks the channels of each layer by what they do on generic text, without training."""
TEXTS = ("answers", "conversations")
PERSONA_TOKENS = ", persona tokens"
"""Behind a kind of text: the losses over the tenth of its tokens that the description decides."""
RIVALS = ("global", "other")
HEADINGS = {
    "answers": "held-out questions answered in its voice (nats per token)",
    "conversations": "its own conversations, which the backbone did not write (nats per token)",
}


@dataclass(frozen=True, kw_only=True)
class EvaluationTask:
    """What one persona's row needs; plain bytes and text, so that it travels to an actor."""

    persona_id: str
    description: str
    texts: Mapping[str, tuple[Row, ...]]
    masks: Mapping[str, bytes]

    def digest(self) -> str:
        """sha256 of everything that decides the figures."""
        parts = [*METHODS, self.persona_id, self.description]
        parts += [f"{name}:{hashlib.sha256(data).hexdigest()}" for name, data in sorted(self.masks.items())]
        parts += [f"{kind}:{row.question}\0{row.answer}" for kind in TEXTS for row in self.texts.get(kind, ())]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def evaluate_persona(
    backbone: Backbone, config: RunConfig, task: EvaluationTask, generic_LI: Tensor
) -> dict[str, dict[str, float]]:
    """Loss by text and method, over all tokens and over the persona's. Every rank of a shard group calls it."""
    masks = {name: Mask.from_bytes(data, f"{name} mask of {task.persona_id}") for name, data in task.masks.items()}
    kept = masks["own"].keep_LI.sum(1)
    keeps_LI: dict[str, Tensor | None] = {"unpruned": None, **{name: mask.keep_LI for name, mask in masks.items()}}
    keeps_LI["activation"] = topk_mask(generic_LI, int(kept.sum()) // len(kept))
    keeps_LI["random"] = topk_mask(random(backbone, config.learning.seed), kept)
    ordered = {name: keeps_LI[name] for name in METHODS if name in keeps_LI}
    losses: dict[str, dict[str, float]] = {}
    for text, rows in task.texts.items():
        if rows:
            every, persona = heldout_losses(backbone, config, task.description, rows, ordered)
            losses |= {text: every, text + PERSONA_TOKENS: persona}
    return losses


def read_conversations(config: RunConfig) -> dict[str, tuple[Row, ...]]:
    """Rows by persona from `evaluation.conversations`. Raises ConfigError with file and row."""
    path = config.evaluation.conversations
    if path is None:
        return {}
    rows: dict[str, list[Row]] = {}
    try:
        text = read_url(path).decode("utf-8")
    except (NotFoundError, UnicodeDecodeError) as error:
        raise ConfigError(f"evaluation.conversations = {path!r}: {error}") from None
    for number, line in enumerate(text.splitlines(), 1):
        try:
            value = json.loads(line)
            rows.setdefault(value["persona_id"], []).append(Row(value["question"], value["answer"]))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ConfigError(f"{path}:{number}: not a row of persona_id, question, answer: {error}") from None
    return {persona_id: tuple(some[: config.evaluation.max_rows]) for persona_id, some in rows.items()}


def tasks(
    config: RunConfig,
    personas: Sequence[Persona],
    storage: Storage,
    data_of: Callable[[Persona], PersonaData],
    global_mask: bytes | None,
) -> Iterable[EvaluationTask]:
    """One task for each masked persona. "other" is the mask of the persona half the list away, so of another family."""
    conversations = read_conversations(config)
    masks = {persona.id: storage.get(keys.mask(persona.id)) for persona in personas}
    for position, persona in enumerate(personas):
        chosen = {"own": masks[persona.id]}
        if len(personas) > 1:
            chosen["other"] = masks[personas[(position + len(personas) // 2) % len(personas)].id]
        if global_mask is not None:
            chosen["global"] = global_mask
        yield EvaluationTask(
            persona_id=persona.id,
            description=persona.description,
            texts={
                "answers": data_of(persona).heldout[: config.evaluation.max_rows],
                "conversations": conversations.get(persona.id, ()),
            },
            masks=chosen,
        )


def stored(storage: Storage, task: EvaluationTask) -> dict[str, dict[str, float]] | None:
    """The figures of this very task from an earlier run, if they are there."""
    try:
        value = json.loads(storage.get(keys.evaluation(task.persona_id)))
    except NotFoundError:
        return None
    return value["losses"] if value["task"] == task.digest() else None


def store(storage: Storage, task: EvaluationTask, losses: Mapping[str, Mapping[str, float]]) -> None:
    value = {"persona_id": task.persona_id, "task": task.digest(), "losses": losses}
    storage.put(keys.evaluation(task.persona_id), json.dumps(value, indent=1).encode())


def mean(results: Mapping[str, Mapping[str, Mapping[str, float]]], text: str) -> dict[str, float]:
    """Mean over the personas that have this text, by method."""
    some = [losses[text] for losses in results.values() if text in losses]
    return {name: sum(row[name] for row in some) / len(some) for name in METHODS if some and name in some[0]}


def render(results: Mapping[str, Mapping[str, Mapping[str, float]]], ratio: Any) -> list[Table]:
    """A table per kind of text; the best pruned column of each row is bold."""
    tables = []
    for text in TEXTS:
        means = mean(results, text)
        if not means:
            continue
        title = f"Loss on {HEADINGS[text]}, ratio {ratio}"
        table = Table(title=title, title_justify="left", caption_justify="left")
        table.add_column("persona")
        for name in means:
            table.add_column(name, justify="right")
        for persona_id, losses in results.items():
            if text in losses:
                table.add_row(persona_id, *_cells(losses[text]))
        table.add_section()
        table.add_row("mean", *_cells(means))
        if decided := mean(results, text + PERSONA_TOKENS):
            table.add_row("mean, persona tokens", *_cells(decided))
        table.caption = "\n".join(_differences(results, text))
        tables.append(table)
    return tables


def differences(
    results: Mapping[str, Mapping[str, Mapping[str, float]]], text: str, rival: str
) -> tuple[float, float, int, int]:
    """By how much own masks beat the rival's, paired over the personas that have this text: mean, its standard error
    (NaN for one persona), for how many, of how many."""
    gains = [losses[text][rival] - losses[text]["own"] for losses in results.values() if rival in losses.get(text, {})]
    error = statistics.stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else math.nan
    return statistics.mean(gains) if gains else math.nan, error, sum(gain > 0 for gain in gains), len(gains)


def _differences(results: Mapping[str, Mapping[str, Mapping[str, float]]], text: str) -> Iterator[str]:
    for rival, name in zip(RIVALS, ("the global mask", "another persona's mask"), strict=True):
        said = []
        for tokens in ("", PERSONA_TOKENS):
            gain, error, better, count = differences(results, text + tokens, rival)
            if count:
                said.append(f"{gain:+.3f} ± {error:.3f} (better for {better} of {count}){tokens}")
        if said:
            yield f"own mask against {name}: {'; '.join(said)}"


def _cells(losses: Mapping[str, float]) -> list[str]:
    best = min(value for name, value in losses.items() if name != "unpruned")
    return [
        f"[bold]{value:.3f}[/bold]" if value == best and name != "unpruned" else f"{value:.3f}"
        for name, value in losses.items()
    ]


Call = Callable[[str, Sequence[Any]], Iterable[tuple[Any, Any]]]
"""Runs a method of the shard groups on each payload; gives (payload, answer) in any order, fewer if stopped."""


def described(storage: Storage, persona_ids: Sequence[str]) -> list[Persona]:
    """Personas as their masks describe them."""
    masks = [Mask.from_bytes(storage.get(keys.mask(name)), keys.mask(name)) for name in persona_ids]
    return [Persona(mask.metadata.persona_id, mask.metadata.persona_description) for mask in masks]


def _global_key(storage: Storage, personas: Sequence[Persona]) -> str:
    """Where the global mask of exactly these masks' data is kept."""
    parts = [
        keys.mask(p.id) + Mask.from_bytes(storage.get(keys.mask(p.id)), p.id).metadata.data_sha256 for p in personas
    ]
    return keys.global_mask(hashlib.sha256("".join(parts).encode()).hexdigest()[:16])


def _open_tasks(
    config: RunConfig, personas: Sequence[Persona], storage: Storage, global_mask: bytes | None
) -> list[EvaluationTask]:
    unfinished = uses_unfinished_answers(config)
    every = tasks(
        config, personas, storage, lambda who: read_persona_data(storage, who, unfinished=unfinished), global_mask
    )
    return [task for task in every if stored(storage, task) is None]


def missing(config: RunConfig, personas: Sequence[Persona], storage: Storage) -> bool:
    """Whether a figure of the comparison is not there yet, or is of other masks or data."""
    key = _global_key(storage, personas)
    if not storage.exists(key):
        return True
    return bool(_open_tasks(config, personas, storage, storage.get(key)))


def compare(config: RunConfig, personas: Sequence[Persona], storage: Storage, call: Call) -> bool:
    """Learn the global mask and measure every persona, as far as it is not done. False where stopped before the end."""
    key = _global_key(storage, personas)
    if not storage.exists(key):
        ratio = Mask.from_bytes(storage.get(keys.mask(personas[0].id)), personas[0].id).metadata.ratio
        for _, data in call("train_global", [(list(personas), ratio)]):
            storage.put(key, data)
    if not storage.exists(key):
        return False
    open_tasks = _open_tasks(config, personas, storage, storage.get(key))
    finished = 0
    for task, losses in call("evaluate", open_tasks):
        store(storage, task, losses)
        finished += 1
    return finished == len(open_tasks)


def stored_tables(personas: Sequence[Persona], storage: Storage, ratio: Any) -> list[Table]:
    """The tables of what is stored for these personas."""
    results = {}
    for persona in personas:
        try:
            results[persona.id] = json.loads(storage.get(keys.evaluation(persona.id)))["losses"]
        except NotFoundError:
            continue
    return render(results, ratio)
