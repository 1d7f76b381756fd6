import pytest
import torch
from tiny_models import save_tiny

from persona_pruner.backbone.forward import BackboneRunner
from persona_pruner.backbone.load import load_backbone
from persona_pruner.config.schema import BackboneConfig
from persona_pruner.errors import BackboneError


def hidden_states(path, attention):
    """Rows behind two prefixes of different lengths, and the gradient of their sum for a mask."""
    backbone = load_backbone(BackboneConfig(path=str(path), attention=attention), deepspeed=False)
    rows = torch.arange(5, 29).view(3, 8)
    with BackboneRunner(backbone) as runner:
        mask = torch.ones(runner.masks.layers, runner.masks.channels, requires_grad=True)
        runner.masks.set(mask)
        prefix = runner.prefix([[1, 7, 9, 11], [1, 8]])
        out = runner.hidden(rows, prefix, torch.tensor([0, 1, 1]))
        out.square().sum().backward()
    return out, mask.grad


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "opt"])
def test_grouped_attention_is_the_attention_of_transformers(tmp_path, family):
    save_tiny(tmp_path, family)
    for ours, theirs in zip(hidden_states(tmp_path, "grouped"), hidden_states(tmp_path, "eager"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_model_with_capped_logits_is_refused(tmp_path):
    save_tiny(tmp_path, "gemma2")
    backbone = load_backbone(BackboneConfig(path=str(tmp_path), attention="grouped"), deepspeed=False)
    with pytest.raises(BackboneError, match="eager"):
        backbone.model(torch.arange(6)[None])
