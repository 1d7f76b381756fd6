"""What each channel is worth to the unpruned model, from squared gradients of the mask at all ones.

Shapes: L layers, I channels, B rows.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from persona_pruner.backbone.forward import BackboneRunner
from persona_pruner.config.schema import ObjectiveConfig
from persona_pruner.learning.batches import MicroBatchConfig, TrainingExample, answer_states, plan
from persona_pruner.learning.objective import lm_head_loss_and_grad

CROSS_ENTROPY = ObjectiveConfig(cross_entropy=1.0, distillation=0.0)


def fisher_scores(
    runner: BackboneRunner, prefix: Sequence[int], examples: Sequence[TrainingExample], settings: MicroBatchConfig
) -> Tensor:
    """F [L, I] (float32, nats per token): sum over rows of (d cross-entropy of the row / d mask)^2 / answer tokens.

    The row's cross-entropy is the sum over its own answer tokens. F / 2 estimates what a channel's removal costs, to
    second order, and compares across layers. Every row has a mask of its own, so that one backward pass gives all
    rows' gradients; the channels count where the row's own tokens pass, not in a shared prefix.
    """
    micro_batches, shared = plan(runner, examples, [prefix], settings)
    scores_LI = torch.zeros(runner.masks.layers, runner.masks.channels, device=runner.backbone.device)
    runner.masks.set(None)
    with torch.no_grad():
        prefix_cache = runner.prefix([prefix]) if shared else None
    for micro_batch in micro_batches:
        masks_BLI = scores_LI.new_ones(len(micro_batch.examples), *scores_LI.shape).requires_grad_()
        runner.masks.set(masks_BLI)
        answers_ND = answer_states(runner, micro_batch, prefix_cache)
        # Weights of the rows are equal, or 0 for fillers; the row's loss is a plain sum.
        head = lm_head_loss_and_grad(runner, answers_ND.detach(), micro_batch.with_unit_weights(), CROSS_ENTROPY)
        (grad_BLI,) = torch.autograd.grad(answers_ND, masks_BLI, head.grad_ND)
        scores_LI += grad_BLI.square().sum(0)
    runner.masks.set(None)
    tokens = sum(example.row.answer for example in examples)
    return runner.backbone.all_reduce(scores_LI) / tokens
