"""The loss on answer tokens and its gradient for the masks, with the exact savings.

Loss of a persona: mean over its answer tokens of a * cross-entropy + b * KL(unpruned || masked), under its own prompt.
No weight gets a gradient. A persona's prefix is run once; rows see its keys and values, whose gradient is collected
and sent through the prefix at the end. Logits exist at answer positions only, a chunk at a time, and their gradient
is computed at once (softmax minus target) instead of being kept for later.

Shapes: P slots of the step (a mask and a prefix each), L layers, I channels, B rows, T tokens, N answer positions,
D model width, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from persona_pruner.backbone.forward import BackboneRunner, PrefixCache
from persona_pruner.config.schema import ObjectiveConfig
from persona_pruner.learning.batches import MicroBatch, MicroBatchConfig, TrainingExample, answer_states, plan
from persona_pruner.learning.encoding import EncodedRow
from persona_pruner.learning.teacher import TeacherCache, head_logits, log_probabilities


@dataclass(frozen=True)
class Losses:
    """Weighted sums over this rank's answer tokens, [P] each; `total` as the objective weighs them, in nats."""

    total: Tensor
    cross_entropy: Tensor
    divergence: Tensor

    def __add__(self, other: "Losses") -> "Losses":
        return Losses(
            self.total + other.total,
            self.cross_entropy + other.cross_entropy,
            self.divergence + other.divergence,
        )


@dataclass(frozen=True)
class TokenLosses:
    """Losses of the answer tokens of a micro-batch [N], in nats, and the gradient of their weighted sum [N, D]."""

    cross_entropy_N: Tensor
    divergence_N: Tensor
    grad_ND: Tensor | None


def mask_gradient(
    runner: BackboneRunner,
    masks_PLI: Tensor,
    prefixes: Sequence[Sequence[int]],
    examples: Sequence[TrainingExample],
    settings: MicroBatchConfig,
    teacher: TeacherCache | None = None,
) -> tuple[Tensor, Losses]:
    """d loss / d masks [P, L, I] (float32) and the losses of this rank's rows, to be summed over the ranks.

    `masks_PLI` float32, one per slot; `prefixes` one per slot. `teacher` holds the unpruned model's answers where the
    objective distils.

    1. Run the prefixes once under their masks; cut their keys and values from that graph.
    2. Run each micro-batch behind them; its loss and the gradient for its hidden states come from the head.
    3. Send that gradient back through the micro-batch, into the masks and the cut keys and values.
    4. Send what was collected at the keys and values back through the prefixes, into the masks.
    """
    micro_batches, shared = plan(runner, examples, prefixes, settings)
    masks = masks_PLI.detach().requires_grad_()
    losses = _no_losses(len(prefixes), masks.device)
    prefix_cache = prefix_leaves = None
    if shared:
        runner.masks.set(masks[0] if len(prefixes) == 1 else masks)
        prefix_cache = runner.prefix(prefixes)
        prefix_leaves = prefix_cache.leaves()
    for micro_batch in micro_batches:
        runner.masks.set(masks[0] if len(prefixes) == 1 else masks.index_select(0, micro_batch.slot_B))
        answers_ND = answer_states(runner, micro_batch, prefix_leaves)
        head = lm_head_loss_and_grad(runner, answers_ND.detach(), micro_batch, settings.objective, teacher)
        answers_ND.backward(head.grad_ND)
        losses += _by_slot(head, micro_batch, settings.objective, len(prefixes))
    if prefix_cache is not None and prefix_leaves is not None:
        _backward_through_prefix(prefix_cache, prefix_leaves)
    runner.masks.set(None)
    assert masks.grad is not None
    return masks.grad, losses


@torch.no_grad()
def mask_losses(
    runner: BackboneRunner,
    masks_PLI: Tensor | None,
    prefixes: Sequence[Sequence[int]],
    examples: Sequence[TrainingExample],
    settings: MicroBatchConfig,
    teacher: TeacherCache | None = None,
) -> Losses:
    """The losses alone, of this rank's rows. Without masks: of the unpruned model."""
    micro_batches, shared = plan(runner, examples, prefixes, settings)
    losses = _no_losses(len(prefixes), runner.backbone.device)
    runner.masks.set(masks_PLI)
    prefix_cache = runner.prefix(prefixes) if shared else None
    for micro_batch in micro_batches:
        runner.masks.set(None if masks_PLI is None else masks_PLI.index_select(0, micro_batch.slot_B))
        answers_ND = answer_states(runner, micro_batch, prefix_cache)
        head = lm_head_loss_and_grad(runner, answers_ND, micro_batch, settings.objective, teacher, gradient=False)
        losses += _by_slot(head, micro_batch, settings.objective, len(prefixes))
    runner.masks.set(None)
    return losses


def heldout_cross_entropy(
    runner: BackboneRunner,
    prefix: Sequence[int],
    rows: Sequence[EncodedRow],
    mask_LI: Tensor | None,
    settings: MicroBatchConfig,
) -> float:
    """Cross-entropy of `rows` behind a prefix under a hard mask (or none), nats per token, the same on every rank."""
    tokens = sum(row.answer for row in rows)
    examples = [TrainingExample(0, ("", number), row, 1 / tokens) for number, row in enumerate(rows)]
    masks_PLI = None if mask_LI is None else mask_LI.to(runner.backbone.device).float()[None]
    losses = mask_losses(runner, masks_PLI, [prefix], examples, settings)
    return runner.backbone.all_reduce(losses.cross_entropy).item()


def lm_head_loss_and_grad(
    runner: BackboneRunner,
    answers_ND: Tensor,
    micro_batch: MicroBatch,
    objective: ObjectiveConfig,
    teacher: TeacherCache | None = None,
    gradient: bool = True,
) -> TokenLosses:
    """Losses of each answer token, and the gradient of their weighted sum for the final hidden states `answers_ND`.

    For each chunk of answer positions, so that few logits exist at once:
    1. logits [N, V] of the hidden states (over the teacher's part of the vocabulary, where it has one and a gradient is
       wanted), and log q = log softmax of them in float32;
    2. cross-entropy of the target tokens, and KL from the teacher's distribution p;
    3. grad_logits by formula: a (q - one-hot target) + b (q - p), times each token's weight;
    4. grad_logits back through the head, to the hidden states.
    """
    bounds = [round(i * len(answers_ND) / micro_batch.chunks) for i in range(micro_batch.chunks + 1)]
    teacher_rows = teacher.teacher_rows(micro_batch) if teacher is not None else None
    tokens = teacher.vocabulary(runner, micro_batch) if teacher is not None and gradient else None
    targets_N = micro_batch.targets_N if tokens is None else torch.searchsorted(tokens.ids_V, micro_batch.targets_N)
    cross_entropy, divergence, grads = [], [], []
    for start, end in pairwise(bounds):
        chunk = slice(start, end)
        leaf = answers_ND[chunk].detach().requires_grad_(gradient)
        with torch.set_grad_enabled(gradient):
            logits_NV = head_logits(runner, leaf, tokens)
        with torch.no_grad():
            logq_NV = log_probabilities(logits_NV.detach(), tokens)
            target_N1 = targets_N[chunk, None]
            cross_entropy.append(-logq_NV.gather(1, target_N1)[:, 0])
            teacher_probs_NV = None
            if teacher is not None and teacher_rows is not None:
                teacher_probs_NV, kl_N = teacher.compare(runner, teacher_rows, chunk, logq_NV, tokens)
                divergence.append(kl_N)
            else:
                divergence.append(torch.zeros_like(cross_entropy[-1]))
        if gradient:
            weight_N1 = micro_batch.weight_N[chunk, None]
            student = objective.cross_entropy + (objective.distillation if teacher else 0)
            # In place, without a second [N, V] buffer: saves several percent of a step on CPUs.
            grad_logits_NV = logq_NV.exp_().mul_(student * weight_N1)
            if teacher_probs_NV is not None:
                grad_logits_NV.addcmul_(teacher_probs_NV, weight_N1, value=-objective.distillation)
            grad_logits_NV.scatter_add_(1, target_N1, -objective.cross_entropy * weight_N1)
            # Not torch.autograd.grad, which fails on leaves while FlopCounterMode watches (mask_step.py).
            logits_NV.backward(grad_logits_NV.to(logits_NV.dtype))
            assert leaf.grad is not None
            grads.append(leaf.grad)
    return TokenLosses(torch.cat(cross_entropy), torch.cat(divergence), torch.cat(grads) if gradient else None)


def _backward_through_prefix(prefix_cache: PrefixCache, leaves: PrefixCache) -> None:
    pairs = [(t, leaf.grad) for t, leaf in zip(prefix_cache.tensors(), leaves.tensors(), strict=True)]
    used = [(t, grad) for t, grad in pairs if grad is not None]
    if used:
        torch.autograd.backward([t for t, _ in used], [grad for _, grad in used])


def _by_slot(head: TokenLosses, micro_batch: MicroBatch, objective: ObjectiveConfig, slots: int) -> Losses:
    def summed(loss_N: Tensor) -> Tensor:
        return loss_N.new_zeros(slots).index_add_(0, micro_batch.slot_N, loss_N * micro_batch.weight_N)

    total_N = objective.cross_entropy * head.cross_entropy_N + objective.distillation * head.divergence_N
    return Losses(summed(total_N), summed(head.cross_entropy_N), summed(head.divergence_N))


def _no_losses(slots: int, device: torch.device) -> Losses:
    return Losses(*(torch.zeros(slots, device=device) for _ in range(3)))
