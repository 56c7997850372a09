"""Grids without a truth: the query is of a source that has what a task shows, and no more."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from visualcloze_deft.data.base import Source
from visualcloze_deft.data.eligible import EligibleItems, eligible, sources_for, unused_sources
from visualcloze_deft.data.example import Example
from visualcloze_deft.data.queries import query_of_items
from visualcloze_deft.errors import UserError
from visualcloze_deft.task_registry.task import Task


@dataclass(frozen=True, kw_only=True)
class QuerySource:
    """The items that ask for the targets of a task, and those that the rows before them are of."""

    task: Task
    asking: EligibleItems
    shown: EligibleItems | None

    def grids(self, *, count: int, rows: int, seed: int, resolution: int) -> Iterator[Example]:
        """`count` grids, their queries spread evenly over all that ask; no more than there are."""
        task, count = self.task, min(count, len(self.asking))
        for index in range(count):
            rng = np.random.default_rng([seed, index])
            places = self.shown.choose(rows - 1, rng) if self.shown else []
            shown = [self.shown.item(place) for place in places] if self.shown else []
            query = self.asking.item(index * len(self.asking) // count)
            yield query_of_items(
                task, shown, query, index=index, resolution=resolution, cells="row", rng=rng
            )


def query_sources(
    tasks: Mapping[str, Task], sources: Sequence[Source], *, rows: int
) -> dict[str, QuerySource]:
    """What is asked, by task: a source that serves none of the tasks asks those that it has the
    conditions of.

    Raises `UserError` where the other rows of a grid find no source with all roles of its task.
    """
    aside = unused_sources(tasks, sources)
    return {
        name: QuerySource(
            task=task, asking=asking[0], shown=_shown(task, sources) if rows > 1 else None
        )
        for name, task in tasks.items()
        if (asking := eligible(task.conditions, aside))
    }


def _shown(task: Task, sources: Sequence[Source]) -> EligibleItems:
    try:
        return sources_for(task, sources)[0]
    except UserError as error:
        raise UserError(f"{error}; add one that has, or ask without example: --rows 1") from None
