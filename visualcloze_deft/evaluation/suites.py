"""Suites: which grids an adapter is asked to complete, and what there is to hold its answers to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np

from visualcloze_deft.data.base import Source
from visualcloze_deft.data.derive import missing
from visualcloze_deft.data.eligible import EligibleItems, eligible, sources_for
from visualcloze_deft.data.sources.dreambooth import CLASSES
from visualcloze_deft.data.sources.scenes import SEGMENT_COLOURS
from visualcloze_deft.data.unpaired import check_paired
from visualcloze_deft.errors import UserError, suggestion
from visualcloze_deft.evaluation.insertion_suite import insdet
from visualcloze_deft.evaluation.subject_suites import dreambench_plus, dreambooth
from visualcloze_deft.evaluation.suite_queries import (
    MAPS,
    SHOWING,
    GridSettings,
    Query,
    Row,
    example_of,
    opened,
    spread,
)
from visualcloze_deft.storage.adapter_places import is_of_adapter
from visualcloze_deft.task_registry.files import load_tasks
from visualcloze_deft.task_registry.select import select
from visualcloze_deft.task_registry.task import Task

FAMILIES = (  # what the embedded base, its demo and its evaluation are about
    "canny-to-image",
    "depth-to-image",
    "segmentation-to-image",
    "image-to-depth",
    "image-to-normals",
    "image-editing",
    "novel-view",
    "object-insertion",
    "colourisation",
    "deblurring",
    "subject-driven",
)
BY_TASK = ("scenes", "graph200k", "folder")  # suites with a row for each task
MOST_NAMED = 3  # tasks in a message
SCENES, ITEMS = 64, 100  # grids of each task, unless --limit says otherwise


@dataclass(frozen=True, kw_only=True)
class Suite:
    """rows: what it asks, without a picture read. data: what it needs, for people; images: of each
    grid, unless said otherwise."""

    rows: Callable[[GridSettings], list[Row]]
    data: str
    images: int = 1


def rows_of(name: str, making: GridSettings) -> list[Row]:
    """The rows of a suite. Raises `UserError` where its data is not there, with what was expected
    where."""
    suite = SUITES[name]
    for source in making.data:
        if source == name or source in SHOWING.get(name, ()):
            continue
        raise UserError(
            f"--data {source}: the suite {name} has no use for it; it takes {suite.data}"
        )
    if name not in making.data and name != "scenes":
        raise UserError(f"--suite {name}: needs --data {name}=PATH, {suite.data}")
    for option, asked in (
        ("--validation-every", making.validation_every),
        ("--tasks", making.tasks),
        ("--annotate", making.annotate),
    ):
        if asked and name not in BY_TASK:
            raise UserError(f"{option} goes with --suite {', '.join(BY_TASK)}, not {name}")
    rows = suite.rows(making)
    if not sum(row.count for row in rows):
        raise UserError(f"--suite {name}: nothing to ask in {making.data.get(name)}")
    return rows


def check_suite(name: str) -> None:
    if name == "photos":
        raise UserError(
            "--suite photos: photos of one thing have no ground truth; generate "
            "images (vcdeft tasks example subject-driven --data photos=PATH, then vcdeft infer), "
            "and compare them with the photos: vcdeft eval --images DIR --against PATH --unpaired"
        )
    if name not in SUITES:
        raise UserError(f"--suite {name!r}: no such suite; {suggestion(name, SUITES)}")


def scenes(making: GridSettings) -> list[Row]:
    """Scenes of another seed than a training run's: each task with its truth."""
    known = load_tasks(map(Path, making.task_folders))
    wanted = select(known, making.tasks or ",".join(FAMILIES))
    return by_task({n: known[n] for n in wanted}, opened("scenes", making), making, usual=SCENES)


def graph200k(making: GridSettings) -> list[Row]:
    """Every task that the items have all roles of."""
    known = load_tasks(map(Path, making.task_folders))
    wanted = select(known, making.tasks or "all")
    return by_task({n: known[n] for n in wanted}, opened("graph200k", making), making, usual=ITEMS)


def folder(making: GridSettings) -> list[Row]:
    """A user's own pairs: each task that the adapter was trained on and that the pairs serve."""
    known = load_tasks(map(Path, making.task_folders))
    wanted = select(known, making.tasks or "all")
    trained = {
        path.stem
        for place in map(Path, making.task_folders)
        if is_of_adapter(place)
        for path in place.glob("*.toml")
    }
    if trained and not making.tasks:
        wanted = {name: weight for name, weight in wanted.items() if name in trained}
    tasks = {name: known[name] for name in wanted}
    sources = opened("folder", making)
    check_paired(tasks, sources, known)
    shown = opened("folder", making, held_out=False) if making.validation_every else ()
    return by_task(tasks, sources, making, usual=ITEMS, shown=shown)


def by_task(
    tasks: Mapping[str, Task],
    sources: Sequence[Source],
    making: GridSettings,
    *,
    usual: int,
    shown: Sequence[Source] = (),
) -> list[Row]:
    """A row for each task that there is data for. shown: sources of the rows above a query, where
    they are others.

    Raises `UserError` where there is none for any, or for one that is called by its name.
    """
    rows = []
    parts = [part.partition("=")[0].strip() for part in (making.tasks or "").split(",")]
    for name, task in tasks.items():
        # one that is asked for by its own name must have data
        if found := sources_for(task, sources) if name in parts else eligible(task.roles, sources):
            count = min(making.limit or usual, len(found[0]))
            above = eligible(task.roles, shown)
            make = partial(known, task, found[0], making, count, above[0] if above else found[0])
            rows.append(Row(name=name, count=count, make=make, items=found[0]))
    if not rows:
        raise UserError(no_data(tasks, sources))
    return rows


def no_data(tasks: Mapping[str, Task], sources: Sequence[Source]) -> str:
    """Which roles the first tasks need that `sources` lack, and what to do about it."""
    lacks = []
    for name, task in islice(tasks.items(), MOST_NAMED):
        roles = min((missing(task.roles, source.roles) for source in sources), key=len)
        lacks.append(f"{name} lacks {', '.join(sorted(roles)) or 'an item with all its roles'}")
    more = f" and {len(tasks) - MOST_NAMED} more" if len(tasks) > MOST_NAMED else ""
    has = ", ".join(sorted({role for source in sources for role in source.roles}))
    return (
        f"no task has data in {sources[0].name}, which has the roles {has}: {'; '.join(lacks)}"
        f"{more}; give other data, or --tasks of those that 'vcdeft data check' lists"
    )


def known(
    task: Task,
    items: EligibleItems,
    making: GridSettings,
    count: int,
    above: EligibleItems,
    index: int,
) -> Query:
    """Grid `index` of `count`, its queries spread over `items`, so that none comes twice. The rows
    before it are of `above`."""
    rng = np.random.default_rng([making.seed, index])
    place = spread(index, items, count)
    others = above.choose(making.rows, rng)
    if above is items:
        others = [other for other in others if other != place]
    shown = [above.item(other) for other in others[: making.rows - 1]]
    query = items.item(place)
    example = example_of(task, shown, query, making, index)
    photo = task.content == "caption" and task.targets[-1] not in MAPS
    return Query(
        example=example,
        unit=query.key,
        roles=task.roles,
        prompt=example.content if photo else "",
        classes=tuple(SEGMENT_COLOURS.values()) if items.source.name == "scenes" else None,
    )


SUITES: dict[str, Suite] = {
    "folder": Suite(rows=folder, data="a folder of your own pairs, or a .jsonl file"),
    "scenes": Suite(rows=scenes, data="nothing (made here), or scenes=N"),
    "graph200k": Suite(
        rows=graph200k, data="a folder with Graph200K's data.json, or its parquet files @SPLIT"
    ),
    "dreambooth": Suite(
        rows=dreambooth,
        data=f"a folder with dataset/<subject>/NN.jpg and dataset/{CLASSES}",
        images=4,
    ),
    "dreambench-plus": Suite(
        rows=dreambench_plus,
        data="a folder with data/images and data/captions, and dreambooth=PATH for the rows above",
    ),
    "insdet": Suite(rows=insdet, data="a folder with InsDet's Objects and Scenes"),
}
