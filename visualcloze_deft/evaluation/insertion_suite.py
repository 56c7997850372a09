"""The suite of InsDet: objects put into the boxes of scenes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from visualcloze_deft.data.mixture import row_of
from visualcloze_deft.data.sources.insdet import Place, View, alone, placed, read_places, read_views
from visualcloze_deft.errors import UserError
from visualcloze_deft.evaluation.suite_queries import GridSettings, Query, Row, example_of
from visualcloze_deft.task_registry.files import load_tasks
from visualcloze_deft.task_registry.task import Task


def insdet(making: GridSettings) -> list[Row]:
    """Every box of a scene that an object with views stands in: the object is put there again."""
    root = Path(making.data["insdet"])
    if not (root / "Objects").is_dir():
        raise UserError(f"{root}: expected InsDet's folders Objects and Scenes")
    views = read_views(root / "Objects")
    files = sorted(root.glob("Scenes/*/*/rgb_*.xml"))
    places = [place for path in files for place in read_places(path, views)]
    if not places:
        raise UserError(
            f"{root}: no box in Scenes/*/*/rgb_*.xml has the name of an object in Objects"
        )
    task = load_tasks()["object-insertion"]
    total = len(places)
    count = min(making.limit or total, total)

    def make(index: int) -> Query:
        return inserted(task, places, index * total // count, views, making, index)

    return [Row(name="insdet", count=count, make=make)]


def inserted(
    task: Task,
    places: Sequence[Place],
    chosen: int,
    views: Mapping[str, Sequence[View]],
    making: GridSettings,
    index: int,
) -> Query:
    """The object of `places[chosen]` into its box; the rows above show other objects first."""
    place, size = places[chosen], making.resolution
    rng = np.random.default_rng([making.seed, index])
    order = [int(k) for k in rng.permutation(len(places)) if k != chosen]
    order.sort(key=lambda k: places[k].name == place.name)
    shown = [placed(places[k], size=size) for k in order[: making.rows - 1]]
    query = placed(place, size=size)
    *_, box = row_of(query, (*task.roles, "box"), size, making.cells, np.random.default_rng(index))
    return Query(
        example=example_of(task, shown, query, making, index),
        unit=place.name,
        roles=task.roles,
        prompt="",
        references={
            f"{place.name}/{view.image.stem}": partial(alone, view) for view in views[place.name]
        },
        box=box,
    )
