"""Which items of which sources can serve a task."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np

from visualcloze_deft.data.base import Item, Source
from visualcloze_deft.data.derive import missing
from visualcloze_deft.errors import UserError
from visualcloze_deft.task_registry.task import Task


class EligibleItems:
    """The items of a source that have all roles of `wanted`, or all that theirs are made of."""

    def __init__(self, source: Source, wanted: Sequence[str]) -> None:
        self.source = source
        self.parts = [
            indices for roles, indices in source.kinds.items() if not missing(wanted, roles)
        ]
        self.ends = np.cumsum([len(part) for part in self.parts])

    def __len__(self) -> int:
        return int(self.ends[-1]) if self.parts else 0

    def choose(self, count: int, rng: np.random.Generator) -> list[int]:
        """The places of `count` different items, or of all where there are no more."""
        found: list[int] = rng.choice(len(self), min(count, len(self)), replace=False).tolist()
        return found

    def others(self, taken: Collection[int], rng: np.random.Generator) -> Iterator[int]:
        """The places of all items but those `taken`, in a drawn order."""
        for place in rng.permutation(len(self)).tolist():  # drawn when the first one is asked for
            if place not in taken:
                yield place

    def item(self, place: int) -> Item:
        return self.source.item(self.index(place))

    def index(self, place: int) -> int:
        """The index in the source of the item at `place` among these."""
        part = int(np.searchsorted(self.ends, place, side="right"))
        return int(self.parts[part][place - self.ends[part]])  # counted from the part's end


def eligible(wanted: Sequence[str], sources: Sequence[Source]) -> list[EligibleItems]:
    """What each source has with the roles `wanted`; of those that have nothing, nothing."""
    return [found for found in (EligibleItems(source, wanted) for source in sources) if len(found)]


def unused_sources(tasks: Mapping[str, Task], sources: Sequence[Source]) -> list[Source]:
    """The sources that serve none of the tasks."""
    return [
        s for s in sources if not any(len(EligibleItems(s, task.roles)) for task in tasks.values())
    ]


def sources_for(task: Task, sources: Sequence[Source]) -> list[EligibleItems]:
    """What each source has for `task`.

    Raises `UserError` where no source has anything.
    """
    found = eligible(task.roles, sources)
    if not found:
        lacks = "; ".join(
            f"{source.name} lacks {', '.join(sorted(missing(task.roles, source.roles)))}"
            if missing(task.roles, source.roles)
            else f"no item of {source.name} has them all"
            for source in sources
        )
        raise UserError(f"task {task.name}: no data source has all its roles ({lacks})")
    return found
