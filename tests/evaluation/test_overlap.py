import numpy as np
import pytest
import torch
from mask_examples import mask, weight_mask

from persona_pruner.errors import UserError
from persona_pruner.evaluation.overlap import (
    across_seeds,
    count_shared,
    description_similarity,
    embedding_similarity,
    overlap,
    shape_of,
)
from persona_pruner.masks.format import Mask


def families(personas=6, layers=3, channels=64, seed=0, flipped=0.03):
    """Two families of masks; members differ in few channels."""
    bases = np.random.default_rng(0).random((2, layers, channels)) > 0.5
    keep = np.stack([bases[number % 2] for number in range(personas)])
    return keep ^ (np.random.default_rng(seed).random(keep.shape) < flipped)


def counts_of(keep):
    return count_shared([Mask(torch.from_numpy(one), mask().metadata) for one in keep])


def of(keep, descriptions=None, **options):
    return overlap(counts_of(keep), description_similarity(descriptions or ["a"] * len(keep)), **options)


def jaccard(a, b):
    return (a & b).sum() / (a | b).sum()


def test_overlaps_are_those_counted_one_by_one():
    keep = families()
    shared = of(keep)
    for a in range(6):
        for b in range(6):
            assert shared.jaccard_PP[a, b] == pytest.approx(jaccard(keep[a], keep[b]), abs=1e-6)
    assert shared.common == pytest.approx(keep.all(0).sum() / keep.sum((1, 2)).mean())
    pairs = [1 - jaccard(keep[a, 1], keep[b, 1]) for a in range(6) for b in range(a + 1, 6)]
    assert shared.distances["FFN"][1] == pytest.approx(np.mean(pairs))
    assert shared.kept["FFN"] == pytest.approx(keep.mean((0, 2)))


def test_weights_of_attention_and_ffn_are_counted_apart_layer_by_layer():
    masks = [weight_mask(f"p{seed}", seed=seed) for seed in range(3)]
    counts = count_shared(masks)
    assert counts.groups == [(0, "FFN"), (0, "attention"), (1, "FFN"), (1, "attention")]
    keep = {name: [one.keep(name).numpy() for one in masks] for name in masks[0].packed}
    shared = overlap(counts, description_similarity(["a", "b", "c"]))
    pairs = [(0, 1), (0, 2), (1, 2)]
    first = keep["model.layers.1.self_attn.q_proj"]
    assert shared.distances["attention"][1] == pytest.approx(
        np.mean([1 - jaccard(first[a], first[b]) for a, b in pairs])
    )
    ffn = [
        np.concatenate([keep[f"model.layers.0.mlp.{name}"][n].ravel() for name in ("up_proj", "down_proj")])
        for n in range(3)
    ]
    assert shared.distances["FFN"][0] == pytest.approx(np.mean([1 - jaccard(ffn[a], ffn[b]) for a, b in pairs]))
    assert shared.jaccard_PP[0, 1] == pytest.approx(masks[0].similarity(masks[1]))
    assert shared.kept["FFN"][0] == pytest.approx(ffn[0].mean())
    everything = sum(np.logical_and.reduce(bits).sum() for bits in keep.values())
    assert counts.common == everything
    assert shape_of(masks[0]) == shape_of(masks[1]) != shape_of(mask())


def test_families_stand_together_in_order_clusters_and_map():
    shared = of(families(), [f"{'sails the sea' if n % 2 else 'bakes fresh bread'} {n}" for n in range(6)])
    assert {number % 2 for number in shared.order[:3]} in ({0}, {1})
    assert len(set(shared.cluster_P[::2])) == len(set(shared.cluster_P[1::2])) == 1
    assert shared.cluster_P[0] != shared.cluster_P[1]
    assert shared.silhouette > 0.5
    sides = np.sign(shared.map_P2[:, 0])
    assert abs(sides[::2].sum()) == abs(sides[1::2].sum()) == 3
    assert sides[0] != sides[1]
    assert shared.descriptions > 0.8


def test_as_many_clusters_as_there_are_families_and_none_clearly_where_masks_are_chance():
    bases = np.random.default_rng(3).random((3, 2, 64)) > 0.5
    keep = np.repeat(bases, 4, 0) ^ (np.random.default_rng(4).random((12, 2, 64)) < 0.05)
    assert of(keep).cluster_P.max() == 3
    assert of(np.random.default_rng(5).random((12, 2, 64)) > 0.5).silhouette < 0.2
    assert of(families(3)).silhouette is None


def test_runs_that_found_the_same_personas_agree_and_chance_does_not():
    agreement = across_seeds(counts_of(np.concatenate([families(8, seed=1), families(8, seed=2)])))
    assert agreement.personas == 8
    assert agreement.correlation > 0.9
    assert agreement.same > 0.8 > agreement.different
    chance = np.random.default_rng(6).random((16, 3, 64)) > 0.5
    agreement = across_seeds(counts_of(chance))
    assert abs(agreement.correlation) < 0.5
    assert agreement.same == pytest.approx(agreement.different, abs=0.1)
    assert across_seeds(counts_of(chance[:4])).correlation is None


def test_equal_descriptions_say_nothing_and_similar_ones_share_rare_words():
    assert of(families(), ["the same"] * 6).descriptions is None
    similar = description_similarity(["a baker of bread", "a baker of cakes", "a pilot of ferries"])
    assert similar[0, 1] > similar[0, 2]
    assert similar[0, 0] == pytest.approx(1)


def test_a_transformers_model_embeds_descriptions(tmp_path):
    from tiny_models import tiny

    tiny(tmp_path / "tiny")
    similar = embedding_similarity(["bakes bread", "bakes bread", "flies planes"], str(tmp_path / "tiny"))
    assert similar[0, 1] == pytest.approx(1, abs=1e-5)
    assert similar[0, 2] < similar[0, 1]
    with pytest.raises(UserError, match=r"--embeddings .*nowhere: no transformers model"):
        embedding_similarity(["a"], str(tmp_path / "nowhere"))
