"""The grids of suites: how they are made, and what their answers are held to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from visualcloze_deft.data.annotation.source import annotated, check_places, lacking
from visualcloze_deft.data.base import Item, Part, Source
from visualcloze_deft.data.eligible import EligibleItems
from visualcloze_deft.data.example import Example
from visualcloze_deft.data.queries import query_of_items
from visualcloze_deft.data.sources import open_source
from visualcloze_deft.errors import UserError
from visualcloze_deft.evaluation.metrics.fidelity import Colour
from visualcloze_deft.grids.cell_sizes import Cells
from visualcloze_deft.task_registry.task import Task

MAPS = frozenset(  # roles that are no photos: an encoder of photos has no say on them
    "depth normal canny hed mlsd openpose segmentation uniformer object_masks mask box "
    "boxes".split()
)


@dataclass(frozen=True, kw_only=True)
class GridSettings:
    """How grids are made.

    data: name -> path of a source. resolution, cells: of the model. rows: of a grid, the query
    among them. limit: grids of a row of the table at most, None for the suite's own number. tasks:
    as `select.select` reads them, None for the suite's own. validation_every: every N-th item
    alone, 0 for all. annotate: role -> model or folder, where data lacks a role.
    """

    data: Mapping[str, str]
    resolution: int = 384
    cells: Cells = "row"
    seed: int = 1
    rows: int = 2
    limit: int | None = None
    tasks: str | None = None
    validation_every: int = 0
    annotate: Mapping[str, str] = field(default_factory=dict)
    task_folders: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Query:
    """One grid, and what its answers are held to besides a truth in the example itself.

    unit: what it is about (a subject, an item): figures of one unit are alike. roles: of the
    columns. prompt: what an image is to show, "" for no words. references: name -> other pictures
    of the subject, a file or how to draw it. box: a map, white where an object is to stand.
    classes: the colours of segmentation maps, where they are known.
    """

    example: Example
    unit: str
    roles: tuple[str, ...]
    prompt: str
    references: Mapping[str, Path | Callable[[], Image.Image]] = field(default_factory=dict)
    box: Image.Image | None = None
    classes: tuple[Colour, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of the table: `count` grids, `make(k)` the k-th of them. items: those that its queries
    are spread over, where they are items of data."""

    name: str
    count: int
    make: Callable[[int], Query]
    items: EligibleItems | None = None


def spread(index: int, items: EligibleItems, count: int) -> int:
    """The place of query `index` of `count`, which are spread evenly over all `items`."""
    return index * len(items) // count


def opened(name: str, making: GridSettings, *, held_out: bool = True) -> list[Source]:
    """The source that a suite is about, with what is annotated: of `validation_every` the items
    that training leaves out, or those that it sees."""
    place = making.data.get(name, "")
    spec = f"{name}={place}" if place else name
    source = open_source(spec, size=making.resolution, seed=making.seed)
    check_places(making.annotate)
    lacks = {role: making.annotate[role] for role in lacking(source, making.annotate)}
    sources = annotated([source], lacks)
    every = making.validation_every
    if every and len(source) < every:
        raise UserError(
            f"--validation-every {every}: {name} has {len(source)} items; give a smaller one"
        )
    return [Part(s, every=every, held_out=held_out) for s in sources] if every else sources


def example_of(
    task: Task, shown: Sequence[Item], query: Item, making: GridSettings, index: int
) -> Example:
    """A grid as inference sees it: `shown` complete, the targets of `query` hidden, all words
    said."""
    return query_of_items(
        task,
        shown,
        query,
        index=index,
        resolution=making.resolution,
        cells=making.cells,
        rng=np.random.default_rng([making.seed, index, 1]),
    )


def source_of(name: str, making: GridSettings) -> Source:
    place = making.data[name]
    spec = f"{name}={place}" if place else name
    return open_source(spec, size=making.resolution, seed=making.seed)


SHOWING = {"dreambench-plus": ("dreambooth", "graph200k", "scenes")}  # whose items stand above
