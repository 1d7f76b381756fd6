import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from persona_pruner.backbone.channels import find_ffns
from persona_pruner.backbone.compact import load_checkpoint
from persona_pruner.backbone.load import World, load_backbone
from persona_pruner.config.schema import BackboneConfig
from persona_pruner.errors import BackboneError

TOKENS = torch.arange(7, 27)[None]
WIDTHS = [8, 64, 16]


@pytest.fixture
def cut(tmp_path):
    """A checkpoint cut by hand: the first channels of each layer."""
    path = save_tiny(tmp_path)
    weights = load_file(path / "model.safetensors")
    for layer, width in enumerate(WIDTHS):
        mlp = f"model.layers.{layer}.mlp"
        for name in ("gate_proj", "up_proj"):
            weights[f"{mlp}.{name}.weight"] = weights[f"{mlp}.{name}.weight"][:width].contiguous()
        weights[f"{mlp}.down_proj.weight"] = weights[f"{mlp}.down_proj.weight"][:, :width].contiguous()
    whole = AutoModelForCausalLM.from_pretrained(path).eval()
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"ffn_widths": WIDTHS}))
    return path, whole


def test_loading_shows_no_bar_and_leaves_those_of_downloads_as_they_were(cut, capfd):
    shown = transformers_logging.is_progress_bar_enabled()
    load_checkpoint(cut[0])
    assert "Loading weights" not in capfd.readouterr().err
    assert transformers_logging.is_progress_bar_enabled() == shown


def test_each_layer_has_the_width_and_the_weights_of_the_files(cut):
    path, whole = cut
    model = load_checkpoint(path).eval()
    assert [ffn.channels for ffn in find_ffns(model)] == WIDTHS
    for ffn, width in zip(find_ffns(whole), WIDTHS, strict=True):
        ffn.output.weight.data[:, width:] = 0
    assert torch.allclose(model(TOKENS).logits, whole(TOKENS).logits, atol=1e-5)


def test_a_checkpoint_without_widths_is_loaded_as_ever(tmp_path):
    path = save_tiny(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(path).eval()
    assert torch.equal(load_checkpoint(path).eval()(TOKENS).logits, plain(TOKENS).logits)


def test_compact_checkpoints_are_not_sharded(cut):
    with pytest.raises(BackboneError, match=r"ffn_widths.*one process"):
        load_backbone(BackboneConfig(path=str(cut[0])), World(size=2, address="127.0.0.1:1"))
