import pytest
import torch
from mask_examples import mask
from tiny_models import save_tiny, tiny
from transformers import AutoModelForCausalLM

from persona_pruner.backbone.apply import apply_masks
from persona_pruner.backbone.files import fingerprint
from persona_pruner.errors import MaskError

TOKENS = torch.arange(5, 23).view(3, 6)


def made(backbone_fingerprint, seed, **shape):
    one = mask(f"p{seed}", **{"layers": 3, "channels": 64, "kept": 24, "seed": seed, **shape})
    object.__setattr__(one.metadata, "backbone_fingerprint", backbone_fingerprint)
    return one


@pytest.fixture
def model(tmp_path):
    path = save_tiny(tmp_path / "tiny")
    return AutoModelForCausalLM.from_pretrained(path).eval()


@pytest.fixture
def masks(model):
    return [made(fingerprint(model.config._name_or_path), seed) for seed in range(2)]


def test_switching_replaces_what_is_on_bit_for_bit(model, masks):
    one, other = masks
    plain = model(TOKENS).logits
    with other.on(model):
        only_other = model(TOKENS).logits
    assert not torch.equal(only_other, plain)
    first = one.apply(model)
    handle = other.apply(model)
    assert torch.equal(model(TOKENS).logits, only_other)
    first.remove()
    assert torch.equal(model(TOKENS).logits, only_other), "a handle removes its own masks only"
    handle.remove()
    assert torch.equal(model(TOKENS).logits, plain)


def test_each_row_has_the_mask_given_for_it(model, masks):
    one, other = masks
    alone = []
    for row, each in enumerate((one, other)):
        with each.on(model):
            alone.append(model(TOKENS).logits[row])
    plain = model(TOKENS).logits
    with apply_masks(model, [one, other, None]):
        together = model(TOKENS).logits
        with pytest.raises(MaskError, match="3 masks are on, one per row, and the batch has 2 rows"):
            model(TOKENS[:2])
    assert torch.allclose(together[0], alone[0], atol=1e-5)
    assert torch.allclose(together[1], alone[1], atol=1e-5)
    assert torch.equal(together[2], plain[2])


def test_a_mask_of_another_backbone_is_refused_and_what_is_on_stays(model, masks):
    masks[0].apply(model)
    before = model(TOKENS).logits
    own = masks[0].metadata.backbone_fingerprint
    for wrong, said in (
        (made("f" * 64, 2), f"ffffffffffffffff.*{own[:16]}"),
        (made(own, 2, channels=40), "3 layers of 40 channels, this LlamaForCausalLM 3 of 64"),
        (made(own, 2, layers=2), "2 layers of 64 channels, this LlamaForCausalLM 3 of 64"),
    ):
        with pytest.raises(MaskError, match=said) as caught:
            wrong.apply(model)
        assert "\n" not in str(caught.value)
    assert torch.equal(model(TOKENS).logits, before)


def test_a_model_without_files_needs_the_users_word(masks, model):
    model.config._name_or_path = ""
    with pytest.raises(MaskError, match=r"not loaded from files.*check_backbone=False"):
        masks[0].apply(model)
    with masks[0].on(model, check_backbone=False):
        assert model(TOKENS).logits.isfinite().all()


def test_a_loaded_backbone_carries_its_fingerprint(tmp_path):
    backbone = tiny(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with made(backbone.fingerprint, 0).on(backbone.model):
        assert backbone.model(TOKENS).logits.isfinite().all()
