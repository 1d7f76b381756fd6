"""Learns the masks of one persona, or of several that share every step, on one shard group.

Every rank runs the same program on the same data; gradients and decisions of rank 0 travel in one sum a step, so all
ranks stay in step. Nothing depends on global random state, on time, or on who else is in the step.

Shapes: P trials in the step, L layers, I channels.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from persona_pruner.backbone.forward import BackboneRunner
from persona_pruner.backbone.load import Backbone
from persona_pruner.config.schema import RunConfig
from persona_pruner.dataset import PersonaData
from persona_pruner.errors import PersonaError
from persona_pruner.learning import halving
from persona_pruner.learning import mask_candidate as trials
from persona_pruner.learning.batches import TrainingExample
from persona_pruner.learning.encoding import Encoded, EncodedRow, batch, encode
from persona_pruner.learning.init_scores import initial_scores
from persona_pruner.learning.mask_candidate import MaskCandidate
from persona_pruner.learning.objective import MicroBatchConfig, TeacherCache, mask_gradient, mask_losses
from persona_pruner.learning.outcome import Progress, StopReason, TrainingResult, finish
from persona_pruner.learning.training_free import items_of


@dataclass
class _Persona:
    """A persona in training, with its trials (one, except while successive halving compares several)."""

    data: PersonaData
    encoded: Encoded
    trials: list[MaskCandidate]
    dense: float | None
    saved_step: int = 0
    saved_time: float = field(default_factory=time.monotonic)


class MaskTrainer:
    """Keeps what is shared by all personas of a group. Raises BackboneError for a backbone that it cannot train on."""

    def __init__(self, backbone: Backbone, config: RunConfig) -> None:
        self.backbone, self.config, self.learning = backbone, config, config.learning
        overhead = 1024 if backbone.device.type == "cuda" else 16
        self.settings = MicroBatchConfig(config.learning.objective, config.learning.micro_batch_tokens, overhead)
        self.targets = TeacherCache(config.learning.objective.top_logits)
        with BackboneRunner(backbone) as runner:
            runner.check_head()

    def train(
        self,
        data: Sequence[PersonaData],
        *,
        run_id: str,
        restore: Mapping[str, bytes] | None = None,
        checkpoint: Callable[[str, bytes], None] = lambda persona_id, data: None,
        should_stop: Callable[[], bool] = lambda: False,
        progress: Callable[[Progress], None] = lambda progress: None,
        warm_scores: Mapping[str, Tensor] | None = None,
    ) -> list[TrainingResult]:
        """Train all of `data` together; one result for each, in order.

        Every rank of the group calls this with the same arguments; rank 0 alone calls `checkpoint` and `progress`,
        and only its `should_stop` counts. A fault of one persona is its result (FAILED) and leaves the others alone.
        Paused personas were checkpointed first; `restore` goes on from there exactly.
        """
        torch.set_num_threads(self.config.groups.cpu_threads)
        results: dict[str, TrainingResult] = {}
        live: list[_Persona] = []
        with BackboneRunner(self.backbone, checkpoint_layers=self.learning.gradient_checkpointing) as runner:
            for each in data:
                try:
                    live.append(self._begin(runner, each, restore or {}, (warm_scores or {}).get(each.persona_id)))
                except PersonaError as error:
                    results[each.persona_id] = TrainingResult.failed(each.persona_id, error)
            while live := [persona for persona in live if persona.data.persona_id not in results]:
                stop, overdue = self._step(runner, live, should_stop, progress, results)
                for persona, late in zip(live, overdue, strict=True):
                    if persona.trials:
                        result = self._after_step(runner, persona, stop, late, checkpoint, progress, run_id)
                        results |= {persona.data.persona_id: result} if result else {}
        self.targets.rows.clear()
        return [results[each.persona_id] for each in data]

    def _begin(
        self, runner: BackboneRunner, data: PersonaData, restore: Mapping[str, bytes], warm_LI: Tensor | None
    ) -> _Persona:
        encoded = encode(self.backbone.tokenizer, self.config.prompt, data, self.learning.max_row_tokens)
        if self.learning.objective.distillation:
            self.targets.collect(runner, [encoded.prefix], items_of(encoded), self.settings)
        dense = self._heldout(runner, encoded, None)
        old = restore.get(data.persona_id)
        found = old and trials.from_bytes(old, self.learning, data.sha256, self.backbone.device)
        if not found:
            found = [
                MaskCandidate(self.learning, data.persona_id, scores, runner.masks.channels, ratio, rate, name)
                for name, ratio, rate, init in halving.candidates(self.learning)
                for scores in [initial_scores(runner, encoded, init, warm_LI, self.settings)]
            ]
        for trial in found:
            if not torch.isfinite(trial.scores_LI).all():
                raise PersonaError("not_finite", f"{data.persona_id}: the scores it starts from are not finite")
        return _Persona(data, encoded, found, dense, found[0].step)

    def _step(
        self,
        runner: BackboneRunner,
        live: Sequence[_Persona],
        should_stop: Callable[[], bool],
        progress: Callable[[Progress], None],
        results: dict[str, TrainingResult],
    ) -> tuple[bool, list[bool]]:
        """One step of every live persona. Returns what rank 0 decided: whether to stop, and whose time is up."""
        before = time.monotonic()
        pairs = [(persona, trial) for persona in live for trial in persona.trials]
        relaxed = [trial.training_mask() for _, trial in pairs]
        items = [item for slot, (persona, trial) in enumerate(pairs) for item in self._batch(slot, persona, trial)]
        prefixes = [persona.encoded.prefix for persona, _ in pairs]
        masks_PLI = torch.stack([mask.detach() for mask, _ in relaxed])
        grad_PLI, losses = mask_gradient(runner, masks_PLI, prefixes, items, self.settings, self._teacher())
        flags = self._flags(live, should_stop).to(grad_PLI.device)
        flat = self.backbone.all_reduce(torch.cat([grad_PLI.flatten(), losses.total, flags]))
        grad_PLI = flat[: grad_PLI.numel()].view_as(grad_PLI)
        loss_P = flat[grad_PLI.numel() :][: len(pairs)]
        seconds = (time.monotonic() - before) / len(pairs)
        for slot, (persona, trial) in enumerate(pairs):
            loss = loss_P[slot].item()
            mask, leaf = relaxed[slot]
            try:
                if not math.isfinite(loss):
                    raise PersonaError("not_finite", f"{trial.persona_id}: loss is {loss} at step {trial.step}")
                (grad_LI,) = torch.autograd.grad(mask, leaf, grad_PLI[slot])
                trial.update(grad_LI)
            except PersonaError as error:
                persona.trials.remove(trial)
                if not persona.trials:
                    results[persona.data.persona_id] = TrainingResult.failed(persona.data.persona_id, error)
                continue
            trial.seconds += seconds
            trial.tokens += sum(len(i.row.tokens) for i in items if i.slot == slot) + len(prefixes[slot])
            if self.backbone.world.rank == 0:
                progress(Progress(trial.persona_id, trial.step, loss, trial.heldout, trial.tokens, trial.seconds))
        stop, *late = (flat[flat.numel() - flags.numel() :] > 0).tolist()
        return stop, late

    def _batch(self, slot: int, persona: _Persona, trial: MaskCandidate) -> list[TrainingExample]:
        rows = persona.encoded.train
        numbers = batch(len(rows), self.learning.rows_per_step, trial.step, self.learning.seed, persona.encoded.sha256)
        tokens = sum(rows[n].answer for n in numbers)
        return [TrainingExample(slot, (persona.data.persona_id, n), rows[n], 1 / tokens) for n in numbers]

    def _flags(self, live: Sequence[_Persona], should_stop: Callable[[], bool]) -> Tensor:
        flags = torch.zeros(1 + len(live))
        if self.backbone.world.rank == 0:
            limit = self.learning.stoppers.seconds
            flags[0] = float(should_stop())
            for number, persona in enumerate(live):
                flags[1 + number] = float(limit is not None and sum(t.seconds for t in persona.trials) > limit)
        return flags

    def _after_step(
        self,
        runner: BackboneRunner,
        persona: _Persona,
        stop: bool,
        late: bool,
        checkpoint: Callable[[str, bytes], None],
        progress: Callable[[Progress], None],
        run_id: str,
    ) -> TrainingResult | None:
        """Evaluate, select and checkpoint where it is time to; the outcome once the persona is through."""
        reason = self._evaluate(runner, persona, late)
        if len(persona.trials) > 1 and halving.is_rung(self.learning, persona.trials[0].step, len(persona.trials)):
            for trial in persona.trials:
                trial.heldout = self._heldout(runner, persona.encoded, trial.mask())
            persona.trials = halving.better_half(persona.trials, persona.dense, self.learning.ratio_tolerance)
        if reason:
            persona.trials = halving.better_half(persona.trials, persona.dense, self.learning.ratio_tolerance, keep=1)
            trial = persona.trials[0]
            if reason is StopReason.SECONDS or not self._next_ratio(trial, persona.dense):
                return finish(self.backbone, self.learning, persona.data, trial, persona.dense, reason, run_id)
        if stop or self._checkpoint_due(persona):
            if self.backbone.world.rank == 0:
                checkpoint(persona.data.persona_id, trials.to_bytes(persona.trials, persona.data.sha256))
            persona.saved_step, persona.saved_time = persona.trials[0].step, time.monotonic()
        return TrainingResult.paused(persona.trials) if stop else None

    def _evaluate(self, runner: BackboneRunner, persona: _Persona, late: bool) -> StopReason | None:
        """Held-out losses where they are due; the reason to end this persona's training, if there is one."""
        step = persona.trials[0].step
        ended = StopReason.STEPS if step >= self.learning.steps else StopReason.SECONDS if late else None
        if not (ended or step % self.learning.evaluate_every == 0):
            return None
        reasons = []
        for trial in persona.trials:
            mask_LI = trial.mask()
            trial.heldout = self._heldout(runner, persona.encoded, mask_LI)
            reasons.append(None if trial.heldout is None else trial.stopper.see(trial.heldout, mask_LI))
        found = reasons[0] if len(reasons) == 1 else None
        return ended or (StopReason(found) if found else None)

    def _next_ratio(self, trial: MaskCandidate, dense: float | None) -> bool:
        """For the ratio `auto`: whether the trial goes on with a larger ratio. Else it holds its final scores."""
        if self.learning.ratio != "auto":
            return False
        ladder = sorted(self.learning.ratio_ladder)
        good = trial.heldout is None or dense is None or trial.heldout <= dense + self.learning.ratio_tolerance
        if good and trial.rung + 1 < len(ladder):
            trial.scores_LI = trial.accepted_LI = trial.learned()
            trial.rung += 1
            trial.ratio = ladder[trial.rung]
            trial.reset()
            return True
        if not good and trial.accepted_LI is not None:
            trial.scores_LI, trial.ratio, trial.mean_LI = trial.accepted_LI, ladder[trial.rung - 1], None
        return False

    def _checkpoint_due(self, persona: _Persona) -> bool:
        every, seconds = self.config.scheduler.checkpoint_steps, self.config.scheduler.checkpoint_seconds
        steps = persona.trials[0].step - persona.saved_step
        return steps < 0 or steps >= every or (steps > 0 and time.monotonic() - persona.saved_time > seconds)

    def _teacher(self) -> TeacherCache | None:
        return self.targets if self.learning.objective.distillation else None

    def _heldout(self, runner: BackboneRunner, encoded: Encoded, mask_LI: Tensor | None) -> float | None:
        """Cross-entropy of the held-out rows, nats per token; None where there are none."""
        return heldout(runner, encoded, encoded.heldout, mask_LI, self.settings)


def heldout(
    runner: BackboneRunner,
    encoded: Encoded,
    rows: Sequence[EncodedRow],
    mask_LI: Tensor | None,
    settings: MicroBatchConfig,
) -> float | None:
    """Cross-entropy of `rows` under a hard mask (or none), nats per token, the same on every rank."""
    if not rows:
        return None
    tokens = sum(row.answer for row in rows)
    items = [TrainingExample(0, (encoded.persona_id, -1 - n), row, 1 / tokens) for n, row in enumerate(rows)]
    masks = None if mask_LI is None else mask_LI.float()[None]
    losses = mask_losses(runner, masks, [encoded.prefix], items, settings)
    return runner.backbone.all_reduce(losses.cross_entropy).item()
