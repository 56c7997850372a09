"""Which tasks a user means: names, groups, patterns and weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from fnmatch import fnmatchcase

from visualcloze_deft.errors import UserError
from visualcloze_deft.task_registry.task import Task

NEAR = 0.75  # difflib's ratio; above its usual 0.6, as many names share "-to-image"


def select(tasks: Mapping[str, Task], wanted: str) -> dict[str, float]:
    """Names and weights of the tasks that `wanted` says.

    Parts joined by commas: "all", names, groups, and patterns of either with `*` (also
    "GROUP/NAME"); "-" before a part takes tasks out, "=2" behind it draws them twice as often.

    >>> from visualcloze_deft.task_registry.files import load_tasks
    >>> list(select(load_tasks(), "depth-to-image=2,image-editing,-depth-editing").items())
    [('depth-to-image', 2.0), ('image-editing', 1.0)]
    """
    groups = {task.group for task in tasks.values()}
    chosen: dict[str, float] = {}
    for part in (part.strip() for part in wanted.split(",")):
        if not part:
            continue
        pattern, equals, said = part.removeprefix("-").partition("=")
        pattern = pattern.strip()
        found = matching(tasks, pattern)
        if not found:
            known = {*tasks, *groups, "all"}
            raise UserError(f"unknown task {pattern!r}; {way_out(pattern, known)}")
        if part.startswith("-"):
            chosen = {name: weight for name, weight in chosen.items() if name not in found}
        else:
            weight = _weight(part, said) if equals else 1.0
            for name in found:
                chosen[name] = weight if equals else chosen.get(name, weight)
    if not chosen:
        raise UserError(f"no task named in {wanted!r}; 'vcdeft tasks list' shows them")
    return chosen


def way_out(name: str, known: Iterable[str]) -> str:
    """The end of a message on an unknown task: the one that was meant, and where tasks are found.

    >>> way_out("dept-to-image", ["depth-to-image", "canny-to-image"])
    "did you mean depth-to-image? 'vcdeft tasks list' shows all; --task-folder DIR adds your own"
    >>> way_out("day-to-night", ["canny-to-image"])
    "'vcdeft tasks list' shows all; --task-folder DIR adds your own"
    """
    close = get_close_matches(name, known, n=1, cutoff=NEAR)
    meant = f"did you mean {close[0]}? " if close else ""
    return f"{meant}'vcdeft tasks list' shows all; --task-folder DIR adds your own"


def matching(tasks: Mapping[str, Task], pattern: str) -> list[str]:
    """The task called `pattern`; without one, those of that group, or those its `*` fits."""
    if pattern in tasks:
        return [pattern]
    return [
        task.name
        for task in tasks.values()
        if pattern == "all"
        or any(
            fnmatchcase(n, pattern) for n in (task.name, task.group, f"{task.group}/{task.name}")
        )
    ]


def _weight(part: str, said: str) -> float:
    try:
        weight = float(said)
    except ValueError:
        weight = -1.0
    if not 0 <= weight < float("inf"):
        raise UserError(f"tasks {part!r}: give a weight of 0 or more behind '='")
    return weight
