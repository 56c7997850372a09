"""Which items of which sources can serve a task."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from visualcloze_deft.data.base import Item, Source, photos_of
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
        photos = photos_of(source)
        own = [index for part in self.parts for index in part] if photos is not None else []
        self.photos = None if photos is None else photos[own]

    def __len__(self) -> int:
        return int(self.ends[-1]) if self.parts else 0

    def choose(self, count: int, rng: np.random.Generator) -> list[int]:
        """The places of `count` different items, or of all where there are no more.

        Of photos of one thing, those of the last item, which is asked for, are in no other.
        """
        if self.photos is not None:
            drawn = rng.permutation(len(self))
            others = self._apart(drawn[:-1], drawn[-1:])[: count - 1]
            return [*others.tolist(), int(drawn[-1])]
        found: list[int] = rng.choice(len(self), min(count, len(self)), replace=False).tolist()
        return found

    def others(self, taken: Collection[int], rng: np.random.Generator) -> Iterator[int]:
        """The places of all items but those `taken`, in a drawn order; of photos of one thing, of
        those that share none with them."""
        for place in self._apart(rng.permutation(len(self)), [*taken]).tolist():
            if place not in taken:  # drawn when the first one is asked for
                yield place

    def _apart(self, places: NDArray[np.intp], taken: ArrayLike) -> NDArray[np.intp]:
        """Those of `places` whose items share no photo with the ones `taken`."""
        if self.photos is None:
            return places
        shared = np.isin(self.photos[places], self.photos[np.asarray(taken, np.intp)])
        return places[~shared.any(axis=1)]

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
