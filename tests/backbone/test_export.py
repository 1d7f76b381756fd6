import dataclasses

import pytest
import torch
from tiny_models import FAMILIES, save_tiny
from transformers import AutoModelForCausalLM

from persona_pruner.backbone.channels import ChannelMasks
from persona_pruner.backbone.export import export_pruned
from persona_pruner.backbone.files import fingerprint
from persona_pruner.config.schema import BackboneConfig
from persona_pruner.errors import MaskError
from persona_pruner.masks.format import Mask, MaskMetadata

BIASED = {"llama": {"mlp_bias": True}}


def made(path):
    scores = torch.rand(3, 64, generator=torch.Generator().manual_seed(0))
    keep = torch.zeros(3, 64, dtype=torch.bool).scatter_(1, scores.topk(24).indices, True)
    return Mask(
        keep,
        MaskMetadata(
            persona_id="ann", persona_sha256="", backbone="tiny", backbone_fingerprint=fingerprint(path), layers=3,
            channels=64, kept=24, method="ste", ratio=0.6, seed=0, steps=1,
        ),
    )  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_the_exported_model_is_smaller_and_gives_the_masked_logits(tmp_path, family):
    path = save_tiny(tmp_path / "whole", family, **BIASED.get(family, {}))
    mask = made(path)
    figures = export_pruned(mask, BackboneConfig(path=str(path)), tmp_path / "small")
    tokens = torch.arange(7, 27)[None]
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small").eval()
    assert getattr(small.config, "ffn_dim", None) == 24 or small.config.intermediate_size == 24
    whole = AutoModelForCausalLM.from_pretrained(path).eval()
    with ChannelMasks(whole) as masks:
        masks.set(mask.keep_LI.float())
        wanted = whole(tokens).logits
    assert (small(tokens).logits - wanted).abs().max() < 1e-5
    assert figures["logit_difference"] < 1e-5
    assert figures["parameters_after"] < figures["parameters_before"]
    assert figures["bytes_after"] < figures["bytes_before"]
    assert (tmp_path / "small" / "tokenizer.json").exists()


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
