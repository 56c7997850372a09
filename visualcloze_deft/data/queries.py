"""Grids as inference sees them: rows of examples, and a query whose targets are hidden."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Literal

import numpy as np
from PIL import Image

from visualcloze_deft.data.base import Item
from visualcloze_deft.data.derive import missing
from visualcloze_deft.data.example import Example, Skipped
from visualcloze_deft.data.mixture import Mixture, content, row_of
from visualcloze_deft.grids.cell_sizes import Cells
from visualcloze_deft.task_registry.task import Task

SHEETS = 10_000_019  # index offset: sheets show combinations that training does not draw
Each = Literal["task", "group"]


def query_of(mixture: Mixture, task: Task, *, index: int, rows: int = 2) -> Example:
    """A grid of `task` as inference sees it: its own targets hidden, all words said.

    From the first source that has items for it.
    """
    able = mixture.serving[task.name][0]
    places = able.choose(rows, np.random.default_rng([mixture.seed, SHEETS + index]))
    return query_at(mixture, task, places, index=index)


def query_at(mixture: Mixture, task: Task, places: Sequence[int], *, index: int) -> Example:
    """`query_of` with the items at `places` of the first source that serves the task."""
    able = mixture.serving[task.name][0]
    items, rows, skipped = mixture.read(able, places, task.roles, SHEETS + index)
    return as_query(task, items, rows, index=index, skipped=skipped)


def query_of_items(
    task: Task,
    shown: Sequence[Item],
    query: Item,
    *,
    index: int,
    resolution: int,
    cells: Cells,
    rng: np.random.Generator,
) -> Example:
    """A grid of `task` as inference sees it: `shown` complete, the targets of `query` hidden, also
    where nobody has them. rng: draws what roles are computed with."""
    whole = not missing(task.roles, query.images)
    last = row_of(query, task.roles if whole else task.conditions, resolution, cells, rng)
    above = [row_of(item, task.roles, resolution, cells, rng) for item in shown]
    return as_query(task, [*shown, query], [*above, last], index=index)


def as_query(
    task: Task,
    items: Sequence[Item],
    rows: Sequence[Sequence[Image.Image]],
    *,
    index: int,
    skipped: tuple[Skipped, ...] = (),
) -> Example:
    """The targets of the last row hidden, all words said. rows: the cells of each item; the last
    may lack its targets."""
    unknown = [None] * (len(task.roles) - len(rows[-1]))
    return Example(
        index=index,
        task=task.name,
        keys=tuple(item.key for item in items),
        rows=(*map(tuple, rows[:-1]), (*rows[-1], *unknown)),
        hidden=tuple(role in task.targets for role in task.roles),
        task_sentence=task.sentence(),
        content=content(task, items[-1]),
        skipped=skipped,
    )


def queries(
    mixture: Mixture, *, count: int = 1, rows: int = 2, tasks: int | None = None
) -> list[Example]:
    """`count` grids of every task, or of the `tasks` tasks drawn most often. No two of a task ask
    for the same item; where there are fewer items, there are fewer grids."""
    heaviest = np.argsort(-mixture.proportions, kind="stable")[:tasks]
    return [
        query
        for place, task in enumerate(mixture.tasks.values())
        if place in heaviest
        for query in different_queries(mixture, task, count=count, rows=rows)
    ]


def different_queries(mixture: Mixture, task: Task, *, count: int, rows: int) -> Iterator[Example]:
    """The first `count` of `query_of`, with another item where one would be asked for again."""
    able = mixture.serving[task.name][0]
    asked: set[int] = set()
    for index in range(min(count, len(able))):
        rng = np.random.default_rng([mixture.seed, SHEETS + index])
        places = able.choose(rows, rng)
        if places[-1] in asked:
            new = next(able.others(asked, rng))
            places = [*islice(able.others({new}, rng), rows - 1), new]
        asked.add(places[-1])
        yield query_at(mixture, task, places, index=index)


def one_of_each(mixture: Mixture, each: Each) -> list[Example]:
    """A grid of every task, or of the first task of every group, as inference sees it."""
    first: dict[str, Task] = {}
    for task in mixture.tasks.values():
        first.setdefault(task.group if each == "group" else task.name, task)
    return [query_of(mixture, task, index=k) for k, task in enumerate(first.values())]
