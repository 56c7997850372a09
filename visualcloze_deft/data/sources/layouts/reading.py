"""What the readers of all layouts share: faults, remarks, roles and the texts beside pictures."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from visualcloze_deft.data.index import Row
from visualcloze_deft.errors import OnFault, UserError, stop
from visualcloze_deft.paths import TASKS
from visualcloze_deft.storage.text_files import read_text, sound
from visualcloze_deft.task_registry.files import ROLES_FILE, read_roles

TARGET = "target"
AFTER = "after"  # another word for the target, which beginners of pairs have
TEXTS = ("caption", "instruction")
NO_ROLES = "photos without roles belong in a sub-folder target"


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What a layout hands over beside its rows.

    on_fault: gets what is wrong with one row, which is then passed over. notes: how the folder was
    read, for people, each once.
    """

    on_fault: OnFault = stop
    notes: dict[str, None] = field(default_factory=dict)

    def note(self, line: str) -> None:
        self.notes[line] = None


@cache
def known_roles() -> frozenset[str]:
    """The roles that the shipped tasks name."""
    return frozenset(read_roles(TASKS / ROLES_FILE).phrases) | {AFTER}


def as_role(word: str) -> str:
    """The role that a word of a user's means: one that tasks name, whatever its capitals."""
    return word.lower() if word.lower() in known_roles() else word


def check_role(where: str, role: str) -> None:
    if not role.strip() or not role.isprintable():
        raise UserError(f"{where}: the role {role!r} is no word; give it letters, no line break")


def with_target(paths: Mapping[str, str], reading: Reading) -> dict[str, str]:
    """`paths` by role, in which "after" is the target where nothing else is."""
    if AFTER not in paths or TARGET in paths:
        return dict(paths)
    reading.note("after: read as target; a task may call it either")
    others = {role: path for role, path in paths.items() if role != AFTER}
    return {**others, TARGET: paths[AFTER]}


def paired(root: Path, items: Mapping[str, Mapping[str, str]], reading: Reading) -> Iterator[Row]:
    """The items whose pictures are told by names: item -> role -> path in `root`."""
    files = text_files(root)
    for stem, found in sorted(items.items()):
        try:
            paths = with_target(found, reading)
            check_not_alone(root, stem, paths)
            yield Row(key=stem, paths=paths, texts=texts_of(root, stem, files))
        except UserError as fault:
            reading.on_fault(fault)


def check_not_alone(root: Path, stem: str, paths: Mapping[str, str]) -> None:
    if len(paths) == 1 and TARGET not in paths:
        [name] = paths.values()
        raise UserError(
            f"{root / name}: stands alone; no other role has a picture called {stem!r}; {NO_ROLES}"
        )


def text_files(root: Path) -> frozenset[str]:
    """The paths in `root` of all .txt that may hold the text of an item."""
    found = []
    for folder in ("", *TEXTS):
        names = os.listdir(root / folder) if (root / folder).is_dir() else ()
        found += [os.path.join(folder, name) for name in names if name.endswith(".txt")]
    return frozenset(found)


def texts_of(root: Path, stem: str, files: frozenset[str]) -> dict[str, str]:
    """The texts of the item called `stem`; of several files, the first is read."""
    texts: dict[str, str] = {}
    for name in TEXTS:
        for place in (place for place in places_of(name, stem) if place in files):
            if name not in texts and (root / place).is_file():
                texts[name] = sound(read_text(root / place)).strip()
    return texts


def places_of(text: str, stem: str) -> list[str]:
    """Where the text of an item may stand, the first found counts.

    >>> places_of("instruction", "7")[:2]
    ['instruction/7.txt', '7_instruction.txt']
    """
    own = [f"{stem}.txt"] if text == "caption" else []
    named = [f"{stem}{between}{text}.txt" for between in "_-"]
    return [*own, f"{text}/{stem}.txt", *named, *(f"{text}{b}{stem}.txt" for b in "_-")]
