"""What masks say of their personas: how much they share, who is like whom, and where the layers agree.

Shape suffixes: P personas, L layers, I FFN channels.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Overlap:
    jaccard_PP: np.ndarray
    """Jaccard index of the kept channels of each pair."""
    order: list[int]
    """Personas as leaves of average-linkage clustering, so that those who are alike stand side by side."""
    cluster_P: np.ndarray
    """Number of each persona's cluster, from 1."""
    map_P2: np.ndarray
    """Classical multidimensional scaling of 1 - Jaccard."""
    common: float
    """Share of the kept channels that every persona keeps."""
    layers_L: np.ndarray
    """Mean Jaccard index of all pairs, layer by layer."""
    descriptions: float | None
    """Spearman correlation of mask overlap and similarity of descriptions over all pairs; None below four personas or
    where one of them does not vary."""


def overlap(keep_PLI: np.ndarray, descriptions: Sequence[str], clusters: int = 8) -> Overlap:
    """`keep_PLI` bool, of two personas or more."""
    from scipy.cluster.hierarchy import fcluster, leaves_list, linkage
    from scipy.spatial.distance import squareform

    personas, layers, _ = keep_PLI.shape
    layers_LPP = np.stack([_jaccard(keep_PLI[:, layer]) for layer in range(layers)])
    jaccard_PP = _jaccard(keep_PLI.reshape(personas, -1))
    distance_PP = 1 - jaccard_PP
    np.fill_diagonal(distance_PP, 0)
    tree = linkage(squareform(distance_PP, checks=False), "average")
    pairs = np.triu_indices(personas, 1)
    kept = keep_PLI.sum(axis=(1, 2)).mean()
    return Overlap(
        jaccard_PP=jaccard_PP,
        order=[int(leaf) for leaf in leaves_list(tree)],
        cluster_P=fcluster(tree, max(1, min(clusters, personas // 2)), "maxclust"),
        map_P2=_scale(distance_PP),
        common=float(keep_PLI.all(0).sum() / kept),
        layers_L=layers_LPP[:, pairs[0], pairs[1]].mean(1),
        descriptions=_correlation(jaccard_PP[pairs], description_similarity(descriptions)[pairs]),
    )


def description_similarity(descriptions: Sequence[str]) -> np.ndarray:
    """Cosine [P, P] of word counts weighted by inverse document frequency."""
    counts = [Counter(re.findall(r"\w+", text.lower())) for text in descriptions]
    documents = Counter(word for count in counts for word in count)
    vocabulary = {word: number for number, word in enumerate(sorted(documents))}
    vectors = np.zeros((len(descriptions), max(1, len(vocabulary))))
    for row, count in enumerate(counts):
        for word, times in count.items():
            vectors[row, vocabulary[word]] = times * np.log((1 + len(counts)) / documents[word])
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors /= np.where(norms == 0, 1, norms)
    return vectors @ vectors.T


def _jaccard(keep_PC: np.ndarray) -> np.ndarray:
    kept = keep_PC.astype(np.float32)
    both = kept @ kept.T
    sizes = kept.sum(1)
    union = sizes[:, None] + sizes - both
    return np.where(union == 0, 1.0, both / np.where(union == 0, 1, union)).astype(float)


def _scale(distance_PP: np.ndarray) -> np.ndarray:
    """Classical (Torgerson) scaling to two dimensions; the sign is fixed, so that the map is the same each time."""
    centre = np.eye(len(distance_PP)) - 1 / len(distance_PP)
    values, vectors = np.linalg.eigh(-0.5 * centre @ distance_PP**2 @ centre)
    axes = vectors[:, ::-1][:, :2] * np.sqrt(np.clip(values[::-1][:2], 0, None))
    signs = np.sign(axes[np.abs(axes).argmax(0), range(axes.shape[1])])
    return axes * np.where(signs == 0, 1, signs)


def _correlation(first: np.ndarray, second: np.ndarray) -> float | None:
    from scipy.stats import spearmanr

    if len(first) < 6 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return None
    return float(spearmanr(first, second).statistic)
