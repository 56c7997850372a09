"""The value every source gives: one item, its images by role and its texts by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import numpy as np
from PIL import Image


@dataclass(frozen=True, kw_only=True)
class Item:
    """One thing a source knows several pictures of.

    images: for each role a function that makes or reads the RGB picture when it is needed.
    texts: "caption" (what `target` shows), "instruction" (what turns `before` into `target`), ...
    key: a name for messages, unique within the source.
    """

    key: str
    images: Mapping[str, Callable[[], Image.Image]]
    texts: Mapping[str, str] = field(default_factory=dict)

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
    """Every `every`-th item of a source (`held_out`), or all the others."""

    def __init__(self, source: Source, *, every: int, held_out: bool) -> None:
        self.name = source.name
        self.roles = source.roles
        self.source = source
        self.every = every
        self.held_out = held_out

    def __len__(self) -> int:
        kept_out = len(self.source) // self.every
        return kept_out if self.held_out else len(self.source) - kept_out

    def item(self, index: int) -> Item:
        if self.held_out:
            return self.source.item(index * self.every + self.every - 1)
        return self.source.item(index + index // (self.every - 1))

    @cached_property
    def kinds(self) -> dict[frozenset[str], Sequence[int]]:
        found: dict[frozenset[str], Sequence[int]] = {}
        for roles, indices in self.source.kinds.items():
            whole = np.asarray(indices)
            kept_out = whole % self.every == self.every - 1
            own = whole[kept_out] if self.held_out else whole[~kept_out]
            if len(own):
                found[roles] = own // self.every if self.held_out else own - own // self.every
        return found
