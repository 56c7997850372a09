"""Means over seeds and grids with bootstrap intervals, and pairs of methods told apart.

Values are paired: grid g of seed s is the same grid, and the same training examples, for every
method. Axes: s seeds, g grids, k resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 4000
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
    """The mean of `values` (s g) and its percentile bootstrap interval.

    Seeds and grids are resampled independently of each other (Owen 2007, "The pigeonhole
    bootstrap", arXiv 0712.1111), because all seeds are asked the same grids. Few seeds tell little
    of seeds: with one the interval is of grids alone. p is twice the smaller share of resampled
    means on either side of 0, and not below 1 / `RESAMPLES`.
    """
    seeds, grids = values.shape
    if not np.isfinite(values).all():  # of a training that went astray
        lost = float("nan")
        return Estimate(mean=lost, low=lost, high=lost, p=1.0, seeds=seeds, grids=grids, agree=0)
    rng = np.random.default_rng(0)
    drawn_seeds = rng.multinomial(seeds, np.full(seeds, 1 / seeds), RESAMPLES) / seeds  # k s
    drawn_grids = rng.multinomial(grids, np.full(grids, 1 / grids), RESAMPLES) / grids  # k g
    means = ((drawn_seeds @ values) * drawn_grids).sum(axis=1)
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(means, [tail, 100 - tail])
    mean = values.mean()
    beyond = 2 * min((means <= 0).mean(), (means >= 0).mean())
    return Estimate(
        mean=float(mean),
        low=float(low),
        high=float(high),
        p=float(np.clip(beyond, 1 / RESAMPLES, 1)),
        seeds=seeds,
        grids=grids,
        agree=int((np.sign(values.mean(axis=1)) == np.sign(mean)).sum()),
    )


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
