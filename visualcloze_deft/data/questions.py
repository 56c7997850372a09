"""Grids without a truth: the query is of a source that has what a task shows, and no more."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from visualcloze_deft.data.item import Source
from visualcloze_deft.data.mixture import Able, Example, able, content, idle, row_of, serving
from visualcloze_deft.errors import UserError
from visualcloze_deft.registry import Task


@dataclass(frozen=True, kw_only=True)
class Questions:
    """The items that ask for the targets of a task, and those that the rows before them are of."""

    task: Task
    asking: Able
    shown: Able | None

    def grids(self, *, count: int, rows: int, seed: int, resolution: int) -> Iterator[Example]:
        """`count` grids, their queries spread evenly over all that ask; no more than there are."""
        task, count = self.task, min(count, len(self.asking))
        for index in range(count):
            rng = np.random.default_rng([seed, index])
            places = self.shown.choose(rows - 1, rng) if self.shown else []
            shown = [self.shown.item(place) for place in places] if self.shown else []
            query = self.asking.item(index * len(self.asking) // count)
            conditions = row_of(query, task.conditions, resolution, "row", rng)
            yield Example(
                index=index,
                task=task.name,
                keys=(*(item.key for item in shown), query.key),
                rows=(
                    *(row_of(item, task.roles, resolution, "row", rng) for item in shown),
                    (*conditions, *[None] * len(task.targets)),
                ),
                hidden=tuple(role in task.targets for role in task.roles),
                task_sentence=task.sentence(),
                content=content(task, query),
            )


def questions(
    tasks: Mapping[str, Task], sources: Sequence[Source], *, rows: int
) -> dict[str, Questions]:
    """What is asked, by task: a source that serves none of the tasks asks those that it has the
    conditions of.

    Raises `UserError` where the other rows of a grid find no source with all roles of its task.
    """
    aside = idle(tasks, sources)
    return {
        name: Questions(
            task=task, asking=asking[0], shown=_shown(task, sources) if rows > 1 else None
        )
        for name, task in tasks.items()
        if (asking := able(task.conditions, aside))
    }


def _shown(task: Task, sources: Sequence[Source]) -> Able:
    try:
        return serving(task, sources)[0]
    except UserError as error:
        raise UserError(f"{error}; add one that has, or ask without example: --rows 1") from None
