"""NAME=PLACE as options and settings hold it: a source with its path, hub id, number or split."""

from __future__ import annotations

import os
from collections.abc import Iterable

from visualcloze_deft.errors import UserError

PROCEDURAL = ("scenes", "subject")  # sources that are made, not read: they need no path
SPLIT = "train"  # where none is said


def name_and_place(text: str) -> tuple[str, str]:
    """
    >>> name_and_place("folder=my=photos"), name_and_place("scenes")
    (('folder', 'my=photos'), ('scenes', ''))
    """
    name, _, place = text.partition("=")
    return name, place


def named_places(texts: Iterable[str], *, option: str) -> dict[str, str]:
    """Name to place. Raises `UserError` where a name is given twice to an option."""
    found: dict[str, str] = {}
    for text in texts:
        name, place = name_and_place(text)
        if name in found:
            raise UserError(f"{option} {text}: {name} is given twice")
        found[name] = place
    return found


def is_endless(spec: str) -> bool:
    """Whether a source has no end: another seed makes its items anew."""
    return name_and_place(spec)[0] == "scenes"


def is_of_photos(spec: str) -> bool:
    """Whether a source is a folder of photos of one thing."""
    return name_and_place(spec)[0] == "photos"


def place_and_split(place: str) -> tuple[str, str]:
    """The folder or hub id, and the split, that a place of tables names; a folder that is there is
    itself, whatever its name has in it.

    >>> place_and_split("VisualCloze/Graph200K@test"), place_and_split("me@host@test")
    (('VisualCloze/Graph200K', 'test'), ('me@host', 'test'))
    """
    where, at, split = place.rpartition("@")
    return (where, split or SPLIT) if at and not os.path.exists(place) else (place, SPLIT)


def from_root(place: str) -> str:
    """`place` as it holds from any folder: absolute where it is a path that exists, with its split
    behind it; a hub id as it is."""
    where, split = place_and_split(place)
    if not where or not os.path.exists(where):
        return place
    return os.path.abspath(where) + (f"@{split}" if where != place else "")


def spec_from_root(spec: str) -> str:
    """`from_root` of the path in "NAME=PATH".

    >>> spec_from_root("scenes=9"), spec_from_root("graph200k=VisualCloze/Graph200K")
    ('scenes=9', 'graph200k=VisualCloze/Graph200K')
    """
    name, place = name_and_place(spec)
    return spec if name in PROCEDURAL or not place else f"{name}={from_root(place)}"
