"""Structured methods that people publish against, at the same number of removed parameters as a channel mask.

FLAP (arXiv 2312.11983): channels whose input to the output projection fluctuates least, standardized over the layers;
their mean goes into a bias. ShortGPT (arXiv 2403.03853): whole blocks whose output is most like their
input. Used by compared_methods.py.

Shapes: L layers, I channels, N tokens, D model width.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from persona_pruner.backbone.channels import find_ffns, forward_hooks, record_channels
from persona_pruner.backbone.load import Backbone
from persona_pruner.config.schema import RunConfig
from persona_pruner.learning.budgets import free_widths
from persona_pruner.learning.encoding import EncodedData
from persona_pruner.learning.estimators import topk_mask


@dataclass(frozen=True)
class Calibration:
    """Text that a method looks at."""

    backbone: Backbone
    config: RunConfig
    encoded: EncodedData

    def rows(self) -> Iterator[Tensor]:
        """Token ids [1, N] of each row behind its prefix."""
        for row in self.encoded.train:
            tokens = [*self.encoded.prefixes[row.prefix], *row.tokens]
            yield torch.tensor([tokens], device=self.backbone.device)


@dataclass(frozen=True)
class ChannelMoments:
    mean_LI: Tensor
    variance_LI: Tensor


@torch.no_grad()
def channel_moments(calibration: Calibration) -> ChannelMoments:
    """Over all tokens of the calibration text."""
    ffns = find_ffns(calibration.backbone.model)
    sum_LI = torch.zeros(len(ffns), ffns[0].channels, dtype=torch.float64, device=calibration.backbone.device)
    square_LI, tokens = torch.zeros_like(sum_LI), 0

    def see(layer: int, hidden: Tensor) -> None:
        values_NI = hidden.reshape(-1, hidden.shape[-1]).double()
        sum_LI[layer] += values_NI.sum(0)
        square_LI[layer] += values_NI.square().sum(0)

    with record_channels(calibration.backbone.model, see):
        for ids in calibration.rows():
            calibration.backbone.model(ids, use_cache=False)
            tokens += ids.numel()
    mean_LI = sum_LI / tokens
    return ChannelMoments(mean_LI.float(), (square_LI / tokens - mean_LI.square()).clamp_min(0).float())


def flap(backbone: Backbone, moments: ChannelMoments, kept: int) -> tuple[Tensor, Tensor]:
    """Mask [L, I] that keeps `kept` channels a layer on average, and the bias [L, D] that stands for the others."""
    outputs = [ffn.output.weight.detach().float() for ffn in find_ffns(backbone.model)]
    scores_LI = moments.variance_LI * torch.stack([weight.square().sum(0) for weight in outputs])
    standard_LI = (scores_LI - scores_LI.mean(1, keepdim=True)) / scores_LI.std(1, keepdim=True)
    keep_LI = topk_mask(standard_LI, free_widths(standard_LI, kept * len(outputs), 1))
    dropped_LI = moments.mean_LI.masked_fill(keep_LI, 0)
    return keep_LI, torch.stack([weight @ mean_I for weight, mean_I in zip(outputs, dropped_LI, strict=True)])


def blocks(backbone: Backbone) -> list[Any]:
    """The decoder blocks: the modules that hold an FFN's own module."""
    names = [ffn.name.rpartition(".")[0].rpartition(".")[0] for ffn in find_ffns(backbone.model)]
    return [backbone.model.get_submodule(name) for name in names]


@torch.no_grad()
def block_influence(calibration: Calibration) -> Tensor:
    """How much each block changes what goes through it: the sum of 1 - cosine over all tokens, float64 [L]."""
    every = blocks(calibration.backbone)
    influence = torch.zeros(len(every), dtype=torch.float64)

    def hook(number: int) -> Any:
        def see(module: Any, inputs: tuple[Tensor, ...], output: Any) -> None:
            after = output[0] if isinstance(output, tuple) else output
            cosine = torch.nn.functional.cosine_similarity(inputs[0].double(), after.double(), dim=-1)
            influence[number] += (1 - cosine).sum().item()

        return see

    with forward_hooks((block, hook(number)) for number, block in enumerate(every)):
        for ids in calibration.rows():
            calibration.backbone.model(ids, use_cache=False)
    return influence


def least_blocks(backbone: Backbone, influence: Tensor, removed: int) -> list[int]:
    """The blocks of least influence, as many as come nearest to `removed` parameters."""
    size = sum(parameter.numel() for parameter in blocks(backbone)[0].parameters())
    return sorted(influence.argsort()[: max(round(removed / size), 1)].tolist())


def without_blocks(backbone: Backbone, numbers: list[int]) -> AbstractContextManager[None]:
    """Inside, these blocks add nothing to what goes through them: both of their output projections give zeros."""
    every = blocks(backbone)
    outputs = [
        module
        for number in numbers
        for name, module in every[number].named_modules()
        if name.rpartition(".")[2] in ("o_proj", "out_proj", "dense", "down_proj", "dense_4h_to_h", "fc2")
    ]
    assert len(outputs) == 2 * len(numbers), "a block with other projections than attention's and FFN's"
    return forward_hooks((module, lambda module, inputs, output: output * 0) for module in outputs)
