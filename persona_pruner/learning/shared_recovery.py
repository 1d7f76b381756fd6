"""One mended backbone for all masks of a run: refitted FFN outputs, gains of channels and norms, and an update of low
rank, that make up for what masks take away.

Masks stay what they are, a few kilobytes each. What they cost is partly the same for all of them, and that part is
learned once, under the personas' own masks and on their rows, and folded into the weights: the result is a checkpoint
of the same architecture which takes the place of the backbone wherever its masks are used.

Shapes: P personas of a step, L layers, I channels.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from persona_pruner.backbone.files import RECOVERED
from persona_pruner.backbone.forward import BackboneRunner
from persona_pruner.backbone.load import Backbone
from persona_pruner.config.schema import RunConfig
from persona_pruner.dataset import PersonaData, Row
from persona_pruner.errors import BackboneError
from persona_pruner.learning.batches import MicroBatchConfig, TrainingExample
from persona_pruner.learning.encoding import batch, encode
from persona_pruner.learning.objective import mask_gradient
from persona_pruner.learning.persona_tokens import with_foreign_rows
from persona_pruner.learning.refit import MaskedRows, refit_outputs
from persona_pruner.learning.teacher import TeacherCache
from persona_pruner.learning.weight_updates import Gains, LowRank

PARTS = (0.5, 0.75, 1.0)
"""How much of a change may be kept."""
PERSONAS_PER_STEP = 2
LOW_RANK_RATE = 0.2
"""Rate of the update of low rank as a part of the gains'."""
WARM_UP_STEPS = 5
NORM_RATE = 0.5
"""Rate of the norms' gains, which all channels of a block feel, as a part of the others'."""


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """How a backbone is mended. With `rank` 0 only gains are learned, with `refit_rows` 0 nothing is refitted."""

    steps: int = 60
    rate: float = 0.01
    """Adam's for the gains."""
    rank: int = 16
    """Of the matrices' update."""
    refit_rows: int = 1536
    """Rows of all personas together on which the FFN outputs are refitted."""
    foreign: float = 0.5
    """Share of the rows that the personas did not write."""
    personas: int = 16
    """Under how many masks."""


@dataclass(frozen=True)
class Masked:
    """A persona's rows and its mask, bool [L, I]."""

    data: PersonaData
    keep_LI: Tensor


def recover(
    backbone: Backbone,
    config: RunConfig,
    masked: Sequence[Masked],
    foreign: Sequence[Row],
    recovery: Recovery,
    heldout: Callable[[], float],
    say: Callable[[str], None] = lambda line: None,
) -> tuple[float, float]:
    """Mend `backbone`, in place. The loss on held-out answers before and after, nats per token, as `heldout` tells it.

    `foreign` are rows that the personas did not write.

    1. Refit the FFN output matrices in closed form, on `refit_rows` of the rows.
    2. Learn gains, and with a `rank` an update of the matrices: Adam at `rate`, going down to 0 linearly; a step has
       the usual number of rows, of two personas under their masks. The loss is KL(unpruned || masked).

    Of what each of them changes the part is kept that does best on held-out answers. `say` is told how it goes. Raises
    BackboneError for a sharded backbone, PersonaError for rows that cannot be used.
    """
    if backbone.sharded:
        raise BackboneError("recovery needs the whole backbone in one process: groups.shards = 1")
    config = distilling(config, recovery)
    settings, objective = MicroBatchConfig.of(config, backbone.device), config.learning.objective
    rows, teacher = _Rows(backbone, config, masked, foreign), TeacherCache(objective.top_logits, objective.head_tokens)
    with BackboneRunner(backbone) as runner:
        for number, visited in rows.visited(recovery.steps).items():
            teacher.collect_rows(runner, rows.encoded[number], settings, visited)
    parts = _Parts(backbone, heldout, say)
    before = parts.loss
    if recovery.refit_rows:
        with BackboneRunner(backbone) as runner:
            for layer, (missing, left) in enumerate(refit_outputs(runner, rows.masked(recovery.refit_rows), settings)):
                say(f"layer {layer}: {missing:.1%} of its hidden states' squares missing, {left:.1%} when refitted")
        parts.keep_best()
    _learn_updates(backbone, rows, recovery, settings, teacher, say)
    parts.keep_best()
    return before, parts.loss


def _learn_updates(
    backbone: Backbone,
    rows: "_Rows",
    recovery: Recovery,
    settings: MicroBatchConfig,
    teacher: TeacherCache,
    say: Callable[[str], None],
) -> None:
    gains, low_rank = Gains(backbone.model), LowRank(backbone.model, recovery.rank, rows.learning.seed)
    groups = [
        {"params": gains.of_channels(), "factor": 1.0},
        {"params": gains.of_norms(), "factor": NORM_RATE},
        {"params": low_rank.parameters(), "factor": LOW_RANK_RATE},
    ]
    optimizer = torch.optim.Adam([g for g in groups if g["params"]], lr=recovery.rate, betas=(0.9, 0.95), eps=1e-12)
    with BackboneRunner(backbone) as runner:
        for step in range(recovery.steps):
            now = recovery.rate * min((step + 1) / WARM_UP_STEPS, 1) * (1 - step / recovery.steps)
            for group in optimizer.param_groups:
                group["lr"] = now * group["factor"]
            optimizer.zero_grad()
            chosen = list(rows.of_step(step))
            keep_PLI = torch.stack([rows.keeps[number] for number in chosen]).to(backbone.device).float()
            prefixes = [rows.encoded[number].prefixes[0] for number in chosen]
            with low_rank.applied(), gains.applied():
                grad_PLI, loss = mask_gradient(
                    runner, keep_PLI * gains.channels_LI, prefixes, rows.examples(step), settings, teacher
                )
            gains.channels_LI.grad = (grad_PLI * keep_PLI).sum(0)
            optimizer.step()
            if step == 0 or (step + 1) % 10 == 0:
                say(f"step {step + 1}: {float(loss.total.sum()):.4f} nats per token")
    low_rank.fold()
    gains.fold()


class _Parts:
    """How much of a change of the weights is kept: the whole of it fits the rows that it was learned on too well."""

    def __init__(self, backbone: Backbone, heldout: Callable[[], float], say: Callable[[str], None]) -> None:
        self._backbone, self._heldout, self._say = backbone, heldout, say
        self._kept = self._weights()
        self.loss = heldout()

    def _weights(self) -> dict[str, Tensor]:
        return {name: weight.clone() for name, weight in self._backbone.model.state_dict().items()}

    def keep_best(self) -> None:
        """Of all that has changed since the last call, as many of `PARTS` as do best; nothing where nothing helps."""
        changed, losses = self._weights(), {0.0: self.loss}
        for part in PARTS:
            self._set(changed, part)
            losses[part] = self._heldout()
            self._say(f"{part:.0%} of the change: held-out answers at {losses[part]:.4f} nats per token")
        best = min(losses, key=lambda part: losses[part])
        self._set(changed, best)
        self._kept, self.loss = self._weights(), losses[best]

    @torch.no_grad()
    def _set(self, changed: dict[str, Tensor], part: float) -> None:
        for name, weight in self._backbone.model.state_dict().items():
            weight.copy_(self._kept[name].float().lerp(changed[name].float(), part))


def distilling(config: RunConfig, recovery: Recovery) -> RunConfig:
    """The run's configuration, whatever its masks learned from, with what a mended backbone learns from."""
    learned = {"cross_entropy": 0.0, "distillation": 1.0, "foreign": recovery.foreign}
    objective = config.learning.objective.model_copy(update=learned)
    return config.model_copy(update={"learning": config.learning.model_copy(update={"objective": objective})})


def save_recovered(backbone: Backbone, to: Path) -> None:
    """Write the checkpoint; what was made for the backbone that it comes from is taken to be made for it too.

    Raises BackboneError where `to` is in use; nothing is left in `to` where writing fails.
    """
    check_free(to)
    partial = to.with_name(f".{to.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        model: Any = backbone.model
        model.save_pretrained(partial)
        backbone.tokenizer.save_pretrained(partial)
        (partial / RECOVERED).write_text(json.dumps({"fingerprint": backbone.fingerprint}), encoding="utf-8")
        if to.exists():
            to.rmdir()
        partial.rename(to)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_free(to: Path) -> None:
    if to.exists() and any(to.iterdir()):
        raise BackboneError(f"{to}: not empty; give a directory that does not exist yet")


class _Rows:
    """The rows of all personas, and which of them a step has: some of two personas."""

    def __init__(self, backbone: Backbone, config: RunConfig, masked: Sequence[Masked], foreign: Sequence[Row]) -> None:
        self.learning = config.learning
        self.keeps = [each.keep_LI for each in masked]
        data = [with_foreign_rows(each.data, foreign, self.learning) for each in masked]
        limit = self.learning.max_row_tokens
        self.encoded = [encode(backbone.tokenizer, config.prompt, each, limit) for each in data]

    def of_step(self, step: int) -> dict[int, list[int]]:
        """Numbers of rows by number of the persona."""
        personas = min(PERSONAS_PER_STEP, len(self.encoded))
        share, first = max(self.learning.rows_per_step // personas, 1), step * personas
        chosen = [(first + n) % len(self.encoded) for n in range(personas)]
        visit, seed = first // len(self.encoded), self.learning.seed
        return {
            number: batch(len(self.encoded[number].train), share, visit, seed, self.encoded[number].sha256)
            for number in chosen
        }

    def masked(self, count: int) -> list[MaskedRows]:
        """So many rows of all personas together, the first ones of their order."""
        share, every = max(count // len(self.encoded), 1), []
        for own, keep_LI in zip(self.encoded, self.keeps, strict=True):
            numbers = batch(len(own.train), share, 0, self.learning.seed, own.sha256)
            every.append(MaskedRows(own.prefixes[0], [own.train[n] for n in numbers], keep_LI))
        return every

    def visited(self, steps: int) -> dict[int, set[int]]:
        every: dict[int, set[int]] = {}
        for step in range(steps):
            for number, rows in self.of_step(step).items():
                every.setdefault(number, set()).update(rows)
        return every

    def examples(self, step: int) -> list[TrainingExample]:
        """In slots by persona; the loss is the mean over the personas of the means over their answer tokens."""
        examples = []
        chosen = self.of_step(step)
        for slot, (number, rows) in enumerate(chosen.items()):
            own = self.encoded[number]
            tokens = sum(own.train[n].answer for n in rows) * len(chosen)
            examples += [TrainingExample(slot, (own.persona_id, n), own.train[n], 1 / tokens) for n in rows]
        return examples
