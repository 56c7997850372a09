"""Images to make, cut into batches of one grid shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from visualcloze_deft.grids.cell_sizes import Shape


@dataclass(frozen=True, kw_only=True)
class Job:
    """One image of a grid to make. order: its place in the call."""

    order: int
    grid: int
    seed: int


def by_shape(jobs: Sequence[Job], shapes: Sequence[Shape]) -> list[list[Job]]:
    """Jobs whose grids have one shape together, which no padding does better: the time of attention
    over padded tokens is lost, and mixed lists have many grids of each shape."""
    groups: dict[Shape, list[Job]] = {}
    for job in jobs:
        groups.setdefault(shapes[job.grid], []).append(job)
    return list(groups.values())
