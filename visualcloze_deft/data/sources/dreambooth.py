"""The source `dreambooth`: photos of subjects, `dataset/<subject>/NN.jpg`, a few of each."""

from __future__ import annotations

import re
from functools import cached_property, partial
from itertools import permutations
from os.path import lexists
from pathlib import Path

from visualcloze_deft.data.base import Item
from visualcloze_deft.errors import UserError
from visualcloze_deft.images.reading import folders_in, images_in, listing, read_image
from visualcloze_deft.storage.text_files import read_text

CLASSES = "prompts_and_classes.txt"
_HEADER = "subject_name,class"


class DreamBooth:
    """The source `dreambooth`: every ordered pair of different photos of one subject.

    root: the folder that holds `dataset`, or `dataset` itself.
    """

    name = "dreambooth"
    roles = frozenset({"reference", "target"})

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            raise UserError(f"{root}: no such folder")
        self.folder = subjects = root / "dataset" if (root / "dataset").is_dir() else root
        self.classes = read_classes(subjects / CLASSES) if lexists(subjects / CLASSES) else {}
        by_subject = [
            pairs
            for folder in folders_in(subjects)
            if (pairs := list(permutations(images_in(folder).values(), 2)))
        ]
        self.pairs = [pair for pairs in by_subject for pair in pairs]
        self.units = [k for k, pairs in enumerate(by_subject) for _ in pairs]
        if not self.pairs:
            raise UserError(
                f"{subjects}: expected folders <subject> with two or more photos each; "
                f"found {listing(subjects)}"
            )

    def __len__(self) -> int:
        return len(self.pairs)

    @cached_property
    def kinds(self) -> dict[frozenset[str], range]:
        return {self.roles: range(len(self))}

    def item(self, index: int) -> Item:
        reference, target = self.pairs[index]
        subject = target.parent.name
        return Item(
            key=f"{subject} {reference.stem}-{target.stem}",
            images={
                "reference": partial(read_image, reference),
                "target": partial(read_image, target),
            },
            texts={"caption": f"a {self.classes.get(subject) or words(subject)}"},
        )


def words(subject: str) -> str:
    """A folder name as words; one of digits alone stays as it is.

    >>> words("backpack_dog2")
    'backpack dog'
    """
    return re.sub(r"[\d_]+", " ", subject).strip() or subject


def read_classes(path: Path) -> dict[str, str]:
    """Subject -> class, from the lines below `subject_name,class` down to an empty one."""
    lines = [line.strip() for line in read_text(path).splitlines()]
    if _HEADER not in lines:
        raise UserError(f"{path}: expected a line {_HEADER!r} with one subject per line below it")
    classes = {}
    for line in lines[lines.index(_HEADER) + 1 :]:
        subject, comma, name = line.partition(",")
        if not comma:
            break
        classes[subject.strip()] = name.strip()
    return classes
