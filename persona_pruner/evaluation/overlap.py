"""What masks say of their personas: how much they share, who is like whom, and where the layers differ.

Shape suffixes: P personas (masks), G groups (a layer's FFN channels, or its FFN or attention weights), L layers, I FFN
channels, C clusters.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np

from persona_pruner.errors import UserError
from persona_pruner.masks.format import Mask
from persona_pruner.masks.weight_mask import WeightMask

ATTENTION, FFN = "attention", "FFN"
_LAYER = re.compile(r"\.(\d+)\.")
_ATTENTION = re.compile("attn|attention", re.IGNORECASE)


@dataclass(frozen=True)
class SharedCounts:
    """How many channels (or weights) masks of one shape have in common, group by group."""

    groups: list[tuple[int, str]]
    """Layer, and ATTENTION or FFN."""
    sizes_G: np.ndarray
    """Channels or weights that a group has."""
    both_GPP: np.ndarray
    """Kept by both masks of a pair; on the diagonal what a mask keeps."""
    common: int
    """Kept by every mask."""

    def jaccard(self, groups: Sequence[int] | None = None) -> np.ndarray:
        """Jaccard index [P, P] over these groups together, without any over all."""
        both_PP = (self.both_GPP if groups is None else self.both_GPP[list(groups)]).sum(0)
        kept_P = both_PP.diagonal()
        union_PP = kept_P[:, None] + kept_P - both_PP
        return np.where(union_PP == 0, 1.0, both_PP / np.where(union_PP == 0, 1, union_PP))

    def by_kind(self) -> dict[str, list[int]]:
        """The groups of each kind in the order of their layers."""
        kinds: dict[str, list[int]] = {}
        for number, (_, kind) in sorted(enumerate(self.groups), key=lambda one: one[1]):
            kinds.setdefault(kind, []).append(number)
        return kinds


def shape_of(mask: Mask | WeightMask) -> object:
    """Masks with equal ones can be compared."""
    if isinstance(mask, Mask):
        return tuple(mask.keep_LI.shape)
    return tuple(sorted((name, rows, columns) for name, (rows, columns, _) in mask.metadata.matrices.items()))


def count_shared(masks: Sequence[Mask | WeightMask]) -> SharedCounts:
    """Of masks with one `shape_of`."""
    if isinstance(masks[0], Mask):
        return _count_channels(cast(Sequence[Mask], masks))
    return _count_weights(cast(Sequence[WeightMask], masks))


def _count_channels(masks: Sequence[Mask]) -> SharedCounts:
    layers, channels = masks[0].keep_LI.shape
    both_GPP = np.zeros((layers, len(masks), len(masks)))
    common = 0
    for layer in range(layers):
        keep_PI = np.stack([mask.keep_LI[layer].numpy() for mask in masks])
        kept_PI = keep_PI.astype(np.float32)
        both_GPP[layer] = kept_PI @ kept_PI.T
        common += int(keep_PI.all(0).sum())
    return SharedCounts([(layer, FFN) for layer in range(layers)], np.full(layers, channels), both_GPP, common)


def _count_weights(masks: Sequence[WeightMask]) -> SharedCounts:
    """Matrix by matrix on the packed bits: unpacked, a mask takes as many bytes as the model has weights."""
    placed = {name: place for name in masks[0].metadata.matrices if (place := _place(name))}
    groups = sorted(set(placed.values()))
    sizes_G = np.zeros(len(groups), np.int64)
    both_GPP = np.zeros((len(groups), len(masks), len(masks)))
    common = 0
    for name, place in placed.items():
        rows, columns, _ = masks[0].metadata.matrices[name]
        group = groups.index(place)
        sizes_G[group] += rows * columns
        bits = [mask.packed[name].numpy() for mask in masks]
        for first in range(len(masks)):
            for second in range(first, len(masks)):
                shared = int(np.bitwise_count(bits[first] & bits[second]).sum())
                both_GPP[group, first, second] += shared
                both_GPP[group, second, first] = both_GPP[group, first, second]
        common += int(np.bitwise_count(np.bitwise_and.reduce(bits)).sum())
    return SharedCounts(groups, sizes_G, both_GPP, common)


def _place(matrix: str) -> tuple[int, str] | None:
    """Of a matrix of the model, by its name; None outside the layers."""
    layer = _LAYER.search(f".{matrix}")
    return (int(layer[1]), ATTENTION if _ATTENTION.search(matrix) else FFN) if layer else None


@dataclass(frozen=True)
class Overlap:
    jaccard_PP: np.ndarray
    """Jaccard index of what each pair keeps."""
    order: list[int]
    """Personas as leaves of average-linkage clustering, so that those who are alike stand side by side."""
    cluster_P: np.ndarray
    """Number of each persona's cluster, from 1."""
    silhouette: float | None
    """How clearly the clusters are apart: mean silhouette, at most 1; about 0 says that there are none."""
    map_P2: np.ndarray
    """Classical multidimensional scaling of 1 - Jaccard."""
    common: float
    """Share of what a mask keeps that every mask keeps."""
    distances: dict[str, np.ndarray]
    """By kind of group: Jaccard distance [L] of two masks, mean over all pairs."""
    kept: dict[str, np.ndarray]
    """By kind of group: share [L] that masks keep."""
    descriptions: float | None
    """Spearman correlation of mask overlap and similarity of descriptions over all pairs; None below four personas or
    where one of them does not vary."""


def overlap(counts: SharedCounts, similarity_PP: np.ndarray, clusters: int = 8) -> Overlap:
    """Of two masks or more; `similarity_PP` is that of the personas' descriptions, `clusters` the most that are told
    apart: as many as have the best mean silhouette."""
    from scipy.cluster.hierarchy import leaves_list, linkage
    from scipy.spatial.distance import squareform

    jaccard_PP = counts.jaccard()
    distance_PP = 1 - jaccard_PP
    np.fill_diagonal(distance_PP, 0)
    tree = linkage(squareform(distance_PP, checks=False), "average")
    pairs = np.triu_indices(len(jaccard_PP), 1)
    kept_GP = np.diagonal(counts.both_GPP, axis1=1, axis2=2)
    cluster_P, silhouette = _cluster(tree, distance_PP, clusters)
    kinds = counts.by_kind()
    return Overlap(
        jaccard_PP=jaccard_PP,
        order=[int(leaf) for leaf in leaves_list(tree)],
        cluster_P=cluster_P,
        silhouette=silhouette,
        map_P2=_scale(distance_PP),
        common=counts.common / float(kept_GP.sum(0).mean()),
        distances={
            kind: np.array([1 - counts.jaccard([group])[pairs].mean() for group in groups])
            for kind, groups in kinds.items()
        },
        kept={kind: kept_GP[groups].mean(1) / counts.sizes_G[groups] for kind, groups in kinds.items()},
        descriptions=_correlation(jaccard_PP[pairs], similarity_PP[pairs]),
    )


@dataclass(frozen=True)
class SeedAgreement:
    """Whether what masks share is the personas' doing: masks of the same personas from two runs."""

    personas: int
    correlation: float | None
    """Pearson r of the overlaps of all pairs in one run and in the other; None below four personas."""
    same: float
    """Mean Jaccard index of a persona's two masks."""
    different: float
    """Of masks of two personas, each from another run."""


def across_seeds(counts: SharedCounts) -> SeedAgreement:
    """`counts` is of the masks of all personas from one run, then of the same personas from the other."""
    jaccard = counts.jaccard()
    personas = len(jaccard) // 2
    first, second = jaccard[:personas, :personas], jaccard[personas:, personas:]
    between = jaccard[:personas, personas:]
    pairs = np.triu_indices(personas, 1)
    correlation = None
    if personas > 3 and np.ptp(first[pairs]) and np.ptp(second[pairs]):
        correlation = float(np.corrcoef(first[pairs], second[pairs])[0, 1])
    apart = ~np.eye(personas, dtype=bool)
    return SeedAgreement(personas, correlation, float(between.diagonal().mean()), float(between[apart].mean()))


def description_similarity(descriptions: Sequence[str]) -> np.ndarray:
    """Cosine [P, P] of word counts weighted by inverse document frequency."""
    counts = [Counter(re.findall(r"\w+", text.lower())) for text in descriptions]
    documents = Counter(word for count in counts for word in count)
    vocabulary = {word: number for number, word in enumerate(sorted(documents))}
    vectors = np.zeros((len(descriptions), max(1, len(vocabulary))))
    for row, count in enumerate(counts):
        for word, times in count.items():
            vectors[row, vocabulary[word]] = times * np.log((1 + len(counts)) / documents[word])
    return _cosines(vectors)


def embedding_similarity(descriptions: Sequence[str], model: str) -> np.ndarray:
    """Cosine [P, P] of mean final hidden states of a transformers model (a sentence encoder, or the backbone), less
    their mean over the personas: those of a language model all point the same way. Raises UserError."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    try:
        tokenizer, encoder = AutoTokenizer.from_pretrained(model), AutoModel.from_pretrained(model).eval()
    except (OSError, ValueError) as error:
        raise UserError(f"--embeddings {model}: no transformers model: {str(error).splitlines()[0]}") from None
    vectors = []
    with torch.inference_mode():
        for text in descriptions:
            tokens = tokenizer(text or " ", return_tensors="pt", truncation=True)
            hidden_1TD = encoder(**{name: tokens[name] for name in ("input_ids", "attention_mask")}).last_hidden_state
            vectors.append(hidden_1TD[0].float().mean(0).numpy())
    return _cosines(np.stack(vectors) - np.mean(vectors, 0))


def _cosines(vectors: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors = vectors / np.where(norms == 0, 1, norms)
    return vectors @ vectors.T


def _cluster(tree: np.ndarray, distance_PP: np.ndarray, most: int) -> tuple[np.ndarray, float | None]:
    """Cluster of each persona, from 1, and how clearly they are apart."""
    from scipy.cluster.hierarchy import fcluster

    personas = len(distance_PP)
    cuts = (fcluster(tree, count, "maxclust") for count in range(2, min(most, personas // 2) + 1))
    scored = [(cluster_P, _silhouette(distance_PP, cluster_P)) for cluster_P in cuts if cluster_P.max() > 1]
    return max(scored, key=lambda one: one[1], default=(np.ones(personas, int), None))


def _silhouette(distance_PP: np.ndarray, cluster_P: np.ndarray) -> float:
    """Mean of (b - a) / max(a, b): a is the mean distance to one's own cluster, b that to the nearest other one
    (Rousseeuw 1987); 0 for a cluster of one."""
    member_PC = (cluster_P[:, None] == np.unique(cluster_P)).astype(float)
    size_P = member_PC @ member_PC.sum(0)
    sums_PC = distance_PP @ member_PC
    own_P = (sums_PC * member_PC).sum(1) / np.maximum(size_P - 1, 1)
    other_P = np.where(member_PC > 0, np.inf, sums_PC / member_PC.sum(0)).min(1)
    largest_P = np.maximum(own_P, other_P)
    score_P = np.where((size_P > 1) & (largest_P > 0), (other_P - own_P) / np.where(largest_P > 0, largest_P, 1), 0)
    return float(score_P.mean())


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
