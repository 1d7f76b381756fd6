from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from persona_pruner.config.schema import ObjectiveConfig
from persona_pruner.learning.batches import MicroBatchConfig, TrainingExample, plan_micro_batches
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
    examples = made(lengths)
    config = MicroBatchConfig(ObjectiveConfig(logits_chunk=16), micro_batch_tokens=limit)
    plans = [plan_micro_batches(examples, None, config, rank=r, ranks=ranks) for r in range(ranks)]
    counted = [
        example.key for plan in plans for micro_batch in plan for example in micro_batch.examples if example.weight
    ]
    assert sorted(counted) == [example.key for example in examples]
    assert len({tuple((len(micro_batch.examples), micro_batch.chunks) for micro_batch in plan) for plan in plans}) == 1
    for plan in plans:
        for micro_batch in plan:
            assert micro_batch.tokens_BT.numel() <= limit or len(micro_batch.examples) == 1
            flat = micro_batch.tokens_BT.flatten()
            assert (flat[micro_batch.positions_N + 1] == micro_batch.targets_N).all()
            assert -(-len(micro_batch.targets_N) // micro_batch.chunks) <= 16


def test_rows_of_like_length_run_together():
    micro_batches = plan_micro_batches(made([30, 4, 29, 5]), None, MicroBatchConfig(ObjectiveConfig(), overhead=8))
    assert [sorted(len(example.row.tokens) for example in micro_batch.examples) for micro_batch in micro_batches] == [
        [29, 30],
        [4, 5],
    ]


def test_a_prefix_that_is_not_shared_stands_before_the_row():
    (micro_batch,) = plan_micro_batches(made([6]), [[7, 8, 9]], MicroBatchConfig(ObjectiveConfig()))
    assert micro_batch.tokens_BT.tolist() == [[7, 8, 9, 1, 2, 3, 4, 5, 6]]
    assert micro_batch.targets_N.tolist() == [4, 5, 6]


@pytest.mark.parametrize(("rows", "size"), [(10, 4), (3, 16), (7, 7)])
def test_an_epoch_sees_every_row_once_in_an_order_of_its_own(rows, size):
    steps = [batch(rows, size, step, 0, "data") for step in range(20)]
    flat = [n for step in steps for n in step]
    epochs = [flat[start : start + rows] for start in range(0, len(flat) - rows + 1, rows)]
    assert all(sorted(epoch) == list(range(rows)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert steps[5] == batch(rows, size, 5, 0, "data")
    assert [batch(rows, size, s, 1, "data") for s in range(20)] != steps


def test_each_token_has_its_own_weight_and_fillers_have_none():
    examples = [replace(example, token_weights=(0.5, 2.0)) for example in made([4])]
    for rank, expected in enumerate(([0.05, 0.2], [0.0, 0.0])):
        (micro_batch,) = plan_micro_batches(examples, None, MicroBatchConfig(ObjectiveConfig()), rank=rank, ranks=2)
        assert micro_batch.weight_N.tolist() == pytest.approx(expected)
