"""Masks without training: one pass over a persona's rows decides what is kept.

Takes the place of the trainer for the methods of `learning.method` that do not learn. There is nothing to checkpoint:
who is killed takes the pass again, with the same result.
"""

import dataclasses
import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from persona_pruner.backbone.forward import BackboneRunner
from persona_pruner.backbone.load import Backbone
from persona_pruner.config.schema import RunConfig
from persona_pruner.dataset import PersonaData
from persona_pruner.errors import PersonaError
from persona_pruner.learning.batches import MicroBatchConfig, examples_by_prefix
from persona_pruner.learning.callbacks import TrainingCallbacks
from persona_pruner.learning.encoding import encode, seeded
from persona_pruner.learning.init_scores import StartingPoints
from persona_pruner.learning.mask_candidate import MaskCandidate
from persona_pruner.learning.methods import weight_choice
from persona_pruner.learning.methods.input_statistics import InputStatistics, collect
from persona_pruner.learning.objective import heldout_cross_entropy
from persona_pruner.learning.outcome import MaskOrigin, TrainingResult, TrainingStatus, made_by, make_mask
from persona_pruner.learning.stoppers import StopReason
from persona_pruner.masks.format import Mask
from persona_pruner.masks.weight_mask import WeightMask, WeightMaskMetadata, pack


class OnePass:
    """`train` as the trainer has it, so that a worker need not know which of the two it has."""

    def __init__(self, backbone: Backbone, config: RunConfig) -> None:
        self.backbone, self.config, self.learning = backbone, config, config.learning
        with BackboneRunner(backbone) as runner:
            runner.check_head()

    def train(
        self, data: Sequence[PersonaData], *, run_id: str, callbacks: TrainingCallbacks | None = None
    ) -> list[TrainingResult]:
        """One result for each of `data`, in order. Every rank of the group calls this with the same arguments.

        A fault of one persona is its result (FAILED) and leaves the others alone.
        """
        torch.set_num_threads(self.config.groups.cpu_threads)
        results = []
        for each in data:
            try:
                results.append(self._result(each, run_id))
            except PersonaError as error:
                results.append(TrainingResult.failed(each.persona_id, error))
        return results

    def _result(self, data: PersonaData, run_id: str) -> TrainingResult:
        before = time.monotonic()
        with BackboneRunner(self.backbone) as runner:
            persona = _OnePassPersona(runner, self.config, data)
            mask = persona.mask(MaskOrigin(data, persona.heldout_loss(), run_id))
        return TrainingResult(
            persona_id=data.persona_id,
            status=TrainingStatus.DONE,
            heldout_loss=mask.metadata.masked_loss,
            seconds=time.monotonic() - before,
            tokens=sum(len(row.tokens) for row in persona.encoded.train),
            reason=StopReason.STEPS,
            mask=mask if self.backbone.world.rank == 0 else None,
        )


class _OnePassPersona:
    """One persona's rows under a runner, and the mask that they give. Raises PersonaError as `encode` does."""

    def __init__(self, runner: BackboneRunner, config: RunConfig, data: PersonaData) -> None:
        self.runner, self.backbone, self.config, self.learning = runner, runner.backbone, config, config.learning
        self.settings = MicroBatchConfig.of(config, runner.backbone.device)
        self.data = data
        self.encoded = encode(self.backbone.tokenizer, config.prompt, data, self.learning.max_row_tokens)

    def mask(self, origin: MaskOrigin) -> Mask | WeightMask:
        return self._weight_mask(origin) if self.learning.is_weight_level else self._channel_mask(origin)

    def heldout_loss(self, mask_LI: Tensor | None = None) -> float | None:
        """Cross-entropy of the held-out rows, nats per token; None where there are none."""
        if not self.encoded.heldout:
            return None
        prefix = self.encoded.prefixes[0]
        return heldout_cross_entropy(self.runner, prefix, self.encoded.heldout, mask_LI, self.settings)

    @property
    def _ratio(self) -> float:
        assert self.learning.ratio != "auto", "the configuration refuses it"
        return self.learning.ratio

    def _opposite(self) -> "_OnePassPersona":
        if self.data.opposite is None:
            raise PersonaError(
                "no_opposite",
                f"{self.data.persona_id}: learning.method = {self.learning.method} contrasts two personas; name the "
                "other one in the manifest's column opposite",
            )
        return _OnePassPersona(self.runner, self.config, self.data.opposite)

    def _channel_mask(self, origin: MaskOrigin) -> Mask:
        starts = self._starts()
        candidate = MaskCandidate(
            self.learning,
            self.data.persona_id,
            self._channel_scores(starts),
            self.runner.masks.channels,
            self._ratio,
            self.learning.learning_rate,
            widths_L=starts.widths(self._ratio),
        )
        candidate.heldout = self.heldout_loss(candidate.mask())
        return make_mask(self.backbone, self.learning, candidate, origin)

    def _starts(self) -> StartingPoints:
        return StartingPoints(self.runner, self.encoded, self.learning, self.settings)

    def _channel_scores(self, starts: StartingPoints) -> Tensor:
        """[L, I]; contrastive: the persona's activation ranks minus those under the opposed persona."""
        method = self.learning.method
        if method == "random":
            shape = (self.runner.masks.layers, self.runner.masks.channels)
            drawn_LI = torch.rand(shape, generator=seeded(method, self.learning.seed, self.data.persona_id))
            return drawn_LI.to(self.backbone.device)
        if method != "contrastive":
            return starts.scores(method)
        return starts.scores("activation") - self._opposite()._starts().scores("activation")

    def _weight_mask(self, origin: MaskOrigin) -> WeightMask:
        packed, matrices = {}, {}
        for name, keep_OI in self._choices():
            rows, columns = keep_OI.shape
            packed[name], matrices[name] = pack(keep_OI), (rows, columns, int(keep_OI[0].sum()))
        made = made_by(self.backbone, self.learning, origin)
        metadata = WeightMaskMetadata(**made, ratio=self._ratio, steps=0, gate=self.learning.gate, matrices=matrices)
        mask = WeightMask(packed, metadata)
        if self.backbone.sharded:
            return mask  # its matrices lie in pieces: nothing can be multiplied into them to measure a loss
        with mask.apply(self.backbone.model, check_backbone=False):
            loss = self.heldout_loss()
        return WeightMask(packed, dataclasses.replace(metadata, masked_loss=loss))

    def _choices(self) -> Iterator[tuple[str, Tensor]]:
        """Name and bool [O, I] of every block matrix."""
        opposite = self._opposite() if self.learning.is_contrastive else None
        opposed = opposite._statistics() if opposite is not None else None
        for name, linear, own in self._statistics():
            other = next(opposed)[2] if opposed is not None else None
            with self.backbone.gathered_parameters([linear.weight]):
                yield name, self._choice(linear.weight.detach(), own, other)

    def _statistics(self) -> Iterator[tuple[str, nn.Linear, InputStatistics]]:
        ((prefix, examples),) = examples_by_prefix(self.encoded)
        return collect(self.runner, prefix, examples, self.settings, gram=self.learning.method == "sparsegpt")

    def _choice(self, weight_OI: Tensor, own: InputStatistics, opposed: InputStatistics | None) -> Tensor:
        method = self.learning.method
        kept = weight_choice.kept_weights(weight_OI.shape[1], self._ratio)
        if method == "wanda":
            return weight_choice.wanda(weight_OI, own, kept)
        if method == "sparsegpt":
            return weight_choice.sparsegpt(weight_OI, own, kept)
        assert opposed is not None
        assert self.data.opposite is not None
        if method == "contrastive_wanda":
            return weight_choice.contrastive_wanda(weight_OI, own, opposed, kept)
        # The published code lets one of the two choose first; which one must not depend on who is made first.
        first = self.data.persona_id < self.data.opposite.persona_id
        return weight_choice.contrastive_sparse(weight_OI, own, opposed, kept, first)
