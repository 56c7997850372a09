"""Means over seeds and grids with intervals, and pairs of methods told apart.

Values are paired: grid g of seed s is the same grid, and the same training examples, for every
method. Axes: s seeds, g grids.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

LEVEL = 0.95

Values = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over seeds and grids. low, high: its 95 % interval. p: two-sided, of a mean of 0.

    agree: of how many seeds the mean has the sign of the whole.
    """

    mean: float
    low: float
    high: float
    p: float
    seeds: int
    grids: int
    agree: int

    @property
    def count(self) -> int:
        return self.seeds * self.grids


def estimate(values: Values) -> Estimate:
    """The mean of `values` (s g) and its interval, for other seeds and other grids of the kind.

    All seeds are asked the same grids, so values vary by seed, by grid and by both: the variance of
    the mean is that of the seeds' means over s, plus that of the grids' means over g, less what
    both contain (two-way random effects, Searle 1971, ch. 9), with Student's t of Satterthwaite's
    degrees of freedom (1946). With few seeds that differ these are few, and the interval is wide;
    resampling three seeds would be far too sure. With one seed the interval is of grids alone.
    """
    seeds, grids = values.shape
    mean = float(values.mean())
    told = {"seeds": seeds, "grids": grids}
    if not np.isfinite(values).all():  # of a training that went astray
        return Estimate(mean=math.nan, low=math.nan, high=math.nan, p=1.0, agree=0, **told)
    agree = int((np.sign(values.mean(axis=1)) == np.sign(mean)).sum())
    error, freedom = _error(values)
    if not error:
        return Estimate(mean=mean, low=mean, high=mean, p=float(mean == 0), agree=agree, **told)
    reach = float(stats.t.ppf((1 + LEVEL) / 2, freedom)) * error
    p = 2 * float(stats.t.sf(abs(mean) / error, freedom))
    return Estimate(mean=mean, low=mean - reach, high=mean + reach, p=p, agree=agree, **told)


def _error(values: Values) -> tuple[float, float]:
    """The standard error of the mean, and its degrees of freedom."""
    seeds, grids = values.shape
    of_seeds, of_grids = values.mean(axis=1), values.mean(axis=0)
    rest = values - of_seeds[:, None] - of_grids + values.mean()
    parts = [(of_grids.var(ddof=1) / grids, grids - 1)]
    if seeds > 1:
        parts.append((of_seeds.var(ddof=1) / seeds, seeds - 1))
        alone = (seeds - 1) * (grids - 1)
        parts.append((-float((rest**2).sum()) / alone / (seeds * grids), alone))
    # the difference may come out below one part alone, by chance
    variance = max(sum(part for part, _ in parts), *(part for part, _ in parts[:2]))
    if variance <= (1e-12 * np.abs(values).max()) ** 2:
        return 0.0, math.inf
    freedom = variance**2 / sum(part**2 / own for part, own in parts)
    return math.sqrt(variance), freedom


def holm(p: Sequence[float]) -> list[float]:
    """p-values adjusted for their number (Holm 1979): in increasing order times how many are left,
    never falling.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    found = [0.0] * len(p)
    largest = 0.0
    for place, k in enumerate(sorted(range(len(p)), key=lambda k: p[k])):
        largest = max(largest, min(1.0, (len(p) - place) * p[k]))
        found[k] = largest
    return found
