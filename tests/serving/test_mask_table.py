import numpy as np
import pytest
import torch

from persona_pruner.errors import MaskError
from persona_pruner.serving.channel_op import mask_channels
from persona_pruner.serving.mask_table import MaskLayout, MaskTable, RequestMask

LAYERS, CHANNELS = 3, 48


def make_mask(seed, channels=CHANNELS):
    keep_LI = np.random.default_rng(seed).random((LAYERS, channels)) < 0.5
    return keep_LI, RequestMask.of(np.packbits(keep_LI, axis=1, bitorder="little").tobytes())


def make_table(channels=CHANNELS, layers=range(LAYERS), **sizes):
    return MaskTable(MaskLayout(layers=tuple(layers), total_layers=LAYERS, channels=channels, **sizes))


def kept_by_token(table, layer, tokens):
    """As the operator gives it from packed bits; unpacked masks of a small step must say the same."""
    hidden_TI = torch.ones(tokens, table.factors_LTI.shape[2])
    ready_TI = hidden_TI.clone()
    mask_channels(hidden_TI, table.bits_LSN[layer], table.slot_T[:tokens])
    mask_channels(ready_TI, table.bits_LSN[layer], table.slot_T[:tokens], table.factors_LTI[layer])
    assert torch.equal(hidden_TI, ready_TI)
    return hidden_TI.numpy()


def test_tokens_of_a_step_use_the_mask_of_their_request_and_padding_none():
    table = make_table(slots=4, tokens=12)
    (keep_a, a), (keep_b, b) = make_mask(1), make_mask(2)
    table.assign([a, None, b, a], np.array([0, 3, 4, 6, 9]))
    for layer in range(LAYERS):
        rows = kept_by_token(table, layer, 12)
        assert (rows[[0, 1, 2, 6, 7, 8]] == keep_a[layer]).all()
        assert (rows[[4, 5]] == keep_b[layer]).all()
        assert (rows[[3, 9, 10, 11]] == 1).all()


def test_the_mask_that_was_not_used_for_the_longest_time_leaves_and_comes_back_whole():
    table = make_table(slots=2, tokens=4)
    masks = [make_mask(seed) for seed in range(5)]
    for _ in range(3):
        for keep_LI, mask in masks:
            table.assign([mask, None], np.array([0, 2, 3]))
            assert (kept_by_token(table, 1, 2) == keep_LI[1]).all()
    assert table.stats() | {"bytes": 0} == {"slots": 2, "slots_used": 2, "bytes": 0, "loads": 15, "evictions": 13}


def test_a_step_never_loses_a_mask_that_it_uses_itself():
    table = make_table(slots=3, tokens=3)
    masks = [make_mask(seed) for seed in range(6)]
    for first in range(4):
        step = masks[first : first + 3]
        table.assign([mask for _, mask in step], np.arange(4))
        for row, (keep_LI, _) in zip(kept_by_token(table, 2, 3), step, strict=True):
            assert (row == keep_LI[2]).all()


def test_steps_too_large_to_be_unpacked_at_once_leave_no_trace_in_the_small_ones_after():
    table = make_table(slots=4, tokens=200)
    (keep_a, a), (keep_b, b) = make_mask(1), make_mask(2)
    for starts in ([0, 2, 3], [0, 150, 200], [0, 2, 3], [0, 1, 3]):
        table.assign([a, b], np.array(starts))
        rows = kept_by_token(table, 1, starts[-1])
        assert (rows[: starts[1]] == keep_a[1]).all()
        assert (rows[starts[1] :] == keep_b[1]).all()


@pytest.mark.parametrize("channels", [48, 40])
def test_every_rank_of_a_tensor_parallel_engine_holds_its_own_columns(channels):
    keep_LI, mask = make_mask(3, channels)
    tables = [make_table(channels, slots=1, tokens=1, rank=rank, ranks=2) for rank in range(2)]
    for table in tables:
        table.assign([mask], np.array([0, 1]))
    halves = [kept_by_token(table, 0, 1)[0][: channels // 2] for table in tables]
    assert (np.concatenate(halves) == keep_LI[0]).all()


def test_a_pipeline_stage_holds_its_own_layers():
    keep_LI, mask = make_mask(4)
    table = make_table(layers=[2], slots=1, tokens=1)
    table.assign([mask], np.array([0, 1]))
    assert (kept_by_token(table, 0, 1)[0] == keep_LI[2]).all()


def test_bits_that_are_not_whole_or_not_of_this_backbone_are_refused():
    _, mask = make_mask(5)
    mask.check(LAYERS, CHANNELS)
    for wrong in (RequestMask(mask.digest, "!"), RequestMask(mask.digest, mask.bits[:-4]), RequestMask("0", mask.bits)):
        with pytest.raises(MaskError, match="persona_bits"):
            wrong.check(LAYERS, CHANNELS)
    with pytest.raises(MaskError, match="4 layers of 48 channels"):
        mask.check(LAYERS + 1, CHANNELS)


def test_extra_arguments_carry_a_mask_and_nothing_else_looks_like_one():
    _, mask = make_mask(6)
    assert RequestMask.find(mask.extra_args()) == mask
    assert RequestMask.find(None) is None
    assert RequestMask.find({"other": 1}) is None
