"""FFN output matrices refitted, in closed form, to the channels that masks leave: the start of a mended backbone.

For each layer in turn, with h the channels that a persona's mask leaves and e what is missing from the unpruned model's
hidden state behind the layer, over all tokens of all personas' rows:

    W' = W + argmin_D sum_t w_t |e_t - D h_t|^2 + ridge sum_i D_i^2 H_ii,    H = sum_t w_t h_t h_t^T

The layers before it are refitted by then, so that e holds what they could not mend (as in asymmetric calibration of
quantised layers, arXiv 2504.02692; the closed form is that of Optimal Brain Surgeon for many channels at once). Norms
make what comes after depend on a state's direction: w_t = 1 / |unpruned state|^2. Without it the few tokens with huge
states decide everything.

Shapes: B rows, T tokens, D model width, L layers, I channels, N tokens of a batch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from persona_pruner.backbone.channels import Ffn, forward_hooks, forward_pre_hooks
from persona_pruner.backbone.forward import BackboneRunner
from persona_pruner.backbone.layer_steps import LayerSteps, WaitingRows
from persona_pruner.learning.batches import MicroBatchConfig, TrainingExample, plan
from persona_pruner.learning.encoding import EncodedRow

RIDGE = 0.1
PREFIX_ROWS = 16
"""A prefix counts once for so many rows that stand behind it."""


@dataclass(frozen=True)
class MaskedRows:
    """Rows of one persona and its mask, bool [L, I]."""

    prefix: tuple[int, ...]
    rows: Sequence[EncodedRow]
    keep_LI: Tensor


def refit_outputs(
    runner: BackboneRunner, masked: Sequence[MaskedRows], settings: MicroBatchConfig, ridge: float = RIDGE
) -> Iterator[tuple[float, float]]:
    """Refit the output matrix of every layer's FFN, in place. Yields, for each layer, the weighted squared error of its
    hidden states before and after, as parts of the unpruned states' squares.

    All hidden states of the rows before one layer are in memory, twice, and their channels once. A model whose FFN is
    not simply added to the residual stream (Gemma 2 norms it first) is left as it is, and nothing is yielded.
    """
    steps = LayerSteps(runner)
    waiting = [_waiting(runner, each, settings) for each in masked]
    runner.masks.set(None)
    unpruned = [steps.begin(rows) for rows, _ in waiting]
    pruned = [list(states) for states in unpruned]
    if not _is_added(steps, waiting[0][0], unpruned[0]):
        return
    for number, ffn in enumerate(runner.masks.ffns):
        fit, channels = _LeastSquares(ffn), []
        for index, ((rows, weights), each) in enumerate(zip(waiting, masked, strict=True)):
            runner.masks.set(None)
            unpruned[index] = steps.advance(number, rows, unpruned[index])
            runner.masks.set(each.keep_LI.to(runner.backbone.device).float())
            seen: list[Tensor] = []
            # The masks' own hooks are older and come first.
            with forward_pre_hooks([(ffn.output, lambda _, inputs, seen=seen: seen.append(inputs[0]))]):  # type: ignore[misc]
                pruned[index] = steps.advance(number, rows, pruned[index])
            # OPT hands its FFN a flat list of tokens.
            channels.append(
                [hidden.view(*state.shape[:2], -1) for hidden, state in zip(seen, pruned[index], strict=True)]
            )
            for sums in zip(channels[-1], unpruned[index], pruned[index], weights, strict=True):
                fit.add(*sums)
        update_DI = fit.solve(ridge)
        with torch.no_grad():
            ffn.output.weight.add_(update_DI.to(ffn.output.weight.dtype))
            for states, kept in zip(pruned, channels, strict=True):
                states[:] = [
                    state + hidden @ update_DI.T.to(hidden) for state, hidden in zip(states, kept, strict=True)
                ]
        yield fit.errors(update_DI)
    runner.masks.set(None)


class _LeastSquares:
    """Sums over tokens from which the update of one output matrix follows, in float32."""

    def __init__(self, ffn: Ffn) -> None:
        device = ffn.output.weight.device
        self.gram_II = torch.zeros(ffn.channels, ffn.channels, device=device)
        self.cross_ID = torch.zeros(ffn.channels, ffn.output.out_features, device=device)
        self.error = self.total = 0.0

    def add(self, hidden: Tensor, wanted: Tensor, state: Tensor, weight: Tensor) -> None:
        """Channels [B, T, I], unpruned and pruned states behind the layer [B, T, D], weights [B, T]."""
        counted = weight > 0
        wanted_ND = wanted[counted].float()
        scale_N1 = (weight[counted] / wanted_ND.square().sum(-1).clamp_min(1e-12)).sqrt()[:, None]
        hidden_NI = hidden[counted].float() * scale_N1
        error_ND = (wanted_ND - state[counted].float()) * scale_N1
        self.gram_II += hidden_NI.T @ hidden_NI
        self.cross_ID += hidden_NI.T @ error_ND
        self.error += error_ND.square().sum().item()
        self.total += weight[counted].sum().item()

    def solve(self, ridge: float) -> Tensor:
        """The update of the matrix [D, I]; channels that no mask leaves get none."""
        diagonal_I = self.gram_II.diagonal()
        used_I = diagonal_I > 0
        damping_I = torch.where(used_I, diagonal_I * ridge, torch.ones_like(diagonal_I))
        factor_II = torch.linalg.cholesky(self.gram_II + damping_I.diag())
        return torch.cholesky_solve(self.cross_ID, factor_II).T

    def errors(self, update_DI: Tensor) -> tuple[float, float]:
        change = (update_DI @ self.gram_II * update_DI).sum() - 2 * (update_DI.T * self.cross_ID).sum()
        return self.error / self.total, (self.error + change.item()) / self.total


def _waiting(
    runner: BackboneRunner, masked: MaskedRows, settings: MicroBatchConfig
) -> tuple[WaitingRows, list[Tensor]]:
    """The rows in batches, and what each token counts: float32 [1, T] of the prefix, if it is shared, and [B, T]."""
    examples = [TrainingExample(0, ("", number), row, 1.0) for number, row in enumerate(masked.rows)]
    micro_batches, shared = plan(runner, examples, [masked.prefix], settings)
    before = 0 if shared else len(masked.prefix)
    weights = []
    for micro_batch in micro_batches:
        tokens_BT = micro_batch.tokens_BT
        lengths_B = torch.tensor([before + len(example.row.tokens) for example in micro_batch.examples])
        within_BT = torch.arange(tokens_BT.shape[1]) < lengths_B[:, None]
        weights.append(within_BT.float().to(tokens_BT.device))
    batches = tuple(micro_batch.tokens_BT for micro_batch in micro_batches)
    if not shared:
        return WaitingRows(None, batches), weights
    of_prefix = torch.full((1, len(masked.prefix)), len(masked.rows) / PREFIX_ROWS, device=runner.backbone.device)
    return WaitingRows(masked.prefix, batches), [of_prefix, *weights]


def _is_added(steps: LayerSteps, rows: WaitingRows, states: Sequence[Tensor]) -> bool:
    """Whether what the first FFN gives is added to the hidden state as it is."""
    few = WaitingRows(rows.prefix, rows.batches[:1])
    states = states[: len(few.batches) + (few.prefix is not None)]
    output = steps.runner.masks.ffns[0].output
    plain = steps.advance(0, few, states)[-1]
    added: list[Tensor] = []

    def double(module: nn.Module, inputs: tuple[Tensor, ...], given: Tensor) -> Tensor:
        added.append(given)
        return 2 * given

    with forward_hooks([(output, double)]):
        doubled = steps.advance(0, few, states)[-1]
    given = added[-1].view(plain.shape).float()
    return torch.allclose((doubled - plain).float(), given, rtol=0.05, atol=0.05 * given.abs().max().item())
