import warnings

import numpy as np
import pytest

from persona_pruner.evaluation.statistics import headline, mean_estimate


def test_a_mean_has_the_interval_of_resampled_personas():
    values = np.random.default_rng(1).normal(5, 2, 400)
    one = mean_estimate(values)
    assert one.value == pytest.approx(values.mean())
    standard_error = values.std() / 20
    assert one.low == pytest.approx(values.mean() - 1.96 * standard_error, abs=0.3 * standard_error)
    assert one.high == pytest.approx(values.mean() + 1.96 * standard_error, abs=0.3 * standard_error)
    assert mean_estimate(values) == one


def test_one_persona_has_no_interval():
    assert (mean_estimate([3.0]).low, mean_estimate([3.0]).personas) == (None, 1)


def test_the_headline_is_the_share_of_the_strongest_baselines_drop_that_the_own_mask_removes():
    """Scores: 90 unpruned, 70 and 50 under two baselines, 85 own: 15 of the 20 points that the stronger one lost."""
    rows = [{"unpruned": 90 + d, "own": 85 + d, "global": 70 + d, "random": 50 + d} for d in (-2.0, 0.0, 2.0)]
    found = headline(rows, ("random", "global"), higher_is_better=True)
    assert found.baseline == "global"
    assert found.share.value == found.share.low == found.share.high == pytest.approx(0.75)
    losses = [{name: -value for name, value in row.items()} for row in rows]
    assert headline(losses, ("random", "global"), higher_is_better=False).share.value == pytest.approx(0.75)


def test_pairs_are_resampled_together():
    """Personas differ a hundred times more than their masks do."""
    spread = np.linspace(0, 100, 30)
    rows = [{"unpruned": x, "own": x - 0.1, "global": x - 1.0} for x in spread]
    share = headline(rows, ("global",), higher_is_better=True).share
    assert share.low == pytest.approx(0.9)
    assert share.high == pytest.approx(0.9)


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [{"unpruned": 1.0, "own": 1.0, "global": 1.0}],
        [{"unpruned": 1.0, "own": 0.5}],
        [{"unpruned": 1.0, "own": 0.5, "global": 1.0 + drop} for drop in (-0.2, 0.3, -0.3, 0.1)],
    ],
)
def test_there_is_no_headline_without_the_arms_or_where_the_baseline_may_have_lost_nothing(rows):
    assert headline(rows, ("global",), higher_is_better=True) is None


def test_there_is_no_headline_where_its_share_has_no_interval():
    # In one of 256 resamples the baseline loses nothing; its drop is certain, but no share of it.
    rows = [{"unpruned": 1.0, "own": 0.5, "global": float(number < 4)} for number in range(8)]
    assert mean_estimate([row["unpruned"] - row["global"] for row in rows]).low > 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert headline(rows, ("global",), higher_is_better=True) is None
