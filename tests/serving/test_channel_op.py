import numpy as np
import pytest
import torch

from persona_pruner.serving.channel_op import mask_channels, mask_channels_reference


def bits(keep_SI):
    return torch.from_numpy(np.packbits(keep_SI.numpy(), axis=1, bitorder="little"))


@pytest.mark.parametrize("tokens", [1, 7, 17, 200])
@pytest.mark.parametrize("channels", [64, 61])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_token_gets_the_channels_of_its_slot(channels, dtype, tokens):
    generator = torch.Generator().manual_seed(0)
    keep_SI = torch.rand(5, channels, generator=generator) < 0.5
    hidden_TI = torch.randn(tokens, channels, generator=generator).to(dtype)
    slot_T = torch.randint(1, 5, (tokens,), generator=generator, dtype=torch.int32)
    expected = torch.stack([row * keep_SI[slot] for row, slot in zip(hidden_TI, slot_T, strict=True)])
    assert torch.equal(mask_channels_reference(hidden_TI, bits(keep_SI), slot_T), expected)
    mask_channels(hidden_TI, bits(keep_SI), slot_T)
    assert torch.equal(hidden_TI, expected)


def test_compiled_code_gives_the_same_for_every_number_of_tokens():
    keep_SI = torch.rand(3, 40) < 0.5
    keep_SI[0] = True  # slot 0 keeps every channel

    @torch.compile(dynamic=True, fullgraph=True, backend="aot_eager")
    def ffn(hidden_TI, bits_SN, slot_T):
        hidden_TI = hidden_TI * 2
        mask_channels(hidden_TI, bits_SN, slot_T)
        return hidden_TI + 1

    for tokens in (1, 7, 30):
        hidden_TI, slot_T = torch.randn(tokens, 40), torch.randint(0, 3, (tokens,), dtype=torch.int32)
        expected = mask_channels_reference(hidden_TI * 2, bits(keep_SI), slot_T) + 1
        assert torch.equal(ffn(hidden_TI, bits(keep_SI), slot_T), expected)
