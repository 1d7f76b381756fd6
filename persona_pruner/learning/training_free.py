"""Scores without training: the published rivals, the baselines, and where learning starts from.

Activation-guided and contrastive: Your Language Model Secretly Contains Personality Subnetworks (arXiv 2602.07164).
All return scores [L, I] (float32): the larger, the rather kept.

Shapes: L layers, I channels, B rows, N answer positions, D model width.
"""

from collections.abc import Callable, Sequence
from typing import Any

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


def contrastive(
    backbone: Backbone, config: RunConfig, data: PersonaData, opposed: PersonaData
) -> tuple[Tensor, Tensor]:
    """Scores of two opposed personas that keep what separates them: own activation score minus the other's, each
    first brought to mean 1 in each layer. What one ranks first the other ranks last."""
    own, other = (activation(backbone, config, rows) for rows in (data, opposed))
    difference = own / own.mean(-1, keepdim=True) - other / other.mean(-1, keepdim=True)
    return difference, -difference


def contrastive_masks(first_LI: Tensor, second_LI: Tensor, k: int, disjoint: int) -> tuple[Tensor, Tensor]:
    """Masks of k channels from two activation scores [L, I]: the `disjoint` most separating channels of each are
    withheld from the other, the rest of each goes by its own activation. disjoint <= I - k."""
    difference = first_LI / first_LI.mean(-1, keepdim=True) - second_LI / second_LI.mean(-1, keepdim=True)
    order = difference.argsort(dim=-1, descending=True, stable=True)
    masks = []
    for own_LI, mine_LJ, theirs_LJ in (
        (first_LI, order[:, :disjoint], order[:, order.shape[1] - disjoint :]),
        (second_LI, order[:, order.shape[1] - disjoint :], order[:, :disjoint]),
    ):
        forced = own_LI.scatter(1, mine_LJ, float("inf")).scatter(1, theirs_LJ, float("-inf"))
        picked = forced.sort(dim=-1, descending=True, stable=True).indices[:, :k]
        masks.append(torch.zeros_like(own_LI, dtype=torch.bool).scatter_(1, picked, True))
    return masks[0], masks[1]


def activation_scores(
    runner: BackboneRunner, prefix: Sequence[int], examples: Sequence[TrainingExample], settings: MicroBatchConfig
) -> Tensor:
    """`activation` for rows that are tokens already, all behind one prefix."""
    sums_LI = torch.zeros(runner.masks.layers, runner.masks.channels, device=runner.backbone.device)

    def add(layer: int, hidden_NI: Tensor) -> None:
        sums_LI[layer] += hidden_NI.square().sum(0)

    with _AnswerPositions() as answers:
        answers.hooks += record_channels(runner.model, lambda layer, hidden: answers.see(layer, hidden, add))
        answers.run(runner, prefix, examples, settings)
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


class _AnswerPositions:
    """Runs examples through the unpruned model and shows hooks what passes at their answer positions."""

    def __init__(self) -> None:
        self.hooks: list[Any] = []
        self._positions_N: Tensor | None = None

    def __enter__(self) -> "_AnswerPositions":
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def see(self, key: Any, hidden: Tensor, add: Callable[[Any, Tensor], None]) -> None:
        """Call `add` with values [N, width] (float32); nothing while the prefix runs."""
        if self._positions_N is not None:
            add(key, hidden.reshape(-1, hidden.shape[-1]).index_select(0, self._positions_N).float())

    @torch.no_grad()
    def run(
        self,
        runner: BackboneRunner,
        prefix: Sequence[int],
        examples: Sequence[TrainingExample],
        settings: MicroBatchConfig,
    ) -> None:
        for micro_batch, prefix_cache in behind_prefix(runner, prefix, examples, settings):
            self._positions_N = micro_batch.positions_N[micro_batch.weight_N > 0]
            runner.hidden(micro_batch.tokens_BT, prefix_cache, micro_batch.slot_B)
        self._positions_N = None
