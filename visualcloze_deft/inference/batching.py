"""Images to make, cut into batches of one kind of grid."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from visualcloze_deft.grids.cell_sizes import by_shape


@dataclass(frozen=True, kw_only=True)
class Job:
    """One image of a grid to make. order: its place in the call."""

    order: int
    grid: int
    seed: int


def batches_of(jobs: Sequence[Job], kinds: Sequence[Hashable], size: int) -> list[list[Job]]:
    """Jobs whose grids are of one kind, at most `size` together. kinds: of each grid."""
    return [
        [jobs[place] for place in places[first : first + size]]
        for places in by_shape([kinds[job.grid] for job in jobs])
        for first in range(0, len(places), size)
    ]
