"""What the matrices of the unpruned blocks read at the answer positions of a persona's rows.

Shapes: I input columns of a matrix, B rows, N answer positions.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from persona_pruner.backbone.channels import forward_pre_hooks
from persona_pruner.backbone.forward import BackboneRunner
from persona_pruner.learning.batches import MicroBatch, MicroBatchConfig, TrainingExample, behind_prefix

GRAM_BYTES = 1 << 30
"""Gram matrices that exist at once; more take another pass over the rows."""


@dataclass
class InputStatistics:
    """Sums over all ranks' answer tokens, float64 [I]; `gram_II` float32, only where it was asked for."""

    sum_I: Tensor
    square_I: Tensor
    row_norm_I: Tensor
    """Sum over the rows of the norm that a column has over a row's own tokens."""
    gram_II: Tensor | None = None
    tokens: int = 0
    rows: int = 0

    @property
    def norm_I(self) -> Tensor:
        """Over all tokens."""
        return self.square_I.sqrt()

    def token_moments(self) -> tuple[Tensor, Tensor]:
        """Mean and population variance of a column over the tokens."""
        mean_I = self.sum_I / self.tokens
        return mean_I, (self.square_I / self.tokens - mean_I.square()).clamp_min(0)

    def row_norm_moments(self) -> tuple[Tensor, Tensor]:
        """Mean and population variance over the rows of a column's norm."""
        mean_I = self.row_norm_I / self.rows
        return mean_I, (self.square_I / self.rows - mean_I.square()).clamp_min(0)


def block_matrices(runner: BackboneRunner) -> dict[str, nn.Linear]:
    """The attention and FFN matrices by the name of their module: every linear but the head, in the model's order."""
    head = runner.model.get_output_embeddings()
    return {
        name: module
        for name, module in runner.model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }


def collect(
    runner: BackboneRunner,
    prefix: Sequence[int],
    examples: Sequence[TrainingExample],
    settings: MicroBatchConfig,
    gram: bool = False,
) -> Iterator[tuple[str, nn.Linear, InputStatistics]]:
    """Statistics of every block matrix under the persona's prefix. Every rank of a shard group calls it.

    With `gram` in as many passes as keep GRAM_BYTES; one otherwise.
    """
    for matrices in _portions(block_matrices(runner), GRAM_BYTES if gram else None):
        recorder = _Recorder(runner, matrices, gram)
        recorder.run(prefix, examples, settings)
        for name, linear in matrices.items():
            yield name, linear, recorder.statistics.pop(name)


def _portions(matrices: Mapping[str, nn.Linear], limit: int | None) -> Iterator[dict[str, nn.Linear]]:
    portion: dict[str, nn.Linear] = {}
    size = 0
    for name, linear in matrices.items():
        own = 4 * linear.in_features**2
        if limit is not None and portion and size + own > limit:
            yield portion
            portion, size = {}, 0
        portion[name] = linear
        size += own
    yield portion


@dataclass
class _Recorder:
    runner: BackboneRunner
    matrices: Mapping[str, nn.Linear]
    gram: bool
    statistics: dict[str, InputStatistics] = field(default_factory=dict)
    _positions_N: Tensor | None = None
    _row_N: Tensor | None = None
    _rows: int = 0

    @torch.no_grad()
    def run(self, prefix: Sequence[int], examples: Sequence[TrainingExample], settings: MicroBatchConfig) -> None:
        device = self.runner.backbone.device
        for name, linear in self.matrices.items():
            sum_I, square_I, row_norm_I = torch.zeros(3, linear.in_features, dtype=torch.float64, device=device)
            gram_II = torch.zeros(linear.in_features, linear.in_features, device=device) if self.gram else None
            tokens = sum(example.row.answer for example in examples)
            self.statistics[name] = InputStatistics(sum_I, square_I, row_norm_I, gram_II, tokens, len(examples))
        with forward_pre_hooks((linear, self._hook(name)) for name, linear in self.matrices.items()):
            for micro_batch, prefix_cache in behind_prefix(self.runner, prefix, examples, settings):
                self._look_at(micro_batch)
                self.runner.hidden(micro_batch.tokens_BT, prefix_cache, micro_batch.slot_B)
        self._positions_N = None
        for own in self.statistics.values():
            for total in (own.sum_I, own.square_I, own.row_norm_I, own.gram_II):
                if total is not None:
                    self.runner.backbone.all_reduce(total)

    def _look_at(self, micro_batch: MicroBatch) -> None:
        """At the answer positions of the next pass, without those of fillers."""
        real_N = micro_batch.weight_N > 0
        answers = torch.tensor([example.row.answer for example in micro_batch.examples], device=real_N.device)
        rows_B = torch.arange(len(micro_batch.examples), device=real_N.device)
        self._positions_N = micro_batch.positions_N[real_N]
        self._row_N = rows_B.repeat_interleave(answers)[real_N]
        self._rows = len(micro_batch.examples)

    def _hook(self, name: str) -> Any:
        def look(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if self._positions_N is None or self._row_N is None:
                return  # the shared prefix
            values_NI = inputs[0].reshape(-1, inputs[0].shape[-1]).index_select(0, self._positions_N)
            own, exact_NI = self.statistics[name], values_NI.double()
            own.sum_I += exact_NI.sum(0)
            squares_BI = exact_NI.new_zeros(self._rows, exact_NI.shape[1])
            squares_BI.index_add_(0, self._row_N, exact_NI.square())
            own.square_I += squares_BI.sum(0)
            own.row_norm_I += squares_BI.sqrt().sum(0)
            if own.gram_II is not None:
                own.gram_II += values_NI.float().T @ values_NI.float()

        return look
