import dataclasses

import pytest
import torch
from tiny_models import FAMILIES, save_tiny, tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from persona_pruner.backbone import export
from persona_pruner.backbone.channels import find_ffns
from persona_pruner.backbone.compact import load_checkpoint
from persona_pruner.backbone.export import export_pruned, export_refusal
from persona_pruner.backbone.files import fingerprint
from persona_pruner.backbone.load import load_backbone
from persona_pruner.config.schema import BackboneConfig
from persona_pruner.errors import BackboneError, MaskError
from persona_pruner.masks.format import Mask, MaskMetadata

BIASED = {"llama": {"mlp_bias": True}}


TOKENS = torch.arange(7, 27)[None]
WIDTHS = (8, 24, 16)


def made(path, widths=(24, 24, 24)):
    scores = torch.rand(3, 64, generator=torch.Generator().manual_seed(0))
    keep = torch.zeros(3, 64, dtype=torch.bool)
    for layer, width in enumerate(widths):
        keep[layer, scores[layer].topk(width).indices] = True
    return Mask(
        keep,
        MaskMetadata(
            persona_id="ann", persona_sha256="", backbone="tiny", backbone_fingerprint=fingerprint(path), layers=3,
            channels=64, kept=(24,) * 3, method="ste", ratio=0.6, seed=0, steps=1,
        ),
    )  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_the_exported_model_is_smaller_and_gives_the_masked_logits(tmp_path, family):
    path = save_tiny(tmp_path / "whole", family, **BIASED.get(family, {}))
    mask = made(path)
    figures = export_pruned(mask, BackboneConfig(path=str(path)), tmp_path / "small")
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small").eval()
    assert getattr(small.config, "ffn_dim", None) == 24 or small.config.intermediate_size == 24
    assert (small(TOKENS).logits - masked_logits(path, mask)).abs().max() < 1e-5
    assert figures["logit_difference"] < 1e-5
    assert figures["top_token_agreement"] == 1
    assert figures["parameters_after"] < figures["parameters_before"]
    assert (tmp_path / "small" / "tokenizer.json").exists()


def masked_logits(path, mask):
    backbone = AutoModelForCausalLM.from_pretrained(path).eval()
    with mask.on(backbone):
        return backbone(TOKENS).logits


def test_bytes_before_and_after_are_of_the_same_type(tmp_path):
    path = save_tiny(tmp_path / "whole")
    figures = export_pruned(made(path), BackboneConfig(path=str(path), dtype="bfloat16"), tmp_path / "small")
    on_disk = sum(file.stat().st_size for file in (tmp_path / "small").glob("*.safetensors"))
    assert figures["bytes_after"] == 2 * figures["parameters_after"] == pytest.approx(on_disk, rel=0.1)
    assert figures["bytes_before"] == 2 * figures["parameters_before"]


@pytest.mark.parametrize("family", ["llama", "phi3", "opt"])
def test_layers_of_different_width_are_padded_for_plain_transformers(tmp_path, family):
    path = save_tiny(tmp_path / "whole", family, **BIASED.get(family, {}))
    mask = made(path, WIDTHS)
    figures = export_pruned(mask, BackboneConfig(path=str(path)), tmp_path / "small")
    assert figures["padded_channels"] == (24 - 8) + (24 - 16)
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small").eval()
    assert {ffn.channels for ffn in find_ffns(small)} == {24}
    assert (small(TOKENS).logits - masked_logits(path, mask)).abs().max() < 1e-5


@pytest.mark.parametrize("family", ["llama", "phi3", "opt"])
def test_a_compact_checkpoint_has_the_width_of_each_layer(tmp_path, family):
    path = save_tiny(tmp_path / "whole", family, **BIASED.get(family, {}))
    mask = made(path, WIDTHS)
    figures = export_pruned(mask, BackboneConfig(path=str(path)), tmp_path / "small", compact=True)
    assert figures["padded_channels"] == 0
    small = load_backbone(BackboneConfig(path=str(tmp_path / "small"), dtype="float32"), deepspeed=False).model
    assert [ffn.channels for ffn in find_ffns(small)] == list(WIDTHS)
    assert (small(TOKENS).logits - masked_logits(path, mask)).abs().max() < 1e-5


REFUSED = {
    "bitnet": ({"intermediate_size": 64, "num_key_value_heads": 2}, "ffn_sub_norm.weight spans all FFN channels"),
    "bloom": ({"n_layer": 3, "n_head": 4}, "its configuration has none of intermediate_size"),
    "gpt_neox_japanese": ({}, "its configuration has none of intermediate_size"),
}


@pytest.mark.parametrize("family", REFUSED)
def test_what_cannot_be_exported_is_refused_before_anything_is_written(tmp_path, family):
    extra, said = REFUSED[family]
    config = AutoConfig.for_model(family, vocab_size=261, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
                                  pad_token_id=0, bos_token_id=1, eos_token_id=4, **extra)  # fmt: skip
    assert said in export_refusal(config)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "whole")
    tokenizer().save_pretrained(tmp_path / "whole")
    channels = 64 if family == "bitnet" else 128
    keep = torch.zeros(3, channels, dtype=torch.bool)
    keep[:, :24] = True
    mask = Mask(keep, dataclasses.replace(made(save_tiny(tmp_path / "any")).metadata, channels=channels,
                                          backbone_fingerprint=fingerprint(tmp_path / "whole")))  # fmt: skip
    with pytest.raises(BackboneError, match=said) as caught:
        export_pruned(mask, BackboneConfig(path=str(tmp_path / "whole")), tmp_path / "small")
    assert "\n" not in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["any", "whole"]


@pytest.mark.parametrize("family", [*FAMILIES, "falcon", "apertus"])
def test_the_known_families_can_be_exported(family):
    common = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}
    config = AutoConfig.for_model(family, **(FAMILIES.get(family) or common))
    assert export_refusal(config) is None


def test_a_large_logit_difference_is_an_error_and_leaves_nothing(tmp_path, monkeypatch):
    path = save_tiny(tmp_path / "whole")

    def broken(*args, **options):
        model = load_checkpoint(*args, **options)
        find_ffns(model)[0].output.weight.data.zero_()
        return model

    monkeypatch.setattr(export, "load_checkpoint", broken)
    with pytest.raises(MaskError, match=r"logits differ .* by \d+\.\d%.*nothing was written"):
        export_pruned(made(path), BackboneConfig(path=str(path)), tmp_path / "small")
    assert [p.name for p in tmp_path.iterdir()] == ["whole"]


def test_a_mask_of_another_backbone_is_refused_with_both_fingerprints(tmp_path):
    path = save_tiny(tmp_path / "whole")
    mask = made(path)
    other = Mask(mask.keep_LI, dataclasses.replace(mask.metadata, backbone_fingerprint="f" * 64))
    with pytest.raises(MaskError, match=f"ffffffffffffffff.*{fingerprint(path)[:16]}"):
        export_pruned(other, BackboneConfig(path=str(path)), tmp_path / "small")
    assert not (tmp_path / "small").exists()


def test_a_directory_in_use_is_left_alone(tmp_path):
    path = save_tiny(tmp_path / "whole")
    with pytest.raises(MaskError, match="not empty"):
        export_pruned(made(path), BackboneConfig(path=str(path)), path)
