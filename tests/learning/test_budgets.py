import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from persona_pruner.learning.budgets import free_widths, kept_channels, rounded_widths


@pytest.mark.parametrize(
    ("channels", "ratio", "multiple", "kept"),
    [(1024, 0.5, 64, 512), (8192, 0.25, 64, 6144), (768, 0.7, 64, 256), (100, 0.99, 64, 64), (40, 0.5, 64, 40),
     (1000, 0.1, 64, 896)],
)  # fmt: skip
def test_kept_channels_are_rounded_to_the_multiple(channels, ratio, multiple, kept):
    assert kept_channels(channels, ratio, multiple) == kept


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 1000), st.integers(3, 48), st.integers(0, 6))
def test_free_widths_are_those_of_one_top_k_over_all_layers(seed, total, floor):
    scores = torch.randint(0, 9, (3, 16), generator=torch.Generator().manual_seed(seed)).float()
    widths = free_widths(scores, total, floor)
    floor = min(floor, total // 3)
    kept = {(layer, i) for layer in range(3)
            for i in sorted(range(16), key=lambda i: (-scores[layer, i], i))[:floor]}  # fmt: skip
    rest = sorted({(layer, i) for layer in range(3) for i in range(16)} - kept, key=lambda at: (-scores[at], at))
    kept |= set(rest[: total - len(kept)])
    assert widths.tolist() == [sum(at[0] == layer for at in kept) for layer in range(3)]
    assert int(widths.sum()) == total


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 96), min_size=2, max_size=6))
def test_rounded_widths_are_multiples_that_keep_the_total(widths):
    rounded = rounded_widths(torch.tensor(widths), 96, 16)
    assert all(width % 16 == 0 and 16 <= width <= 96 for width in rounded.tolist())
    wanted = max(round(sum(widths) / 16), len(widths)) * 16
    assert int(rounded.sum()) == wanted
    if min(widths) >= 16:
        assert (rounded - torch.tensor(widths)).abs().max() <= 16


def test_layers_narrower_than_the_multiple_are_kept_whole():
    assert rounded_widths(torch.tensor([20, 30]), 40, 64).tolist() == [40, 40]
