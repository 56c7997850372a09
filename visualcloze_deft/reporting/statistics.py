"""Figures with their count and interval, differences of pairs, and whether one is chance."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from visualcloze_deft.errors import UserError

Floats = NDArray[np.float64]
CONFIDENCE = 0.95
DRAWS = 2000  # samples of a bootstrap: the ends of an interval to about a hundredth of its width
AT_ONCE = 1_000_000  # numbers drawn together
FLIPS = 10_000  # of a random test: a p of 0.05 to within 0.004


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A mean of `count` values, and where it lies with 95 % confidence.

    low, high: NaN where there is one value, or one group of values, and so no telling.

    >>> print(Figure(mean=0.83, low=0.8, high=0.862, count=64))
    0.83 (0.80 to 0.86, n 64)
    >>> print(Figure(mean=12.5, low=math.nan, high=math.nan, count=1))
    12.50 (n 1)
    """

    mean: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        if math.isnan(self.low):
            return f"{self.mean:.2f} (n {self.count})"
        return f"{self.mean:.2f} ({self.low:.2f} to {self.high:.2f}, n {self.count})"

    def record(self) -> dict[str, float | int | None]:
        """For JSON, which has no NaN: None instead."""
        ends = {"low": self.low, "high": self.high}
        return {
            "mean": self.mean,
            **{name: None if math.isnan(end) else end for name, end in ends.items()},
            "count": self.count,
        }


def mean_ci(
    values: Sequence[float] | Floats, groups: Sequence[Hashable] | None = None, *, seed: int = 0
) -> Figure:
    """The mean of `values` with its percentile bootstrap interval (Efron 1979).

    groups: what each value belongs to (a subject, a scene), where values of one are alike: whole
    groups are drawn then, as an interval over their images alone would be too narrow.
    """
    sums, counts = _totals(values, groups)
    mean = float(sums.sum() / counts.sum())
    if len(sums) == 1:
        return Figure(mean=mean, low=math.nan, high=math.nan, count=int(counts.sum()))
    low, high = stats.bootstrap(
        (sums, counts),
        lambda s, c, axis: s.sum(axis) / c.sum(axis),
        paired=True,
        vectorized=True,
        n_resamples=DRAWS,
        batch=max(AT_ONCE // len(sums), 1),
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Figure(mean=mean, low=float(low), high=float(high), count=int(counts.sum()))


def difference(
    after: Sequence[float] | Floats,
    before: Sequence[float] | Floats,
    groups: Sequence[Hashable] | None = None,
    *,
    seed: int = 0,
) -> Figure:
    """`mean_ci` of `after` minus `before`, value by value: of the same item, seed and prompt."""
    return mean_ci(_paired(after, before), groups, seed=seed)


def sign_flip_p(
    after: Sequence[float] | Floats,
    before: Sequence[float] | Floats,
    groups: Sequence[Hashable] | None = None,
    *,
    seed: int = 0,
) -> float:
    """The probability (0..1) of a mean difference at least as far from 0, were the two alike.

    Two-sided permutation test of paired values: the sign of each difference (of all in a group
    together) is open if nothing distinguishes the two (Fisher 1935). All signs are tried where
    there are at most `FLIPS` ways, of 13 differences, else so many random ones, the found one among
    them (Phipson and Smyth 2010, eq. 2), so that p is never 0. Few differences cannot be
    significant: n of them reach 2^(1-n) at least.
    """
    sums, _ = _totals(_paired(after, before), groups)
    if len(sums) == 1:  # either sign is as far from 0
        return 1.0
    found = stats.permutation_test(
        (sums, np.zeros_like(sums)),
        lambda after, before, axis: (after - before).sum(axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=FLIPS,
        batch=max(AT_ONCE // len(sums), 1),
        rng=np.random.default_rng(seed),
    )
    return float(found.pvalue)


def _paired(after: Sequence[float] | Floats, before: Sequence[float] | Floats) -> Floats:
    if len(after) != len(before):
        raise UserError(f"{len(after)} values against {len(before)}: they must come in pairs")
    return np.asarray(after, float) - np.asarray(before, float)


def _totals(
    values: Sequence[float] | Floats, groups: Sequence[Hashable] | None
) -> tuple[Floats, Floats]:
    """Sum and number of the values of each group; without groups each is one of its own."""
    found = np.asarray(values, float)
    if not len(found):
        raise UserError("no values to average: nothing was scored")
    if not np.isfinite(found).all():
        raise UserError(f"value {int(np.argmin(np.isfinite(found)))} of {len(found)} is no number")
    if groups is None:
        return found, np.ones(len(found))
    if len(groups) != len(found):
        raise UserError(f"{len(found)} values, but groups for {len(groups)}")
    numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    index = np.array([numbers[group] for group in groups])
    sums: Floats = np.bincount(index, weights=found).astype(float)
    return sums, np.bincount(index).astype(float)
