"""Each choice of weights against its formula, written out plainly."""

import pytest
import torch

from persona_pruner.learning.methods.input_statistics import InputStatistics
from persona_pruner.learning.methods.weight_choice import (
    DAMPING,
    contrastive_sparse,
    contrastive_wanda,
    kept_weights,
    largest,
    sparsegpt,
    wanda,
)

ROWS, COLUMNS = 6, 24


def weights(seed=0):
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(seed))


def texts(seed, count=7):
    """Inputs [tokens, columns] of some rows of different length, whose columns differ in size and mean."""
    generator = torch.Generator().manual_seed(seed)
    size, shift = torch.rand(2, COLUMNS, generator=generator)
    return [(torch.randn(2 + n % 4, COLUMNS, generator=generator) + shift) * size for n in range(count)]


def statistics(rows):
    tokens = torch.cat(rows).double()
    norms = torch.stack([row.double().norm(dim=0) for row in rows])
    return InputStatistics(
        tokens.sum(0), tokens.square().sum(0), norms.sum(0), (tokens.T @ tokens).float(), len(tokens), len(rows)
    )


def test_wanda_keeps_row_by_row_the_largest_weight_times_input_norm():
    weight, rows = weights(), texts(1)
    keep = wanda(weight, statistics(rows), 9)
    norm = torch.cat(rows).norm(dim=0)
    for row, kept in zip(weight, keep, strict=True):
        assert set(kept.nonzero().flatten().tolist()) == set((row.abs() * norm).topk(9).indices.tolist())


def test_contrastive_wanda_is_the_published_formula_for_both_personas():
    weight, own, other = weights(), texts(1), texts(2)
    means, variances = [], []
    for rows in (own, other):
        norms = torch.stack([torch.norm(row, p=2, dim=0) for row in rows])
        means.append(norms.mean(0))
        variances.append(norms.var(0, unbiased=False))
    z = (means[0] - means[1]) / (variances[0] + variances[1] + 1e-6).sqrt()
    first, second = statistics(own), statistics(other)
    masks = contrastive_wanda(weight, first, second, 6), contrastive_wanda(weight, second, first, 6)
    for keep, direction in zip(masks, (z, -z), strict=True):
        scores = weight.abs() * direction.relu()
        for row, kept in zip(scores, keep, strict=True):
            positive = (row > 0).sum().item()
            assert set(row.topk(min(6, positive)).indices.tolist()) <= set(kept.nonzero().flatten().tolist())
            assert kept.sum() == 6


def test_contrastive_sparse_gives_the_first_the_largest_scores_and_the_other_what_is_left():
    weight, own, other = weights(), texts(1), texts(2)
    one, two = torch.cat(own), torch.cat(other)
    spread = (one.var(0, unbiased=False) + two.var(0, unbiased=False) + 1e-6).sqrt()
    scores = weight.abs() * (one.mean(0) - two.mean(0)).abs() / spread
    a, b = statistics(own), statistics(other)
    first, second = contrastive_sparse(weight, a, b, 10, True), contrastive_sparse(weight, b, a, 10, False)
    for row, mine, theirs in zip(scores, first, second, strict=True):
        order = row.argsort(descending=True).tolist()
        assert set(mine.nonzero().flatten().tolist()) == set(order[:10])
        assert set(theirs.nonzero().flatten().tolist()) == set(order[10:20])
    wide = contrastive_sparse(weight, b, a, 18, False)
    first = contrastive_sparse(weight, a, b, 18, True)
    assert (wide | first).all()
    assert (wide.sum(1) == 18).all()


def plain_obs(weight, gram, tokens, kept, block):
    """Column by column: drop, and let the columns behind make up for it by the inverse of what is left of H."""
    weight, keep = weight.double().clone(), torch.ones_like(weight, dtype=torch.bool)
    h = gram.double() / tokens
    h += torch.diag(torch.full((COLUMNS,), DAMPING * h.diagonal().mean().item(), dtype=torch.float64))
    inverses = [torch.linalg.inv(h[j:, j:]) for j in range(COLUMNS)]
    dropped = 0
    for start in range(0, COLUMNS, block):
        end = min(start + block, COLUMNS)
        wanted = (COLUMNS - kept) * end // COLUMNS
        saliency = weight[:, start:end] ** 2 / torch.stack([inverses[j][0, 0] for j in range(start, end)])
        for row in range(ROWS):
            lowest = saliency[row].argsort()[: wanted - dropped]
            keep[row, start + lowest] = False
            for j in range(start, end):
                if not keep[row, j]:
                    weight[row, j:] -= weight[row, j] / inverses[j][0, 0] * inverses[j][:, 0]
        dropped = wanted
    return keep


@pytest.mark.parametrize("block", [128, 8, 5])
def test_sparsegpt_is_the_plain_optimal_brain_surgeon(block):
    weight, own = weights(), statistics(texts(1, count=30))
    keep = sparsegpt(weight, own, 10, block)
    assert (keep.sum(1) == 10).all()
    assert torch.equal(keep, plain_obs(weight, own.gram_II, own.tokens, 10, block))
    assert not torch.equal(keep, wanda(weight, own, 10))


def test_sparsegpt_bears_columns_that_nothing_ever_comes_in_through():
    rows = texts(1)
    for row in rows:
        row[:, 3] = 0
    assert (sparsegpt(weights(), statistics(rows), 12).sum(1) == 12).all()


def test_among_equal_scores_the_second_order_then_the_lower_column_is_kept():
    zeros = torch.zeros(1, 4)
    assert largest(zeros, 2).tolist() == [[True, True, False, False]]
    assert largest(zeros, 2, torch.tensor([[1.0, 3.0, 1.0, 2.0]])).tolist() == [[False, True, False, True]]
    assert largest(torch.tensor([[0.0, 0.0, 5.0, 0.0]]), 2, torch.tensor([[1.0, 3.0, 0.0, 2.0]])).tolist() == [
        [False, True, True, False]
    ]


def test_a_row_keeps_its_share_and_one_weight_at_least():
    assert [kept_weights(576, ratio) for ratio in (0.25, 0.5)] == [432, 288]
    assert kept_weights(8, 0.99) == 1
