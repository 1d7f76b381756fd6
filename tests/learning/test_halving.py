import pytest
import torch

from persona_pruner.config.schema import HalvingConfig, LearningConfig
from persona_pruner.learning.halving import better_half, candidate_settings, is_rung
from persona_pruner.learning.mask_candidate import MaskCandidate


def candidate(ratio, heldout):
    made = MaskCandidate(LearningConfig(), "ada", torch.zeros(1, 8), 8, ratio, 0.1)
    made.heldout = heldout
    return made


def test_the_grid_is_the_product_and_one_candidate_where_halving_is_off():
    (alone,) = candidate_settings(LearningConfig(ratio=0.25, init="zeros"))
    assert (alone.ratio, alone.learning_rate, alone.init) == (0.25, LearningConfig().learning_rate, "zeros")
    grid = LearningConfig(halving=HalvingConfig(learning_rates=(0.1, 0.2), inits=("zeros", "activation")))
    assert [(c.learning_rate, c.init) for c in candidate_settings(grid)] == [
        (0.1, "zeros"), (0.1, "activation"), (0.2, "zeros"), (0.2, "activation"),
    ]  # fmt: skip
    assert candidate_settings(LearningConfig(ratio="auto", ratio_ladder=(0.5, 0.25)))[0].ratio == 0.25


def test_rungs_double():
    config = LearningConfig(halving=HalvingConfig(rung_steps=4))
    assert [step for step in range(1, 40) if is_rung(config, step, 2)] == [4, 12, 28]
    assert not is_rung(config, 4, 1)


@pytest.mark.parametrize(
    ("unpruned", "best"),
    [(None, [0.5, 0.25]), (1.0, [0.5, 0.75])],
)
def test_within_the_tolerance_the_larger_ratio_wins_else_the_lower_loss(unpruned, best):
    candidates = [candidate(0.25, 1.02), candidate(0.5, 1.0), candidate(0.75, 1.04), candidate(0.875, 2.0)]
    assert sorted(c.ratio for c in better_half(candidates, unpruned, 0.05)) == sorted(best)
    assert len(better_half(candidates, unpruned, 0.05, keep=1)) == 1
