"""Which weights of a matrix are kept: as many in each output row, from the statistics of the columns that it reads.

Wanda: arXiv 2306.11695. SparseGPT: arXiv 2301.00774. Contrastive forms: Your Language Model Secretly Contains
Personality Subnetworks (arXiv 2602.07164) and its published code.

Shapes: O output rows, I input columns of a matrix.
"""

import torch
from torch import Tensor

from persona_pruner.learning.methods.input_statistics import InputStatistics

EPSILON = 1e-6
"""Added to the variances of two personas, as in the published code."""
DAMPING = 0.01
"""SparseGPT: share of its mean diagonal that is added to the diagonal of the Gram matrix."""
BLOCK = 128
"""SparseGPT: columns among which it chooses at once."""


def kept_weights(columns: int, ratio: float) -> int:
    """Weights that each row keeps of so many columns; one at least."""
    return max(round((1 - ratio) * columns), 1)


def largest(scores_OI: Tensor, kept: int, then_OI: Tensor | None = None) -> Tensor:
    """bool [O, I]: the `kept` largest scores of each row; among equal ones the larger `then_OI`, then the lower column.

    Contrastive scores are 0 for every column that does not speak for a persona: without a second order the columns'
    numbers would choose among those.
    """
    order_OI = torch.arange(scores_OI.shape[1], device=scores_OI.device).expand_as(scores_OI)
    for key_OI in (then_OI, scores_OI):
        if key_OI is not None:
            by_key_OI = key_OI.gather(1, order_OI).sort(dim=1, descending=True, stable=True).indices
            order_OI = order_OI.gather(1, by_key_OI)
    keep_OI = torch.zeros_like(scores_OI, dtype=torch.bool)
    return keep_OI.scatter_(1, order_OI[:, :kept], True)


def wanda(weight_OI: Tensor, own: InputStatistics, kept: int) -> Tensor:
    """bool [O, I]: the largest |W| * norm of the column over all tokens."""
    return largest(wanda_scores(weight_OI, own), kept)


def wanda_scores(weight_OI: Tensor, own: InputStatistics) -> Tensor:
    return weight_OI.abs().double() * own.norm_I


def contrastive_wanda(weight_OI: Tensor, own: InputStatistics, opposed: InputStatistics, kept: int) -> Tensor:
    """bool [O, I]: the largest |W| * relu(z), z the difference of the mean norms of a column over the two personas'
    rows in units of their common spread. The opposed persona's mask is that of -z: call it with both exchanged."""
    (mean_I, variance_I), (other_mean_I, other_variance_I) = own.row_norm_moments(), opposed.row_norm_moments()
    z_I = (mean_I - other_mean_I) / (variance_I + other_variance_I + EPSILON).sqrt()
    return largest(weight_OI.abs().double() * z_I.relu(), kept, wanda_scores(weight_OI, own))


def contrastive_sparse(
    weight_OI: Tensor, own: InputStatistics, opposed: InputStatistics, kept: int, first: bool
) -> Tensor:
    """bool [O, I]: the largest |W| * |difference of the column's means over tokens| / common spread. Both personas have
    the same scores: the `first` one chooses, the other takes the largest of what is left, then those of the first."""
    (mean_I, variance_I), (other_mean_I, other_variance_I) = own.token_moments(), opposed.token_moments()
    score_I = (mean_I - other_mean_I).abs() / (variance_I + other_variance_I + EPSILON).sqrt()
    scores_OI = weight_OI.abs().double() * score_I
    chosen_OI = largest(scores_OI, kept)
    return chosen_OI if first else largest((~chosen_OI).double(), kept, scores_OI)


def sparsegpt(weight_OI: Tensor, own: InputStatistics, kept: int, block: int = BLOCK) -> Tensor:
    """bool [O, I]: what SparseGPT keeps, dropping the same share of each row in every block of columns.

    1. The inverse of the damped Gram matrix, as its upper Cholesky factor U: U[j, j]^2 is the inverse's entry for
       column j once the columns before it are settled.
    2. Block by block the smallest W^2 / U[j, j]^2 of each row are dropped, and what each of them did is given to the
       columns behind it (optimal brain surgeon). So later choices see the weights as they would have become.

    The published code chooses over all rows of a block together; here each row keeps the same number. Only the choice
    is a mask: the weights stay those of the backbone.
    """
    assert own.gram_II is not None
    weight_OI = weight_OI.float().clone()
    columns = weight_OI.shape[1]
    upper_II = _inverse_factor(own.gram_II / own.tokens)
    keep_OI = torch.ones_like(weight_OI, dtype=torch.bool)
    for start in range(0, columns, block):
        end = min(start + block, columns)
        dropped = (columns - kept) * end // columns - (columns - kept) * start // columns
        pivot_J = upper_II.diagonal()[start:end]
        order_OJ = (weight_OI[:, start:end] / pivot_J).square().sort(dim=1, stable=True).indices
        keep_OI[:, start:end].scatter_(1, order_OJ[:, :dropped], False)
        errors_OJ = torch.zeros_like(weight_OI[:, start:end])
        for j in range(start, end):
            error_O = weight_OI[:, j].masked_fill(keep_OI[:, j], 0) / upper_II[j, j]
            weight_OI[:, j:end] -= error_O[:, None] * upper_II[j, j:end]
            errors_OJ[:, j - start] = error_O
        weight_OI[:, end:] -= errors_OJ @ upper_II[start:end, end:]
    return keep_OI


def _inverse_factor(gram_II: Tensor) -> Tensor:
    """Upper U with U^T U = the inverse of the damped Gram matrix."""
    diagonal_I = gram_II.diagonal()
    silent_I = diagonal_I == 0
    damped_II = gram_II + torch.diag(DAMPING * diagonal_I.mean() + silent_I.to(gram_II.dtype))
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped_II)), upper=True)
