"""The value every source gives: one item, its images by role and its texts by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

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
    number of workers and ranks may read side by side.
    """

    name: str
    roles: frozenset[str]

    def __len__(self) -> int: ...

    def item(self, index: int) -> Item: ...
