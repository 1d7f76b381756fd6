import pytest
import torch
from tiny_models import save_tiny
from transformers import AutoModelForCausalLM

from persona_pruner.backbone.channels import ChannelMasks
from persona_pruner.backbone.load import load_backbone
from persona_pruner.config.schema import BackboneConfig
from persona_pruner.learning.shared_recovery import save_recovered
from persona_pruner.learning.weight_updates import Gains, LowRank


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3", "gpt_neox"])
def test_folded_weights_compute_what_gains_and_update_do(tmp_path, family):
    path = save_tiny(tmp_path / family, family)
    backbone = load_backbone(BackboneConfig(path=str(path)), deepspeed=False)
    gains, low_rank, tokens = Gains(backbone.model), LowRank(backbone.model, 3, 0), torch.arange(20)[None]
    torch.manual_seed(1)
    with torch.no_grad():
        for gain in (gains.channels_LI, *gains.outputs):
            gain.copy_(1 + 0.2 * torch.randn(gain.shape))
        for _, up_DR in low_rank.factors:
            up_DR.copy_(0.05 * torch.randn(up_DR.shape))
        with low_rank.applied(), gains.applied(), ChannelMasks(backbone.model) as masks:
            masks.set(gains.channels_LI)
            expected = backbone.model(tokens).logits
        low_rank.fold()
        gains.fold()
        save_recovered(backbone, tmp_path / "mended")
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "mended")
        assert torch.allclose(plain(tokens).logits, expected, atol=1e-3)
        assert not torch.allclose(AutoModelForCausalLM.from_pretrained(path)(tokens).logits, expected, atol=1e-2)
