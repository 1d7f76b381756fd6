"""Means over personas with their intervals, and the headline: how much of what a baseline loses the own mask keeps.

Figures of one persona are averaged first, so that resampling personas is a bootstrap clustered by persona.
"""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np

RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """`low` and `high` bound the 95% percentile interval; None where fewer than two personas were measured."""

    value: float
    low: float | None
    high: float | None
    personas: int


@dataclass(frozen=True)
class Headline:
    share: Estimate
    """Of the drop of the strongest baseline that the own mask removes: 1 - (unpruned - own) / (unpruned - baseline)
    for scores, with the signs turned for losses."""
    baseline: str


def mean(values: Iterable[float | None]) -> float | None:
    """Of what was measured; None where nothing was."""
    measured = [value for value in values if value is not None]
    return fmean(measured) if measured else None


class RunningMeans:
    """Means of what was measured, by any key; single figures are not kept."""

    def __init__(self) -> None:
        self._sums: dict[Any, tuple[float, int]] = {}

    def add(self, key: Any, value: float | None) -> None:
        total, count = self._sums.get(key, (0.0, 0))
        self._sums[key] = (total, count) if value is None else (total + value, count + 1)

    def __getitem__(self, key: Any) -> float | None:
        total, count = self._sums.get(key, (0.0, 0))
        return total / count if count else None

    def count(self, key: Any) -> int:
        return self._sums.get(key, (0.0, 0))[1]


def mean_estimate(values: Sequence[float]) -> Estimate:
    """Mean of one figure per persona. Raises ValueError without any."""
    array = np.asarray(values, dtype=float)
    return _estimate((array,), lambda sample, axis=-1: sample.mean(axis))


def headline(
    rows: Sequence[Mapping[str, float]], baselines: Sequence[str], *, higher_is_better: bool
) -> Headline | None:
    """`rows`: one figure per persona for "unpruned", "own" and baselines.

    The strongest baseline is the one with the smallest mean drop. None where nobody has all of them, or where it is
    not certain that this baseline loses anything: the interval of its drop holds 0, or it loses nothing in a
    resample, so that the share has no interval.
    """
    names = [name for name in baselines if rows and all(name in row for row in rows)]
    if not names or any("unpruned" not in row or "own" not in row for row in rows):
        return None
    columns = {name: np.array([row[name] for row in rows]) for name in ("unpruned", "own", *names)}
    sign = 1 if higher_is_better else -1
    drops = {name: sign * (columns["unpruned"] - columns[name]) for name in names}
    strongest = min(drops, key=lambda name: float(drops[name].mean()))
    drop = mean_estimate(list(drops[strongest]))
    if (drop.value if drop.low is None else drop.low) <= 0:
        return None

    def share(unpruned: np.ndarray, own: np.ndarray, baseline: np.ndarray, axis: int = -1) -> np.ndarray:
        whole = unpruned.mean(axis) - baseline.mean(axis)
        return 1 - (unpruned.mean(axis) - own.mean(axis)) / np.where(whole == 0, np.nan, whole)

    kept = _estimate((columns["unpruned"], columns["own"], columns[strongest]), share)
    return None if kept.low is None and kept.personas > 1 else Headline(kept, strongest)


def _estimate(columns: tuple[np.ndarray, ...], statistic: object) -> Estimate:
    from scipy.stats import DegenerateDataWarning, bootstrap

    value = float(statistic(*columns))  # type: ignore[operator]
    count = len(columns[0])
    if count < 2:
        return Estimate(value, None, None, count)
    with warnings.catch_warnings():
        # Of a share that a resample has no value for; there is no interval then, which is what is returned.
        warnings.simplefilter("ignore", DegenerateDataWarning)
        interval = bootstrap(
            columns, statistic, paired=True, vectorized=True, n_resamples=RESAMPLES, method="percentile", rng=0
        ).confidence_interval
    low, high = float(interval.low), float(interval.high)
    return Estimate(value, low, high, count) if np.isfinite([low, high]).all() else Estimate(value, None, None, count)
