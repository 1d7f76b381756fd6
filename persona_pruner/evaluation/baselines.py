"""Masks without training that own ones are compared with, of as many channels.

Generic text stands behind nobody's prompt (`learning.objective.generic_rows`). Taylor: LLM-Pruner's first-order
importance (arXiv 2305.11627). FLAP: arXiv 2312.11983.

Shapes: L layers, I channels, D model width.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from persona_pruner.backbone.channels import find_ffns, forward_hooks
from persona_pruner.backbone.forward import BackboneRunner
from persona_pruner.backbone.load import Backbone
from persona_pruner.config.evaluation import Baseline
from persona_pruner.config.schema import RunConfig
from persona_pruner.dataset import PersonaData
from persona_pruner.learning.batches import MicroBatchConfig, TrainingExample, examples_by_prefix
from persona_pruner.learning.budgets import free_widths
from persona_pruner.learning.estimators import topk_mask
from persona_pruner.learning.fisher import CROSS_ENTROPY
from persona_pruner.learning.methods.input_statistics import collect
from persona_pruner.learning.objective import mask_gradient
from persona_pruner.learning.persona_tokens import generic_data
from persona_pruner.learning.training_free import activation, activation_scores, magnitude, random


class Baselines:
    """Of one backbone; what depends on generic text alone is computed once. Every rank of a group does the same."""

    def __init__(self, backbone: Backbone, config: RunConfig) -> None:
        self.backbone, self.config = backbone, config
        self._settings = MicroBatchConfig.of(config, backbone.device)

    def mask(self, method: Baseline, kept_L: Tensor, data: PersonaData | None) -> tuple[Tensor, Tensor | None] | None:
        """Bool [L, I] and FLAP's biases [L, D]; None where the method needs data that are not there.

        Each layer keeps `kept_L` channels; FLAP shares their sum among the layers by itself. Raises ConfigError,
        PersonaError (row_too_long).
        """
        if method == "flap":
            return self._flap(int(kept_L.sum()))
        if method == "activation" and data is None:
            return None
        return topk_mask(self._scores(method, data).cpu(), kept_L), None

    def _scores(self, method: Baseline, data: PersonaData | None) -> Tensor:
        if method == "activation" and data is not None:
            return activation(self.backbone, self.config, data)
        if method == "activation_generic":
            return self.generic_activation
        if method == "taylor":
            return self._taylor_LI
        return magnitude(self.backbone) if method == "magnitude" else random(self.backbone, self.config.learning.seed)

    @cached_property
    def generic_activation(self) -> Tensor:
        """Scores [L, I]: the published style of pruning without training."""
        with BackboneRunner(self.backbone) as runner:
            return activation_scores(runner, *self._generic, self._settings)

    @cached_property
    def _generic(self) -> tuple[tuple[int, ...], list[TrainingExample]]:
        (group,) = examples_by_prefix(generic_data(self.backbone, self.config))
        return group

    @cached_property
    def _taylor_LI(self) -> Tensor:
        return taylor(self.backbone, *self._generic, self._settings)

    @cached_property
    def _fluctuation(self) -> tuple[Tensor, Tensor]:
        """FLAP's scores [L, I], standardized in each layer so that they compare across layers: the variance of a
        channel times its squared output weights. And the mean of each channel [L, I]."""
        prefix, examples = self._generic
        scores, means = [], []
        with BackboneRunner(self.backbone) as runner:
            statistics = {name: own for name, _, own in collect(runner, prefix, examples, self._settings)}
            for ffn in runner.masks.ffns:
                mean_I, variance_I = statistics[ffn.name].token_moments()
                with self.backbone.gathered_parameters([ffn.output.weight]):
                    score_I = variance_I * ffn.output.weight.detach().double().square().sum(0)
                scores.append((score_I - score_I.mean()) / score_I.std())
                means.append(mean_I)
        return torch.stack(scores), torch.stack(means)

    def _flap(self, total: int) -> tuple[Tensor, Tensor]:
        """What the dropped channels add on average goes into a bias of the layer's FFN."""
        scores_LI, mean_LI = self._fluctuation
        keep_LI = topk_mask(scores_LI, free_widths(scores_LI, total, 1))
        biases = []
        for ffn, mean_I in zip(find_ffns(self.backbone.model), mean_LI.masked_fill(keep_LI, 0), strict=True):
            with self.backbone.gathered_parameters([ffn.output.weight]):
                biases.append(ffn.output.weight.detach().double() @ mean_I)
        return keep_LI.cpu(), torch.stack(biases)


def taylor(
    backbone: Backbone, prefix: Sequence[int], examples: Sequence[TrainingExample], settings: MicroBatchConfig
) -> Tensor:
    """|d cross-entropy / d mask| at all ones, [L, I]."""
    with BackboneRunner(backbone) as runner:
        ones_PLI = torch.ones(1, runner.masks.layers, runner.masks.channels, device=backbone.device)
        settings = replace(settings, objective=CROSS_ENTROPY)
        grad_PLI, _ = mask_gradient(runner, ones_PLI, [prefix], examples, settings)
    return backbone.all_reduce(grad_PLI[0]).abs()


def added_biases(backbone: Backbone, bias_LD: Tensor | None) -> AbstractContextManager[None]:
    """Inside, every FFN's output has its layer's bias added; nothing where there are none."""

    def hook(bias_D: Tensor) -> Any:
        return lambda module, inputs, output: output + bias_D.to(output.device, output.dtype)

    layers = () if bias_LD is None else zip(find_ffns(backbone.model), bias_LD, strict=True)
    return forward_hooks((ffn.output, hook(bias_D)) for ffn, bias_D in layers)
