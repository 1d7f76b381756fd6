import dataclasses

import pytest
import torch
from tiny_models import persona_data, tiny, tiny_config

from persona_pruner.learning.encoding import encode
from persona_pruner.learning.estimators import topk_mask
from persona_pruner.learning.methods.one_pass import OnePass
from persona_pruner.learning.outcome import TrainingStatus
from persona_pruner.learning.training_free import activation, magnitude
from persona_pruner.masks.format import Mask
from persona_pruner.masks.weight_mask import WeightMask

ANN, BARBARA = persona_data("Ann"), persona_data("Barbara")
OPPOSED = dataclasses.replace(ANN, opposite=BARBARA), dataclasses.replace(BARBARA, opposite=ANN)
CHANNELS = ("activation", "fisher", "magnitude", "random", "contrastive")
WEIGHTS = ("wanda", "sparsegpt", "contrastive_wanda", "contrastive_sparse")


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("tiny"))


def made(backbone, method, data, **learning):
    (result,) = OnePass(backbone, tiny_config(method=method, ratio=0.5, **learning)).train([data], run_id="r")
    assert result.status is TrainingStatus.DONE, result.message
    return result.mask


@pytest.mark.parametrize("method", CHANNELS)
def test_channel_methods_give_masks_like_any_other(backbone, method):
    mask = made(backbone, method, OPPOSED[0])
    assert isinstance(mask, Mask)
    assert mask.metadata.kept == (32, 32, 32)
    assert (mask.metadata.method, mask.metadata.steps) == (method, 0)
    assert mask.metadata.masked_loss > 0
    assert Mask.from_bytes(mask.to_bytes(), "x").metadata == mask.metadata
    assert made(backbone, method, OPPOSED[0]).to_bytes() == mask.to_bytes()


@pytest.mark.parametrize("method", WEIGHTS)
def test_weight_methods_keep_the_same_share_of_every_row(backbone, method):
    before = {name: weight.clone() for name, weight in backbone.model.state_dict().items()}
    mask = made(backbone, method, OPPOSED[0])
    assert isinstance(mask, WeightMask)
    assert len(mask.metadata.matrices) == 21
    assert all(kept == columns // 2 for _, columns, kept in mask.metadata.matrices.values())
    assert mask.metadata.masked_loss > 0
    assert made(backbone, method, OPPOSED[0]).to_bytes() == mask.to_bytes()
    assert all(torch.equal(weight, before[name]) for name, weight in backbone.model.state_dict().items())


def test_scores_are_those_of_the_formulas(backbone):
    assert torch.equal(made(backbone, "magnitude", ANN).keep_LI, topk_mask(magnitude(backbone), 32))
    scores = activation(backbone, tiny_config(), ANN)
    assert torch.equal(made(backbone, "activation", ANN).keep_LI, topk_mask(scores, 32))


def test_wanda_is_the_textbook_formula_row_by_row(backbone):
    config = tiny_config()
    encoded = encode(backbone.tokenizer, config.prompt, ANN, 2048)
    linear, inputs = backbone.model.model.layers[1].mlp.gate_proj, []
    for row in encoded.train:
        hook = linear.register_forward_pre_hook(
            lambda _, given, row=row: inputs.append(given[0][0, -row.answer - 1 : -1])
        )
        backbone.model(torch.tensor([[*encoded.prefixes[0], *row.tokens]]))
        hook.remove()
    norm = torch.cat(inputs).norm(dim=0)
    keep = made(backbone, "wanda", ANN).keep("model.layers.1.mlp.gate_proj")
    for weight, kept in zip(linear.weight, keep, strict=True):
        assert set(kept.nonzero().flatten().tolist()) == set((weight.abs() * norm).topk(16).indices.tolist())


def test_opposed_personas_get_masks_of_their_own_which_say_whom_they_were_contrasted_with(backbone):
    for method in ("contrastive_sparse", "contrastive_wanda"):
        one, other = (made(backbone, method, data) for data in OPPOSED)
        assert one.similarity(other) < 0.5
        assert one.metadata.opposite_sha256 == other.metadata.persona_sha256
        assert one.metadata.data_sha256 != other.metadata.data_sha256
    name = "model.layers.0.self_attn.k_proj"
    one, other = (made(backbone, "contrastive_sparse", data) for data in OPPOSED)
    assert not (one.keep(name) & other.keep(name)).any()


def test_a_persona_without_opposite_fails_alone(backbone):
    config = tiny_config(method="contrastive_wanda", ratio=0.5)
    failed, done = OnePass(backbone, config).train([ANN, OPPOSED[1]], run_id="r")
    assert (failed.status, failed.cause) == (TrainingStatus.FAILED, "no_opposite")
    assert done.status is TrainingStatus.DONE


def test_the_gate_lets_some_of_a_dropped_weight_through(backbone):
    hard, soft = (made(backbone, "wanda", ANN, gate=gate).metadata for gate in (0.0, 0.9))
    assert abs(soft.masked_loss - soft.unpruned_loss) < abs(hard.masked_loss - hard.unpruned_loss)
    assert soft.gate == 0.9
