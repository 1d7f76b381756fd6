import pytest
import torch
from tiny_models import FAMILIES, tiny
from transformers import AutoConfig, AutoModelForCausalLM

from persona_pruner.backbone.channels import ChannelMasks, find_ffns
from persona_pruner.errors import BackboneError

TOKENS = torch.arange(5, 17).view(2, 6)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_is_found_in_order(tmp_path, family):
    ffns = find_ffns(tiny(tmp_path, family).model)
    assert [ffn.channels for ffn in ffns] == [64, 64, 64]
    assert [f".{layer}." in ffn.name for layer, ffn in enumerate(ffns)] == [True] * 3


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "opt"])
def test_a_mask_is_the_same_as_zero_columns_of_the_output_projection(tmp_path, family):
    model = tiny(tmp_path, family).model
    mask = (torch.rand(3, 64, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    with ChannelMasks(model) as masks:
        masks.set(mask)
        masked = model(TOKENS).logits
        masks.set(None)
        plain = model(TOKENS).logits
    for ffn, row in zip(find_ffns(model), mask, strict=True):
        ffn.output.weight.data *= row
    assert torch.allclose(masked, model(TOKENS).logits, atol=1e-5)
    assert not torch.allclose(masked, plain, atol=1e-3)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_each_row_can_have_its_own_mask(tmp_path, family):
    model = tiny(tmp_path, family).model
    both = (torch.rand(2, 3, 64) > 0.5).float()
    with ChannelMasks(model) as masks:
        masks.set(both)
        together = model(TOKENS).logits
        for row in range(2):
            masks.set(both[row])
            assert torch.allclose(together[row], model(TOKENS[row : row + 1]).logits[0], atol=1e-5)


def test_leaving_takes_the_hooks_away(tmp_path):
    model = tiny(tmp_path).model
    plain = model(TOKENS).logits
    with ChannelMasks(model) as masks:
        masks.set(torch.zeros(3, 64))
    assert torch.equal(model(TOKENS).logits, plain)


@pytest.mark.parametrize("family", ["mixtral", "mamba"])
def test_an_unknown_architecture_is_named_with_what_was_looked_for(family):
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2} if family == "mixtral" else {}
    config = AutoConfig.for_model(
        family, vocab_size=32, hidden_size=16, num_hidden_layers=2, intermediate_size=32, **heads
    )
    with (
        torch.device("meta"),
        pytest.raises(BackboneError, match=rf"(?i){family}.*2 layers.*gate_proj/up_proj \+ down_proj"),
    ):
        find_ffns(AutoModelForCausalLM.from_config(config))
