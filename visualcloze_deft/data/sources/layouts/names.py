"""Pictures beside one another, whose names hold the role: `0001_depth.png` or `depth_0001.png`; or
no role: plain photos.

A folder is read in one way. Names that could be read in two are refused.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Literal

from visualcloze_deft.data.index import Row
from visualcloze_deft.data.sources.layouts.reading import (
    AFTER,
    NO_ROLES,
    TARGET,
    Reading,
    as_role,
    known_roles,
    paired,
)
from visualcloze_deft.errors import UserError
from visualcloze_deft.images.reading import any_images_in, images_in

Side = Literal["suffix", "prefix"]


@dataclass(frozen=True, kw_only=True)
class Names:
    """The names of a folder's pictures, read in one way.

    parts: stem -> item and role, of the stems that can be read so. others: all other stems.
    """

    side: Side
    parts: Mapping[str, tuple[str, str]]
    others: tuple[str, ...]

    @cached_property
    def items(self) -> dict[str, dict[str, str]]:
        """Item -> role -> stem."""
        found: dict[str, dict[str, str]] = defaultdict(dict)
        for stem, (item, role) in self.parts.items():
            found[item][role] = stem
        return found

    @property
    def with_target(self) -> int:
        """How many items have a target."""
        return sum(bool({TARGET, AFTER} & roles.keys()) for roles in self.items.values())

    @property
    def pairs(self) -> bool:
        return any(len(roles) > 1 for roles in self.items.values())

    @property
    def complete(self) -> bool:
        """Whether every name can be read, and no picture but a target stands alone."""
        whole = (len(r) > 1 or {TARGET, AFTER} & r.keys() for r in self.items.values())
        return not self.others and all(whole)

    @property
    def known(self) -> int:
        """How many pictures have a role that tasks name."""
        return sum(role in known_roles() for _, role in self.parts.values())


def fits(path: Path) -> bool:
    return path.is_dir() and any_images_in(path)


def read(path: Path, reading: Reading) -> Iterator[Row]:
    """The items that the names of the pictures in a folder tell."""
    pictures = images_in(path, on_fault=reading.on_fault)
    names = decided(path, [*pictures])
    if names is None:
        reading.note(
            "photos without roles: each is read as target; to train on the one subject that they "
            f"show: photos={path}"
        )
        return paired(path, {s: {TARGET: found.name} for s, found in pictures.items()}, reading)
    if names.others:
        reading.on_fault(_without_role(path, names, pictures))
    for stem, (item, role) in names.parts.items():
        if (kept := names.items[item][role]) != stem:
            reading.on_fault(
                UserError(
                    f"{pictures[stem]}: {pictures[kept].name} is {role} of {item!r} too; keep one"
                )
            )
    roles = dict.fromkeys(role for _, role in names.parts.values())
    reading.note(f"each name has its role as a {names.side}: {', '.join(roles)}")
    items = {
        item: {role: pictures[stem].name for role, stem in stems.items()}
        for item, stems in names.items.items()
    }
    return paired(path, items, reading)


def decided(path: Path, stems: Iterable[str]) -> Names | None:
    """The one way in which names hold roles; None where they hold none.

    A way counts where it is `complete`; of two such, the one in which alone items have a target.
    Raises `UserError` where both could be meant, or nothing tells roles from other words.
    """
    ways = [read_as(side, stems) for side in patterns()]
    complete = [way for way in ways if way.complete]
    if len(complete) == 2:
        complete = [way for way in complete if way.with_target] or complete
    if len(complete) == 2:
        raise _ambiguous(path, complete)
    if complete:
        [way] = complete
        if not way.known and len(way.items) == 1:
            roles = ", ".join(role for _, role in way.parts.values())
            raise UserError(
                f"{path}: one item with the roles {roles}, or photos? Sub-folders named by role "
                f"tell it; {NO_ROLES}"
            )
        return way
    meant = [way for way in ways if way.known or (not way.others and way.pairs)]
    return max(meant, key=lambda way: (way.known, len(way.parts)), default=None)


def read_as(side: Side, stems: Iterable[str]) -> Names:
    found = {stem: patterns()[side].fullmatch(stem) for stem in stems}
    return Names(
        side=side,
        parts={s: (match["item"], as_role(match["role"])) for s, match in found.items() if match},
        others=tuple(stem for stem, match in found.items() if not match),
    )


def _ambiguous(path: Path, ways: list[Names]) -> UserError:
    suffix, prefix = ways
    stem = next(iter(suffix.parts))
    return UserError(
        f"{path}: {stem!r} may be {suffix.parts[stem][1]} of {suffix.parts[stem][0]!r} or "
        f"{prefix.parts[stem][1]} of {prefix.parts[stem][0]!r}; move pictures into sub-folders "
        "named by role"
    )


def _without_role(path: Path, names: Names, pictures: Mapping[str, Path]) -> UserError:
    stem, *more = names.others
    example = f"{stem}_target" if names.side == "suffix" else f"target_{stem}"
    place = "end" if names.side == "suffix" else "beginning"
    others = f" (and {len(more)} more)" if more else ""
    return UserError(
        f"{pictures[stem]}{others}: expected a role at the {place}, such as {example}; {NO_ROLES}"
    )


@cache
def patterns() -> dict[Side, re.Pattern[str]]:
    """How a stem is taken apart. A role is one word in small letters, or one that tasks name
    in any."""
    known = sorted(known_roles(), key=len, reverse=True)
    role = rf"(?P<role>(?i:{'|'.join(known)})|image_\d+|[a-z][a-z0-9]*)"
    return {
        "suffix": re.compile(rf"(?P<item>.+?)[_-]{role}"),
        "prefix": re.compile(rf"{role}[_-](?P<item>.+)"),
    }
