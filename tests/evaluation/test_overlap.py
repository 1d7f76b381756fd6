import numpy as np
import pytest

from persona_pruner.evaluation.overlap import description_similarity, overlap


def families(personas=6, layers=3, channels=64):
    """Two families of masks; members differ in few channels."""
    random = np.random.default_rng(0)
    bases = random.random((2, layers, channels)) > 0.5
    keep = np.stack([bases[number % 2] for number in range(personas)])
    flips = random.random(keep.shape) > 0.97
    return keep ^ flips


def test_overlaps_are_those_counted_one_by_one():
    keep = families()
    shared = overlap(keep, ["a"] * 6)
    for a in range(6):
        for b in range(6):
            expected = (keep[a] & keep[b]).sum() / (keep[a] | keep[b]).sum()
            assert shared.jaccard_PP[a, b] == pytest.approx(expected, abs=1e-6)
    assert shared.common == pytest.approx(keep.all(0).sum() / keep.sum((1, 2)).mean())
    pairs = [
        (keep[a, 1] & keep[b, 1]).sum() / (keep[a, 1] | keep[b, 1]).sum() for a in range(6) for b in range(a + 1, 6)
    ]
    assert shared.layers_L[1] == pytest.approx(np.mean(pairs))


def test_families_stand_together_in_order_clusters_and_map():
    shared = overlap(families(), [f"{'sails the sea' if n % 2 else 'bakes fresh bread'} {n}" for n in range(6)])
    assert {number % 2 for number in shared.order[:3]} in ({0}, {1})
    halves = overlap(families(), ["a"] * 6, clusters=2).cluster_P
    assert len(set(halves[::2])) == len(set(halves[1::2])) == 1
    assert halves[0] != halves[1]
    sides = np.sign(shared.map_P2[:, 0])
    assert abs(sides[::2].sum()) == abs(sides[1::2].sum()) == 3
    assert sides[0] != sides[1]
    assert shared.descriptions > 0.8


def test_equal_descriptions_say_nothing_and_similar_ones_share_rare_words():
    assert overlap(families(), ["the same"] * 6).descriptions is None
    similar = description_similarity(["a baker of bread", "a baker of cakes", "a pilot of ferries"])
    assert similar[0, 1] > similar[0, 2]
    assert similar[0, 0] == pytest.approx(1)
