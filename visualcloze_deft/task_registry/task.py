"""A task: named columns, instructions and content; and the words of a grid."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NAME = re.compile(r"[a-z0-9][a-z0-9-]*")
ROLE = re.compile(r"[A-Za-z_][\w-]*")  # what str.format takes as one name
CONTENTS = ("", "caption", "instruction")

Words = Callable[[Sequence[str]], str]
"""Chooses one of several phrases that mean the same."""


def first_phrase(phrases: Sequence[str]) -> str:
    """The first phrase: the one that inference says."""
    return phrases[0]


@dataclass(frozen=True, kw_only=True)
class Task:
    """What one row of a grid holds and how it is said in words.

    columns: role -> phrases, in the order of the grid. instructions: task sentences, with `{role}`
    where a column is named. Of phrases and sentences that mean the same the first is the usual
    one. content: the item text ("caption", "instruction") that the content sentence holds, or ""
    for none. path: the file that declares it.
    """

    name: str
    group: str
    summary: str
    columns: Mapping[str, tuple[str, ...]]
    targets: tuple[str, ...]
    instructions: tuple[str, ...]
    content: str
    path: Path

    @property
    def roles(self) -> tuple[str, ...]:
        return tuple(self.columns)

    @property
    def conditions(self) -> tuple[str, ...]:
        return tuple(role for role in self.columns if role not in self.targets)

    def as_file(self) -> dict[str, Any]:
        """What a file of its own would declare this task with."""
        return {
            "summary": self.summary,
            "group": self.group,
            "instruction": list(self.instructions),
            "content": self.content,
            "targets": list(self.targets),
            "columns": {role: list(phrases) for role, phrases in self.columns.items()},
        }

    def sentence(self, order: Sequence[str] | None = None, words: Words = first_phrase) -> str:
        """The task sentence for columns in `order`; each is named with its place in the row.

        >>> task = Task(name="t", group="g", summary="", columns={"depth": ("depth map",),
        ...     "target": ("photo", "picture")}, targets=("target",), content="", path=Path(),
        ...     instructions=("From the {depth} to the {target}.",))
        >>> task.sentence()
        'From the depth map [IMAGE1] to the photo [IMAGE2].'
        """
        order = order or self.roles
        named = {role: f"{words(self.columns[role])} [IMAGE{k}]" for k, role in enumerate(order, 1)}
        return words(self.instructions).format(**named)
