import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from persona_pruner.learning.batches import TrainingExample, plan_micro_batches
from persona_pruner.learning.encoding import EncodedRow, batch


def made(lengths):
    return [
        TrainingExample(
            0, ("p", n), EncodedRow(tuple(range(100 * n + 1, 100 * n + 1 + length)), max(length // 2, 1)), 0.1
        )
        for n, length in enumerate(lengths)
    ]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(2, 40), min_size=1, max_size=12), st.integers(1, 3), st.integers(20, 200))
def test_every_row_runs_once_and_all_ranks_run_the_same_sequence(lengths, ranks, limit):
    items = made(lengths)
    plans = [
        plan_micro_batches(items, None, rank=r, ranks=ranks, micro_batch_tokens=limit, logits_chunk=16)
        for r in range(ranks)
    ]
    counted = [item.key for plan in plans for part in plan for item in part.items if item.weight]
    assert sorted(counted) == [item.key for item in items]
    assert len({tuple((len(part.items), part.chunks) for part in plan) for plan in plans}) == 1
    for plan in plans:
        for part in plan:
            assert part.tokens_BT.numel() <= limit or len(part.items) == 1
            flat = part.tokens_BT.flatten()
            assert (flat[part.positions_N + 1] == part.targets_N).all()
            assert -(-len(part.targets_N) // part.chunks) <= 16


def test_rows_of_like_length_run_together():
    passes = plan_micro_batches(made([30, 4, 29, 5]), None, overhead=8)
    assert [sorted(len(item.row.tokens) for item in part.items) for part in passes] == [[29, 30], [4, 5]]


def test_a_prefix_that_is_not_shared_stands_before_the_row():
    (part,) = plan_micro_batches(made([6]), [[7, 8, 9]])
    assert part.tokens_BT.tolist() == [[7, 8, 9, 1, 2, 3, 4, 5, 6]]
    assert part.targets_N.tolist() == [4, 5, 6]


@pytest.mark.parametrize(("rows", "size"), [(10, 4), (3, 16), (7, 7)])
def test_an_epoch_sees_every_row_once_in_an_order_of_its_own(rows, size):
    steps = [batch(rows, size, step, 0, "data") for step in range(20)]
    flat = [n for step in steps for n in step]
    epochs = [flat[start : start + rows] for start in range(0, len(flat) - rows + 1, rows)]
    assert all(sorted(epoch) == list(range(rows)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert steps[5] == batch(rows, size, 5, 0, "data")
    assert [batch(rows, size, s, 1, "data") for s in range(20)] != steps
