"""Learns the masks of one persona, or of several that share every step, on one shard group.

Every rank runs the same program on the same data; gradients and decisions of rank 0 travel in one sum per step, so
all ranks stay in step. Nothing depends on global random state, on time, or on who else is in the step.

Shapes: P slots of the step, C candidate masks in the step, L layers, I channels.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from persona_pruner.backbone.forward import BackboneRunner
from persona_pruner.backbone.load import Backbone
from persona_pruner.config.schema import RunConfig
from persona_pruner.dataset import PersonaData, read_generic_rows
from persona_pruner.errors import PersonaError
from persona_pruner.learning import halving, mask_candidate
from persona_pruner.learning.batches import MicroBatchConfig, TrainingExample
from persona_pruner.learning.callbacks import TrainingCallbacks
from persona_pruner.learning.encoding import EncodedData, PooledData, encode
from persona_pruner.learning.init_scores import StartingPoints
from persona_pruner.learning.mask_candidate import MaskCandidate
from persona_pruner.learning.objective import heldout_cross_entropy, mask_gradient
from persona_pruner.learning.outcome import MaskOrigin, Progress, TrainingResult, candidate_scores, make_mask
from persona_pruner.learning.persona_tokens import generic_data, nobody_prefix, token_weights, with_foreign_rows
from persona_pruner.learning.persona_training import PersonaTraining
from persona_pruner.learning.stoppers import StopReason
from persona_pruner.learning.teacher import TeacherCache


@dataclass(frozen=True)
class _Decisions:
    """What rank 0 decided during a step."""

    stop: bool
    out_of_time: list[bool]


@dataclass(frozen=True)
class _StepRows:
    """`owner_P` is the number of the candidate that each slot belongs to."""

    examples: list[TrainingExample]
    prefixes: list[tuple[int, ...]]
    owner_P: list[int]

    def tokens(self, candidate: int) -> int:
        """Tokens that a candidate's rows and prefixes have in this step, without padding."""
        rows = sum(len(example.row.tokens) for example in self.examples if self.owner_P[example.slot] == candidate)
        return rows + sum(len(p) for p, own in zip(self.prefixes, self.owner_P, strict=True) if own == candidate)


class MaskTrainer:
    """Keeps what is shared by all personas of a group. Raises BackboneError for a backbone that it cannot train on."""

    def __init__(self, backbone: Backbone, config: RunConfig) -> None:
        self.backbone, self.config, self.learning = backbone, config, config.learning
        self.settings = MicroBatchConfig.of(config, backbone.device)
        objective = config.learning.objective
        self.teacher = TeacherCache(objective.top_logits, objective.head_tokens) if objective.distillation else None
        self.generic = generic_data(backbone, config) if objective.generic else None
        self.foreign = read_generic_rows(objective.generic_rows) if objective.foreign else ()
        with BackboneRunner(backbone) as runner:
            runner.check_head()

    def train(
        self,
        data: Sequence[PersonaData | PooledData],
        *,
        run_id: str,
        callbacks: TrainingCallbacks | None = None,
    ) -> list[TrainingResult]:
        """Train all of `data` together; one result for each, in order.

        Every rank of the group calls this with the same arguments. A fault of one persona is its result (FAILED) and
        leaves the others alone. Paused personas were checkpointed first, and go on from there exactly.
        """
        torch.set_num_threads(self.config.groups.cpu_threads)
        callbacks = callbacks or TrainingCallbacks()
        results: dict[str, TrainingResult] = {}
        with BackboneRunner(self.backbone, checkpoint_layers=self.learning.gradient_checkpointing) as runner:
            live = self._begin_all(runner, data, callbacks, results)
            while live:
                decisions = self._train_step(runner, live, callbacks, results)
                for persona, out_of_time in zip(live, decisions.out_of_time, strict=True):
                    if persona.persona_id in results:
                        continue
                    reason = self._evaluate(runner, persona, out_of_time)
                    self._select(runner, persona, reason)
                    if not persona.goes_on(self.learning, reason):
                        results[persona.persona_id] = self._finish(persona, reason, run_id)
                        continue
                    if decisions.stop or persona.checkpoint_due(self.config.scheduler):
                        self._write_checkpoint(persona, callbacks)
                    if decisions.stop:
                        results[persona.persona_id] = TrainingResult.paused(persona.candidates)
                live = [persona for persona in live if persona.persona_id not in results]
        if self.teacher is not None:
            self.teacher.rows.clear()
        return [results[each.persona_id] for each in data]

    def _begin_all(
        self,
        runner: BackboneRunner,
        data: Sequence[PersonaData | PooledData],
        callbacks: TrainingCallbacks,
        results: dict[str, TrainingResult],
    ) -> list[PersonaTraining]:
        live = []
        if self.generic is not None and self.teacher is not None:
            self.teacher.collect_rows(runner, self.generic, self.settings)
        for each in data:
            try:
                live.append(self._begin(runner, each, callbacks))
            except PersonaError as error:
                results[each.persona_id] = TrainingResult.failed(each.persona_id, error)
        return live

    def _begin(
        self, runner: BackboneRunner, data: PersonaData | PooledData, callbacks: TrainingCallbacks
    ) -> PersonaTraining:
        own = self._encode(data)
        unpruned_loss = self._heldout_loss(runner, own, None)
        checkpoint = callbacks.read_checkpoint(data.persona_id)
        candidates = checkpoint and mask_candidate.from_bytes(
            checkpoint, self.learning, data.sha256, self.backbone.device
        )
        if not candidates:
            candidates = self._new_candidates(runner, own, callbacks)
        if not all(torch.isfinite(candidate.scores_LI).all() for candidate in candidates):
            raise PersonaError("not_finite", f"{data.persona_id}: the scores it starts from are not finite")
        # Starting points come from own rows alone: Fisher takes answers for the model's own.
        encoded = self._encode(with_foreign_rows(data, self.foreign, self.learning)) if self.foreign else own
        weights = self._token_weights(runner, encoded)
        persona = PersonaTraining(data, encoded, candidates, unpruned_loss, weights, self.generic, candidates[0].step)
        if self.teacher is not None:
            self.teacher.collect_rows(runner, encoded, self.settings, persona.visited(self.learning))
        return persona

    def _encode(self, data: PersonaData | PooledData) -> EncodedData:
        return encode(self.backbone.tokenizer, self.config.prompt, data, self.learning.max_row_tokens)

    def _token_weights(self, runner: BackboneRunner, encoded: EncodedData) -> list[tuple[float, ...]] | None:
        strength = self.learning.objective.persona_tokens
        if strength == 0:
            return None
        nobody = nobody_prefix(self.backbone, self.config.prompt)
        return token_weights(runner, encoded, nobody, strength, self.settings)

    def _new_candidates(
        self, runner: BackboneRunner, encoded: EncodedData, callbacks: TrainingCallbacks
    ) -> list[MaskCandidate]:
        pooled = callbacks.pooled_scores() if self.learning.needs_pooled_mask else None
        warm_LI = callbacks.warm_scores(encoded.persona_id)
        starts = StartingPoints(runner, encoded, self.learning, self.settings, warm_LI, pooled)
        steps = self.learning.steps_for(len(encoded.train))
        candidates = []
        for settings in halving.candidate_settings(self.learning):
            start = starts.start(settings.init, settings.ratio)
            candidates.append(
                MaskCandidate(
                    self.learning,
                    encoded.persona_id,
                    start.scores_LI,
                    runner.masks.channels,
                    settings.ratio,
                    settings.learning_rate,
                    name=settings.name,
                    widths_L=start.widths_L,
                    core_LI=start.core_LI,
                    steps=steps,
                    fisher_LI=start.fisher_LI,
                )
            )
        return candidates

    def _train_step(
        self,
        runner: BackboneRunner,
        live: Sequence[PersonaTraining],
        callbacks: TrainingCallbacks,
        results: dict[str, TrainingResult],
    ) -> _Decisions:
        """One step of every live persona. A persona without a candidate left is FAILED in `results`.

        1. Each candidate's relaxed mask, and its rows in one slot per prefix.
        2. Gradient and losses of all slots, summed over slots of a candidate and over ranks, with rank 0's decisions.
        3. Each candidate's update; one that is not finite is dropped.
        """
        before = time.monotonic()
        pairs = [(persona, candidate) for persona in live for candidate in persona.candidates]
        relaxed = [candidate.training_mask() for _, candidate in pairs]
        step = _step_rows(pairs)
        masks_PLI = torch.stack([relaxed[number][0].detach() for number in step.owner_P])
        grad_PLI, losses = mask_gradient(runner, masks_PLI, step.prefixes, step.examples, self.settings, self.teacher)
        owner = torch.tensor(step.owner_P, device=grad_PLI.device)
        grad_CLI = grad_PLI.new_zeros(len(pairs), *grad_PLI.shape[1:]).index_add_(0, owner, grad_PLI)
        loss_C = losses.total.new_zeros(len(pairs)).index_add_(0, owner, losses.total)
        flags = self._own_decisions(live, callbacks).to(grad_CLI.device)
        summed = self.backbone.all_reduce(torch.cat([grad_CLI.flatten(), loss_C, flags]))
        grad_flat, loss_C, flags = summed.split([grad_CLI.numel(), len(pairs), len(flags)])
        seconds = (time.monotonic() - before) / len(pairs)
        for number, (persona, candidate) in enumerate(pairs):
            loss = loss_C[number].item()
            try:
                self._update(candidate, relaxed[number], grad_flat.view_as(grad_CLI)[number], loss)
            except PersonaError as error:
                persona.candidates.remove(candidate)
                if not persona.candidates:
                    results[persona.persona_id] = TrainingResult.failed(persona.persona_id, error)
                continue
            candidate.seconds += seconds
            candidate.tokens += step.tokens(number)
            if self.backbone.world.rank == 0:
                callbacks.report(_progress(candidate, loss))
        stop, *out_of_time = (flags > 0).tolist()
        return _Decisions(stop, out_of_time)

    def _update(self, candidate: MaskCandidate, relaxed: tuple[Tensor, Tensor], grad_LI: Tensor, loss: float) -> None:
        if not math.isfinite(loss):
            raise PersonaError("not_finite", f"{candidate.persona_id}: loss is {loss} at step {candidate.step}")
        mask_LI, leaf_LI = relaxed
        candidate.update(torch.autograd.grad(mask_LI, leaf_LI, grad_LI)[0])
        candidate.losses.append(round(loss, 5))

    def _own_decisions(self, live: Sequence[PersonaTraining], callbacks: TrainingCallbacks) -> Tensor:
        """Whether to stop, and who is out of time, as numbers above 0; zeros on other ranks than 0."""
        flags = torch.zeros(1 + len(live))
        if self.backbone.world.rank == 0:
            flags[0] = float(callbacks.should_stop())
            for number, persona in enumerate(live, 1):
                flags[number] = float(persona.out_of_time(self.learning))
        return flags

    def _evaluate(self, runner: BackboneRunner, persona: PersonaTraining, out_of_time: bool) -> StopReason | None:
        """Held-out losses where they are due; the reason to end this persona's training, if there is one."""
        if persona.step >= persona.steps:
            ended = StopReason.STEPS
        elif out_of_time:
            ended = StopReason.SECONDS
        elif persona.step % self.learning.evaluate_every:
            return None
        else:
            ended = None
        reasons: list[StopReason | None] = []
        for candidate in persona.candidates:
            mask_LI = candidate.mask()
            candidate.heldout = self._heldout_loss(runner, persona.encoded, mask_LI)
            if candidate.heldout is None:
                reasons.append(None)
            else:
                candidate.heldout_losses.append((len(candidate.losses), round(candidate.heldout, 5)))
                reasons.append(candidate.stopper.see(candidate.heldout, mask_LI))
        return ended or (reasons[0] if len(reasons) == 1 else None)

    def _select(self, runner: BackboneRunner, persona: PersonaTraining, reason: StopReason | None) -> None:
        """Successive halving: the better half at a rung, the best one at the end."""
        if halving.is_rung(self.learning, persona.step, len(persona.candidates)):
            for candidate in persona.candidates:
                candidate.heldout = self._heldout_loss(runner, persona.encoded, candidate.mask())
            persona.keep_better_half(self.learning)
        if reason:
            persona.keep_better_half(self.learning, keep=1)

    def _write_checkpoint(self, persona: PersonaTraining, callbacks: TrainingCallbacks) -> None:
        if self.backbone.world.rank == 0:
            data = mask_candidate.to_bytes(persona.candidates, persona.data.sha256)
            callbacks.write_checkpoint(persona.persona_id, data)
        persona.saved()

    def _finish(self, persona: PersonaTraining, reason: StopReason | None, run_id: str) -> TrainingResult:
        assert reason is not None
        candidate = persona.candidates[0]
        if self.backbone.world.rank != 0:
            return TrainingResult.done(candidate, reason)
        origin = MaskOrigin(persona.data, persona.unpruned_loss, run_id)
        mask = make_mask(self.backbone, self.learning, candidate, origin)
        learned = candidate_scores(candidate) if isinstance(persona.data, PooledData) else None
        return TrainingResult.done(candidate, reason, mask, learned)

    def _heldout_loss(self, runner: BackboneRunner, encoded: EncodedData, mask_LI: Tensor | None) -> float | None:
        """Cross-entropy of the held-out rows, nats per token; None where there are none."""
        if not encoded.heldout:
            return None
        return heldout_cross_entropy(runner, encoded.prefixes[0], encoded.heldout, mask_LI, self.settings)


def _step_rows(pairs: Sequence[tuple[PersonaTraining, MaskCandidate]]) -> _StepRows:
    step = _StepRows([], [], [])
    for number, (persona, candidate) in enumerate(pairs):
        for prefix, examples in persona.examples(candidate, len(step.prefixes)):
            step.prefixes.append(prefix)
            step.examples.extend(examples)
            step.owner_P.append(number)
    return step


def _progress(candidate: MaskCandidate, loss: float) -> Progress:
    return Progress(candidate.persona_id, candidate.step, loss, candidate.heldout, candidate.tokens, candidate.seconds)
