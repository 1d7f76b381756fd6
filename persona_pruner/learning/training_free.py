"""Scores without training: the published rivals, the baselines, and where learning starts from.

Activation-guided: Your Language Model Secretly Contains Personality Subnetworks (arXiv 2602.07164).
All return scores [L, I] (float32): the larger, the rather kept.

Shapes: L layers, I channels, B rows, N answer positions, D model width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from persona_pruner.backbone.channels import record_channels
from persona_pruner.backbone.forward import BackboneRunner
from persona_pruner.backbone.load import Backbone
from persona_pruner.config.schema import RunConfig
from persona_pruner.dataset import PersonaData
from persona_pruner.learning.batches import MicroBatchConfig, TrainingExample, behind_prefix, examples_by_prefix
from persona_pruner.learning.encoding import encode, seeded


def magnitude(backbone: Backbone) -> Tensor:
    """Norm of all weights of a channel: root of the sum of squares over its input rows and output column."""
    with BackboneRunner(backbone) as runner:
        rows = []
        for ffn in runner.masks.ffns:
            linears = (ffn.output, *ffn.inputs)
            with backbone.gathered_parameters([linear.weight for linear in linears]):
                total = ffn.output.weight.detach().float().square().sum(0)
                for linear in ffn.inputs:
                    squares = linear.weight.detach().float().square().sum(1)
                    total = total + squares.view(-1, ffn.channels).sum(0)
            rows.append(total.sqrt())
        return torch.stack(rows)


def random(backbone: Backbone, seed: int) -> Tensor:
    with BackboneRunner(backbone) as runner:
        return torch.rand(runner.masks.layers, runner.masks.channels, generator=seeded("random", seed))


def activation(backbone: Backbone, config: RunConfig, data: PersonaData) -> Tensor:
    """Root mean square of each channel over the answer tokens of data.train, times the norm of its output weights."""
    encoded = encode(backbone.tokenizer, config.prompt, data, config.learning.max_row_tokens)
    ((prefix, examples),) = examples_by_prefix(encoded)
    with BackboneRunner(backbone) as runner:
        return activation_scores(runner, prefix, examples, MicroBatchConfig.of(config, backbone.device))


def activation_scores(
    runner: BackboneRunner, prefix: Sequence[int], examples: Sequence[TrainingExample], settings: MicroBatchConfig
) -> Tensor:
    """`activation` for rows that are tokens already, all behind one prefix."""
    sums_LI = torch.zeros(runner.masks.layers, runner.masks.channels, device=runner.backbone.device)
    positions_N: Tensor | None = None  # none while the shared prefix runs

    def add(layer: int, hidden: Tensor) -> None:
        if positions_N is not None:
            answers_NI = hidden.reshape(-1, hidden.shape[-1]).index_select(0, positions_N).float()
            sums_LI[layer] += answers_NI.square().sum(0)

    with torch.no_grad(), record_channels(runner.model, add):
        for micro_batch, prefix_cache in behind_prefix(runner, prefix, examples, settings):
            positions_N = micro_batch.positions_N[micro_batch.weight_N > 0]
            runner.hidden(micro_batch.tokens_BT, prefix_cache, micro_batch.slot_B)
    squares_LI = runner.backbone.all_reduce(sums_LI)
    tokens = sum(example.row.answer for example in examples)
    norms = []
    for ffn in runner.masks.ffns:
        with runner.backbone.gathered_parameters([ffn.output.weight]):
            norms.append(ffn.output.weight.detach().float().norm(dim=0))
    return (squares_LI / max(tokens, 1)).sqrt() * torch.stack(norms)


def rank_normalize(scores_LI: Tensor) -> Tensor:
    """Each layer's scores as ranks, evenly spread over (0, 1): the scale on which learning starts."""
    channels = scores_LI.shape[1]
    order = scores_LI.argsort(dim=-1, stable=True)
    ranks = torch.arange(channels, dtype=torch.float32, device=scores_LI.device).expand_as(order)
    return torch.empty_like(scores_LI, dtype=torch.float32).scatter_(1, order, (ranks + 0.5) / channels)
