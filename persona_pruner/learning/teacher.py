"""The unpruned model's distributions at the answer positions: what distillation learns from.

Shapes: N answer positions, D model width, V vocabulary, K logits kept per position.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from persona_pruner.backbone.forward import BackboneRunner
from persona_pruner.learning.batches import (
    MicroBatch,
    MicroBatchConfig,
    TrainingExample,
    answer_states,
    behind_prefix,
    examples_by_prefix,
)
from persona_pruner.learning.encoding import EncodedData, seeded

RowKey = tuple[str, int]
LIKELIEST = 16
"""Tokens per position that take part where only some of the vocabulary does."""


@dataclass(frozen=True)
class HeadTokens:
    """Part of the vocabulary: token ids (int64 [V], ascending), and the log of how many tokens each stands for (float32
    [V]), which is added to its logit: the sum over them then estimates that over the whole vocabulary."""

    ids_V: Tensor
    log_count_V: Tensor


class TeacherCache:
    """Answer distributions of the unpruned model, kept by row.

    `top` None: the final hidden states that the logits come from (exact, D instead of V numbers per token). Otherwise
    the `top` largest log-probabilities of each position and their ids; the rest counts as one bucket.

    `head_tokens`: distributions are compared over part of the vocabulary, which is another for every micro-batch: this
    many tokens drawn once, which stand for all others too, and those that the unpruned model finds likeliest at its
    positions. The head, half of a small model's step, costs accordingly less.
    """

    def __init__(self, top: int | None = None, head_tokens: int | None = None) -> None:
        self.top, self.head_tokens = top, head_tokens
        self.rows: dict[RowKey, tuple[Tensor, ...]] = {}

    def collect_rows(
        self,
        runner: BackboneRunner,
        encoded: EncodedData,
        settings: MicroBatchConfig,
        numbers: Collection[int] | None = None,
    ) -> None:
        """`collect` for all training rows of `encoded`, or for those numbers."""
        for prefix, examples in examples_by_prefix(encoded, numbers):
            self.collect(runner, prefix, examples, settings)

    @torch.no_grad()
    def collect(
        self,
        runner: BackboneRunner,
        prefix: Sequence[int],
        examples: Sequence[TrainingExample],
        settings: MicroBatchConfig,
    ) -> None:
        """Run `examples`, which stand behind one prefix, through the unpruned model, on every rank of the world."""
        states: dict[RowKey, Tensor] = {}
        for micro_batch, prefix_cache in behind_prefix(runner, prefix, examples, settings):
            answers_ND = answer_states(runner, micro_batch, prefix_cache)
            for example, rows_ND in zip(micro_batch.examples, micro_batch.split(answers_ND), strict=True):
                states[example.key] = rows_ND * (example.weight > 0)
        if runner.backbone.sharded:
            states = _share(runner, examples, states)
        for key, rows_ND in states.items():
            if self.top is not None:
                self.rows[key] = _largest(runner, rows_ND, self.top, settings)
            elif self.head_tokens is not None:
                self.rows[key] = (rows_ND, _largest(runner, rows_ND, LIKELIEST, settings)[1].int())
            else:
                self.rows[key] = (rows_ND,)

    def vocabulary(self, runner: BackboneRunner, micro_batch: MicroBatch) -> HeadTokens | None:
        """Over what a micro-batch is compared, its targets among it; None for all tokens."""
        if self.head_tokens is None:
            return None
        size = runner.model.get_output_embeddings().out_features
        device = micro_batch.targets_N.device
        drawn = torch.randperm(size, generator=seeded("head tokens"))[: self.head_tokens].to(device)
        likely = [self.rows[example.key][1].flatten().to(device).long() for example in micro_batch.examples]
        certain = torch.cat([micro_batch.targets_N, *likely]).unique()
        ids_V = torch.cat([drawn, certain]).unique()
        stands_for_others_V = ~torch.isin(ids_V, certain)
        others, standing = size - len(certain), max(int(stands_for_others_V.sum()), 1)
        return HeadTokens(ids_V, stands_for_others_V.float() * math.log(max(others, 1) / standing))

    def teacher_rows(self, micro_batch: MicroBatch) -> tuple[Tensor, ...]:
        """What is kept for the rows of a micro-batch, over its N answer positions."""
        kept = [self.rows[example.key] for example in micro_batch.examples]
        return tuple(torch.cat(values) for values in zip(*kept, strict=True))

    def compare(
        self,
        runner: BackboneRunner,
        teacher_rows: tuple[Tensor, ...],
        chunk: slice,
        logq_NV: Tensor,
        tokens: HeadTokens | None = None,
    ) -> tuple[Tensor, Tensor]:
        """teacher_probs [N, V] such that d KL / d logits = q - teacher_probs, and KL(teacher || q) [N], of a chunk."""
        if self.top is None:
            logp_NV = log_probabilities(head_logits(runner, teacher_rows[0][chunk], tokens), tokens)
            p_NV = logp_NV.exp()
            return p_NV, (p_NV * logp_NV.sub_(logq_NV)).sum(-1)
        logp_NK, ids_NK = teacher_rows[0][chunk], teacher_rows[1][chunk]
        p_NK, logq_NK = logp_NK.exp(), logq_NV.gather(1, ids_NK)
        rest_p_N = (1 - p_NK.sum(-1)).clamp_min(1e-9)
        rest_q_N = (1 - logq_NK.exp().sum(-1)).clamp_min(1e-9)
        teacher_probs_NV = (logq_NV.exp() * (rest_p_N / rest_q_N)[:, None]).scatter_(1, ids_NK, p_NK)
        kl_N = (p_NK * (logp_NK - logq_NK)).sum(-1) + rest_p_N * (rest_p_N / rest_q_N).log()
        return teacher_probs_NV, kl_N


def head_logits(runner: BackboneRunner, states_ND: Tensor, tokens: HeadTokens | None) -> Tensor:
    return runner.logits(states_ND, None if tokens is None else tokens.ids_V)


def log_probabilities(logits_NV: Tensor, tokens: HeadTokens | None) -> Tensor:
    """log softmax in float32; over part of the vocabulary, each token with what it stands for."""
    logits_NV = logits_NV.float()
    return (logits_NV if tokens is None else logits_NV + tokens.log_count_V).log_softmax(-1)


def _largest(runner: BackboneRunner, rows_ND: Tensor, count: int, settings: MicroBatchConfig) -> tuple[Tensor, Tensor]:
    """The largest log-probabilities of each position [N, count], and their token ids."""
    chunks = [
        runner.logits(chunk_ND).float().log_softmax(-1).topk(count, sorted=False)
        for chunk_ND in rows_ND.split(settings.objective.logits_chunk)
    ]
    return torch.cat([chunk.values for chunk in chunks]), torch.cat([chunk.indices for chunk in chunks])


def _share(
    runner: BackboneRunner, examples: Sequence[TrainingExample], states: dict[RowKey, Tensor]
) -> dict[RowKey, Tensor]:
    """Give every rank the rows that the others ran: a sum in which each row is nonzero on one rank."""
    model_width = next(iter(states.values())).shape[1]
    like = next(iter(states.values()))
    counts = [example.row.answer for example in examples]
    own = [
        states[example.key] if example.key in states else like.new_zeros(count, model_width)
        for example, count in zip(examples, counts, strict=True)
    ]
    rows = runner.backbone.all_reduce(torch.cat(own)).split(counts)
    return {example.key: row for example, row in zip(examples, rows, strict=True)}
