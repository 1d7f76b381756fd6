"""The loss on answer tokens and its gradient for the masks, with the exact savings.

Loss of a persona: mean over its answer tokens of a * cross-entropy + b * KL(unpruned || masked), under its own prompt.
No weight gets a gradient. A persona's prefix is run once; rows see its keys and values, whose gradient is collected
and sent through the prefix at the end. Logits exist at answer positions only, a chunk at a time, and their gradient
is written down at once (softmax minus target) instead of being kept for later.

Shapes: P personas of the step, L layers, I channels, B rows, T tokens, N answer positions, D model width, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from persona_pruner.backbone.forward import BackboneRunner, PrefixCache
from persona_pruner.config.schema import ObjectiveConfig
from persona_pruner.learning.batches import MicroBatch, TrainingExample, plan_micro_batches


@dataclass
class Losses:
    """Sums over this rank's answer tokens, [P] each; `total` is weighted as the objective, the rest in nats."""

    total: Tensor
    cross_entropy: Tensor
    divergence: Tensor


@dataclass(frozen=True)
class MicroBatchConfig:
    """What a pass needs besides its data."""

    objective: ObjectiveConfig
    micro_batch_tokens: int = 16384
    overhead: int = 16


def plan(
    runner: BackboneRunner,
    items: Sequence[TrainingExample],
    prefixes: Sequence[Sequence[int]],
    settings: MicroBatchConfig,
) -> tuple[list[MicroBatch], bool]:  # fmt: skip
    """The passes of this rank, and whether their rows stand behind a shared prefix."""
    world = runner.backbone.world
    longest = max(len(item.row.tokens) for item in items)
    shared = runner.can_share(prefixes, longest)
    passes = plan_micro_batches(
        items,
        None if shared else prefixes,
        rank=world.rank,
        ranks=world.size,
        pad=runner.pad,
        device=runner.backbone.device,
        micro_batch_tokens=settings.micro_batch_tokens,
        overhead=settings.overhead,
        logits_chunk=settings.objective.logits_chunk,
    )
    return passes, shared


def mask_gradient(
    runner: BackboneRunner,
    masks_PLI: Tensor,
    prefixes: Sequence[Sequence[int]],
    items: Sequence[TrainingExample],
    settings: MicroBatchConfig,
    teacher: "TeacherCache | None" = None,
) -> tuple[Tensor, Losses]:
    """d loss / d masks [P, L, I] (float32) and the losses, of this rank's rows; their sum over the ranks is the whole.

    `masks_PLI` float32, one a slot; `prefixes` one a slot. `teacher` holds the unpruned model's answers where the
    objective distils.
    """
    passes, shared = plan(runner, items, prefixes, settings)
    masks = masks_PLI.detach().requires_grad_()
    losses = _no_losses(len(prefixes), masks.device)
    whole: PrefixCache | None = None
    if shared:
        runner.masks.set(masks[0] if len(prefixes) == 1 else masks)
        whole = runner.prefix(prefixes)
    prefix = whole.leaves() if whole else None
    for part in passes:
        runner.masks.set(masks[0] if len(prefixes) == 1 else masks.index_select(0, part.slot_B))
        hidden = runner.hidden(part.tokens_BT, prefix, part.slot_B)
        answers_ND = hidden.flatten(0, 1).index_select(0, part.positions_N)
        answers_ND.backward(_head(runner, answers_ND.detach(), part, settings, teacher, losses))
    if whole is not None and prefix is not None:
        pairs = [(t, leaf.grad) for t, leaf in zip(whole.tensors(), prefix.tensors(), strict=True)]
        used = [(t, g) for t, g in pairs if g is not None and t.requires_grad]
        if used:
            torch.autograd.backward([t for t, _ in used], [g for _, g in used])
    runner.masks.set(None)
    assert masks.grad is not None
    return masks.grad, losses


@torch.no_grad()
def mask_losses(
    runner: BackboneRunner,
    masks_PLI: Tensor | None,
    prefixes: Sequence[Sequence[int]],
    items: Sequence[TrainingExample],
    settings: MicroBatchConfig,
    teacher: "TeacherCache | None" = None,
    see: Callable[[MicroBatch, Tensor], None] | None = None,
) -> Losses:
    """The losses alone, of this rank's rows. Without masks: of the unpruned model. `see` gets answers [N, D]."""
    passes, shared = plan(runner, items, prefixes, settings)
    losses = _no_losses(len(prefixes), runner.backbone.device)
    runner.masks.set(masks_PLI)
    prefix = runner.prefix(prefixes) if shared else None
    for part in passes:
        runner.masks.set(None if masks_PLI is None else masks_PLI.index_select(0, part.slot_B))
        hidden = runner.hidden(part.tokens_BT, prefix, part.slot_B)
        answers_ND = hidden.flatten(0, 1).index_select(0, part.positions_N)
        if see is not None:
            see(part, answers_ND)
        else:
            _head(runner, answers_ND, part, settings, teacher, losses, gradient=False)
    runner.masks.set(None)
    return losses


def _head(
    runner: BackboneRunner,
    answers_ND: Tensor,
    part: MicroBatch,
    settings: MicroBatchConfig,
    teacher: "TeacherCache | None",
    losses: Losses,
    gradient: bool = True,
) -> Tensor:
    """Adds the pass to `losses`; returns d loss / d answers [N, D]."""
    objective = settings.objective
    grad_ND = torch.zeros_like(answers_ND)
    bounds = [round(i * len(answers_ND) / part.chunks) for i in range(part.chunks + 1)]
    held = teacher.of(part) if teacher is not None else None
    for start, end in pairwise(bounds):
        piece = slice(start, end)
        leaf = answers_ND[piece].detach().requires_grad_(gradient)
        with torch.set_grad_enabled(gradient):
            logits_NV = runner.logits(leaf)
        with torch.no_grad():
            logq_NV = logits_NV.detach().float().log_softmax(-1)
            target_N1 = part.targets_N[piece, None]
            cross_N = -logq_NV.gather(1, target_N1)[:, 0]
            diverged_N = torch.zeros_like(cross_N)
            pull_NV = logq_NV.exp().mul_(objective.cross_entropy + (objective.distillation if held else 0))
            if held is not None:
                assert teacher is not None
                wanted_NV, diverged_N = teacher.compare(runner, held, piece, logq_NV)
                pull_NV.sub_(wanted_NV, alpha=objective.distillation)
            pull_NV.scatter_add_(1, target_N1, torch.full_like(cross_N, -objective.cross_entropy)[:, None])
            weight_N = part.weight_N[piece]
            slot_N = part.slot_N[piece]
            losses.cross_entropy.index_add_(0, slot_N, cross_N * weight_N)
            losses.divergence.index_add_(0, slot_N, diverged_N * weight_N)
            total_N = objective.cross_entropy * cross_N + objective.distillation * diverged_N
            losses.total.index_add_(0, slot_N, total_N * weight_N)
        if gradient:
            logits_NV.backward(pull_NV.mul_(weight_N[:, None]).to(logits_NV.dtype))
            assert leaf.grad is not None
            grad_ND[piece] = leaf.grad
    return grad_ND


def _no_losses(slots: int, device: torch.device) -> Losses:
    return Losses(*(torch.zeros(slots, device=device) for _ in range(3)))


class TeacherCache:
    """The unpruned model's answer distributions, kept a row at a time.

    All logits: kept as the final hidden states they come from (exact, D instead of V numbers a token). `top`: the
    largest log-probabilities of a token and their ids; the rest counts as one bucket.
    """

    def __init__(self, top: int | None = None) -> None:
        self.top = top
        self.rows: dict[tuple[str, int], tuple[Tensor, ...]] = {}

    def collect(
        self,
        runner: BackboneRunner,
        prefixes: Sequence[Sequence[int]],
        items: Sequence[TrainingExample],
        settings: MicroBatchConfig,
    ) -> None:
        """Run `items` through the unpruned model and keep their answers, on every rank of the world."""
        found: dict[tuple[str, int], Tensor] = {}

        def see(part: MicroBatch, answers_ND: Tensor) -> None:
            for item, rows_ND in zip(part.items, part.split(answers_ND), strict=True):
                found[item.key] = rows_ND * (item.weight > 0)

        mask_losses(runner, None, prefixes, items, settings, see=see)
        if runner.backbone.sharded:
            found = _share(runner, items, found)
        for key, rows_ND in found.items():
            self.rows[key] = (rows_ND,) if self.top is None else self._largest(runner, rows_ND, settings)

    @torch.no_grad()
    def _largest(self, runner: BackboneRunner, rows_ND: Tensor, settings: MicroBatchConfig) -> tuple[Tensor, ...]:
        assert self.top is not None
        pieces = [
            runner.logits(piece).float().log_softmax(-1).topk(self.top, sorted=False)
            for piece in rows_ND.split(settings.objective.logits_chunk)
        ]
        return torch.cat([p.values for p in pieces]), torch.cat([p.indices for p in pieces])

    def of(self, part: MicroBatch) -> tuple[Tensor, ...]:
        """What is kept for the rows of a pass, over its N answer positions."""
        return tuple(torch.cat(kept) for kept in zip(*(self.rows[i.key] for i in part.items), strict=True))

    def compare(
        self, runner: BackboneRunner, held: tuple[Tensor, ...], piece: slice, logq_NV: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Target distribution [N, V] such that d KL / d logits = q - target, and KL [N]."""
        if self.top is None:
            logp_NV = runner.logits(held[0][piece]).float().log_softmax(-1)
            p_NV = logp_NV.exp()
            return p_NV, (p_NV * logp_NV.sub_(logq_NV)).sum(-1)
        logp_NK, ids_NK = held[0][piece], held[1][piece]
        p_NK, logq_NK = logp_NK.exp(), logq_NV.gather(1, ids_NK)
        rest_p_N = (1 - p_NK.sum(-1)).clamp_min(1e-9)
        rest_q_N = (1 - logq_NK.exp().sum(-1)).clamp_min(1e-9)
        target_NV = (logq_NV.exp() * (rest_p_N / rest_q_N)[:, None]).scatter_(1, ids_NK, p_NK)
        kl_N = (p_NK * (logp_NK - logq_NK)).sum(-1) + rest_p_N * (rest_p_N / rest_q_N).log()
        return target_NV, kl_N


def _share(
    runner: BackboneRunner, items: Sequence[TrainingExample], found: dict[tuple[str, int], Tensor]
) -> dict[tuple[str, int], Tensor]:
    """Give every rank the rows that the others ran: a sum in which each row is nonzero on one rank."""
    example = next(iter(found.values()))
    counts = [item.row.answer for item in items]
    absent = [example.new_zeros(count, example.shape[1]) for count in counts]
    mine = [found.get(item.key, zero) for item, zero in zip(items, absent, strict=True)]
    rows = runner.backbone.all_reduce(torch.cat(mine)).split(counts)
    return {item.key: row for item, row in zip(items, rows, strict=True)}
