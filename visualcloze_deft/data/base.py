"""The value every source gives: one item, its images by role and its texts by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image


@dataclass(frozen=True, kw_only=True)
class Item:
    """One thing a source knows several pictures of.

    images: for each role a function that makes or reads the RGB picture when it is needed.
    texts: "caption" (what `target` shows), "instruction" (what turns `before` into `target`), ...
    phrasings: of a text that can be said in several ways, all of them; the first is the usual one.
    instead: of a text that the item lacks, the name of the one that is read in its place.
    key: a name for messages, unique within the source.
    """

    key: str
    images: Mapping[str, Callable[[], Image.Image]]
    texts: Mapping[str, str] = field(default_factory=dict)
    phrasings: Mapping[str, Sequence[str]] = field(default_factory=dict)
    instead: Mapping[str, str] = field(default_factory=dict)

    def image(self, role: str) -> Image.Image:
        return self.images[role]()


class Source(Protocol):
    """A finite, seekable set of items.

    roles: the roles that at least one item has. `item(i)` depends on `i` alone, so that any
    number of workers and ranks may read side by side. `kinds` tells which items have which
    roles without reading a picture: every index stands under one set of roles, in order.
    """

    name: str
    roles: frozenset[str]

    def __len__(self) -> int: ...

    def item(self, index: int) -> Item: ...

    @property
    def kinds(self) -> Mapping[frozenset[str], Sequence[int]]: ...


def kinds_of(roles_of_items: Iterable[Iterable[str]]) -> dict[frozenset[str], list[int]]:
    """What `Source.kinds` gives, from the roles of each item in turn."""
    found: dict[frozenset[str], list[int]] = {}
    for index, roles in enumerate(roles_of_items):
        found.setdefault(frozenset(roles), []).append(index)
    return found


def units_of(source: Source) -> NDArray[np.intp] | None:
    """The number of the unit that each item is of, where items share pictures: a subject, a place,
    or a photo (`photos_of`). Other units may share pictures of another role. None where every item
    has its own."""
    photos = photos_of(source)
    found: Any = getattr(source, "units", None) if photos is None else photos[:, -1]
    return found if found is None else np.asarray(found)


def unit_numbers(source: Source) -> NDArray[np.intp]:
    """The number of each item by which `Part` keeps it, also of a part."""
    units = units_of(source)
    if units is None:
        return source.own if isinstance(source, Part) else np.arange(len(source))
    return units


def unit_count(source: Source) -> int:
    """How many units of a source may be held out, each whole."""
    return len(np.unique(unit_numbers(source)))


def photos_of(source: Source) -> NDArray[np.intp] | None:
    """(n, k) the numbers of the photos in each item, the target last, of a source whose items are
    photos of one thing: none may be shown where it is asked for. None of other sources."""
    found: Any = getattr(source, "photos", None)
    return found if found is None else np.asarray(found)


class Listed:
    """A source all of whose items are at hand."""

    name: str

    def __init__(self, items: Sequence[Item]) -> None:
        self.items = items
        self.roles = frozenset(role for item in items for role in item.images)

    def __len__(self) -> int:
        return len(self.items)

    def item(self, index: int) -> Item:
        return self.items[index]

    @cached_property
    def kinds(self) -> dict[frozenset[str], list[int]]:
        return kinds_of(item.images for item in self.items)


class Part:
    """Every `every`-th item of a source (`held_out`), or all the others; where items share
    pictures, every `every`-th unit (`units_of`), whole.

    Of photos (`photos_of`) one at least is held out. Items for training have none of those, and
    held-out items have one, as their target.
    """

    def __init__(self, source: Source, *, every: int, held_out: bool) -> None:
        self.name = source.name
        self.roles = source.roles
        self.source = source
        units, photos = units_of(source), photos_of(source)
        if photos is None:
            self.mine = (unit_numbers(source) % every == every - 1) == held_out
        else:
            every = min(every, int(photos.max()) + 1)
            kept = photos % every == every - 1
            self.mine = (kept[:, -1] == held_out) & ~kept[:, :-1].any(axis=1)
        self.own = np.flatnonzero(self.mine)
        self.units = None if units is None else units[self.own]
        self.photos = None if photos is None else photos[self.own]

    def __len__(self) -> int:
        return len(self.own)

    def item(self, index: int) -> Item:
        return self.source.item(int(self.own[index]))

    @cached_property
    def kinds(self) -> dict[frozenset[str], Sequence[int]]:
        places = np.cumsum(self.mine) - 1
        whole = {roles: np.asarray(indices) for roles, indices in self.source.kinds.items()}
        found = {roles: places[indices[self.mine[indices]]] for roles, indices in whole.items()}
        return {roles: own for roles, own in found.items() if len(own)}
