import dataclasses

import pytest
import torch
from tiny_models import save_tiny
from transformers import AutoModelForCausalLM

from persona_pruner.backbone.apply_weights import apply_weight_mask
from persona_pruner.backbone.files import fingerprint
from persona_pruner.errors import MaskError
from persona_pruner.masks.weight_mask import WeightMask, WeightMaskMetadata, pack

TOKENS = torch.arange(5, 23).view(3, 6)
NAMES = ("model.layers.0.self_attn.o_proj", "model.layers.1.mlp.down_proj")


@pytest.fixture
def model(tmp_path):
    return AutoModelForCausalLM.from_pretrained(save_tiny(tmp_path / "tiny")).eval()


def made(model, seed=0, gate=0.0):
    packed, matrices = {}, {}
    for name in NAMES:
        rows, columns = model.get_submodule(name).weight.shape
        order = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)).argsort(1)
        packed[name] = pack(torch.zeros(rows, columns, dtype=torch.bool).scatter_(1, order[:, :10], True))
        matrices[name] = (rows, columns, 10)
    return WeightMask(
        packed,
        WeightMaskMetadata(
            persona_id="ada", persona_sha256="p", backbone="tiny", method="wanda", ratio=0.5, seed=0, steps=0,
            backbone_fingerprint=fingerprint(model.config._name_or_path), matrices=matrices, gate=gate,
        ),
    )  # fmt: skip


@pytest.mark.parametrize("gate", [0.0, 0.3])
def test_dropped_weights_are_multiplied_by_the_gate_and_come_back_bit_by_bit(model, gate):
    mask, plain = made(model, gate=gate), model(TOKENS).logits
    before = {name: model.get_submodule(name).weight.clone() for name in NAMES}
    with mask.on(model):
        for name in NAMES:
            weight, keep = model.get_submodule(name).weight, mask.keep(name)
            assert torch.equal(weight[keep], before[name][keep])
            assert torch.equal(weight[~keep], before[name][~keep] * gate)
        assert not torch.equal(model(TOKENS).logits, plain)
    assert torch.equal(model(TOKENS).logits, plain)


def test_another_mask_takes_the_place_of_the_first(model):
    plain = model(TOKENS).logits
    first = made(model).apply(model)
    with made(model, seed=1).on(model):
        second = model(TOKENS).logits
        first.remove()
        assert torch.equal(model(TOKENS).logits, second)
    assert torch.equal(model(TOKENS).logits, plain)


def test_another_backbone_is_refused_and_nothing_changes(model):
    plain, mask = model(TOKENS).logits, made(model)
    foreign = dataclasses.replace(mask, metadata=dataclasses.replace(mask.metadata, backbone_fingerprint="0" * 64))
    with pytest.raises(MaskError, match="use the backbone it was made for"):
        foreign.apply(model)
    matrices = {**mask.metadata.matrices, NAMES[0]: (7, 7, 3)}
    with pytest.raises(MaskError, match=r"o_proj \[7, 7\] is no matrix of this LlamaForCausalLM"):
        apply_weight_mask(
            model, dataclasses.replace(mask, metadata=dataclasses.replace(mask.metadata, matrices=matrices))
        )
    assert torch.equal(model(TOKENS).logits, plain)
