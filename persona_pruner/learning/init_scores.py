"""Where learning starts: the first scores, and how many channels each layer keeps.

Shapes: L layers, I channels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from persona_pruner.backbone.forward import BackboneRunner
from persona_pruner.config.schema import LearningConfig
from persona_pruner.errors import PersonaError
from persona_pruner.learning.batches import MicroBatchConfig, examples_by_prefix
from persona_pruner.learning.budgets import free_widths, kept_channels, rounded_widths
from persona_pruner.learning.encoding import EncodedData, batch
from persona_pruner.learning.estimators import topk_mask
from persona_pruner.learning.fisher import fisher_scores
from persona_pruner.learning.outcome import LearnedScores
from persona_pruner.learning.training_free import activation_scores, magnitude, rank_normalize

FISHER_ROWS = 96
"""Rows, over all personas, from which Fisher scores are taken: more hardly change them and cost a step each 16."""
FISHER_ROWS_PER_PERSONA = 8


@dataclass(frozen=True)
class StartingPoint:
    """`widths_L` (int64) is None where all layers keep the same number, `core_LI` (bool) where no channel is fixed."""

    scores_LI: Tensor
    widths_L: Tensor | None = None
    core_LI: Tensor | None = None
    fisher_LI: Tensor | None = None
    """For the value optimizer."""


class StartingPoints:
    """Starting points of one persona (or pool); statistics that several of them need are computed once.

    `warm_LI`: scores for the inits `persona:` and `mean:`, which the caller has looked up. `pooled`: the pooled mask,
    where the run has one.
    """

    def __init__(
        self,
        runner: BackboneRunner,
        encoded: EncodedData,
        config: LearningConfig,
        settings: MicroBatchConfig,
        warm_LI: Tensor | None = None,
        pooled: LearnedScores | None = None,
    ) -> None:
        self.runner, self.encoded, self.config, self.settings = runner, encoded, config, settings
        self.warm_LI, self.pooled = warm_LI, pooled
        self._fisher_LI: Tensor | None = None

    def start(self, init: str, ratio: float) -> StartingPoint:
        """For an `init` of the configuration. Raises PersonaError (no_warm_scores, no_pooled_mask)."""
        if self.config.optimizer == "value":
            return self._value_start(init, ratio)
        return StartingPoint(self.scores(init), self.widths(ratio), self.core())

    def _value_start(self, init: str, ratio: float) -> StartingPoint:
        """Scores are half of F, what a channel's removal costs. From the pooled mask, F is the mean of the pool's and
        the persona's own, and the pool's scores move by what that changes."""
        widths_L = None if self.config.budget == "free" else self.widths(ratio)
        fisher_LI = self.fisher()
        if init == "fisher":
            return StartingPoint(fisher_LI / 2, widths_L, self.core(), fisher_LI)
        pooled = self._pooled_scores()
        if pooled.fisher_LI is None:
            raise PersonaError("no_pooled_mask", f"{self.encoded.persona_id}: the pooled mask has no Fisher scores")
        pooled_LI = pooled.fisher_LI.to(fisher_LI.device)
        mean_LI = (fisher_LI + pooled_LI) / 2
        scores_LI = self._checked(pooled.scores_LI, init) + (mean_LI - pooled_LI) / 2
        return StartingPoint(scores_LI, widths_L, self.core(), mean_LI)

    def scores(self, init: str) -> Tensor:
        """Scores [L, I] (float32).

        Statistics enter as ranks within their layer, over (0, 1), so that a learning rate means the same for each of
        them; of pooled rows, as the mean over the personas.
        """
        masks, device = self.runner.masks, self.runner.backbone.device
        if init == "zeros":
            return torch.zeros(masks.layers, masks.channels, device=device)
        if init == "activation":
            groups = examples_by_prefix(self.encoded)
            ranks = [rank_normalize(activation_scores(self.runner, *group, self.settings)) for group in groups]
            return torch.stack(ranks).mean(0)
        if init == "fisher":
            return rank_normalize(self.fisher())
        if init == "magnitude":
            return rank_normalize(magnitude(self.runner.backbone))
        if init == "pooled":
            return self._checked(self._pooled_scores().scores_LI, init)
        return self._checked(self.warm_LI, init)

    def widths(self, ratio: float) -> Tensor | None:
        """Channels per layer (int64 [L]) for the budget of the configuration, None where it is uniform."""
        if self.config.budget == "uniform":
            return None
        if self.pooled is not None:
            return self.pooled.keep_LI.sum(1).to(self.runner.backbone.device)
        fisher_LI, multiple = self.fisher(), self.config.channel_multiple
        layers, channels = fisher_LI.shape
        total = layers * kept_channels(channels, ratio, multiple)
        widths_L = free_widths(fisher_LI, total, multiple)
        return rounded_widths(widths_L, channels, multiple) if self.config.budget == "profile" else widths_L

    def core(self) -> Tensor | None:
        """The channels that the pooled mask scores best (bool [L, I]): `learning.core` of those that it keeps."""
        if self.config.core == 0:
            return None
        pooled = self._pooled_scores()
        widths_L = (self.config.core * pooled.keep_LI.sum(1).double()).round().long()
        scores_LI = self._checked(pooled.scores_LI, "pooled")
        return topk_mask(scores_LI, widths_L.to(scores_LI.device))

    def fisher(self) -> Tensor:
        """Mean over the personas of their Fisher scores [L, I]."""
        if self._fisher_LI is None:
            groups = examples_by_prefix(self.encoded)
            rows = max(FISHER_ROWS // len(groups), FISHER_ROWS_PER_PERSONA)
            scores = []
            for prefix, examples in groups:
                chosen = batch(len(examples), rows, 0, self.config.seed, self.encoded.sha256)
                some = [examples[number] for number in sorted(chosen)]
                scores.append(fisher_scores(self.runner, prefix, some, self.settings))
            self._fisher_LI = torch.stack(scores).mean(0)
        return self._fisher_LI

    def _pooled_scores(self) -> LearnedScores:
        if self.pooled is None:
            raise PersonaError("no_pooled_mask", f"{self.encoded.persona_id}: the run has no pooled mask to start from")
        return self.pooled

    def _checked(self, scores_LI: Tensor | None, init: str) -> Tensor:
        masks, persona_id = self.runner.masks, self.encoded.persona_id
        if scores_LI is None:
            raise PersonaError("no_warm_scores", f"{persona_id}: learning.init = {init}: no scores were found")
        if scores_LI.shape != (masks.layers, masks.channels):
            raise PersonaError(
                "no_warm_scores",
                f"{persona_id}: learning.init = {init}: scores of shape {list(scores_LI.shape)}, this backbone "
                f"needs {[masks.layers, masks.channels]}",
            )
        return scores_LI.to(self.runner.backbone.device, torch.float32)
