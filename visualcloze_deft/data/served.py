"""Which tasks data serves, and the command that trains on it."""

from __future__ import annotations

import shlex
import textwrap
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

from visualcloze_deft.config.source_specs import is_of_photos
from visualcloze_deft.data.derive import missing
from visualcloze_deft.data.sources.layouts.reading import AFTER, TARGET
from visualcloze_deft.task_registry.task import Task

Kinds = Counter[frozenset[str]]  # how many items have just these roles
WIDTH = 100  # characters of a line of names
HELD_OUT, ENOUGH = 5, 10  # one in so many is held out of folders with so many units
MOST_PARTS = 8  # names and groups that a command lists, before it says "all"


def served(kinds: Kinds, tasks: Mapping[str, Task]) -> list[str]:
    """Lines that name the tasks that find their roles, by group."""
    lines = ["", "tasks that it serves, by group: how many, and with how many items"]
    for group, counts in counts_by_group(kinds, tasks).items():
        least, most = min(counts.values()), max(counts.values())
        span = f"{least}" if least == most else f"{least} to {most}"
        lines.append(f"  {group:40}{len(counts):3} with {span} items")
        indent = " " * 4
        lines += textwrap.wrap(
            ", ".join(counts),
            WIDTH,
            initial_indent=indent,
            subsequent_indent=indent,
            break_on_hyphens=False,
        )
    if len(lines) == 2:
        asked = [t.name for t in tasks.values() if any(not missing(t.conditions, k) for k in kinds)]
        lines.append(f"  none; it can ask, without truth: {', '.join(asked) or 'nothing'}")
    return lines


def counts_by_group(kinds: Kinds, tasks: Mapping[str, Task]) -> dict[str, dict[str, int]]:
    """Group -> name of a task that is served -> the number of its items."""
    found: dict[str, dict[str, int]] = defaultdict(dict)
    for task in tasks.values():
        if count := sum(n for roles, n in kinds.items() if not missing(task.roles, roles)):
            found[task.group][task.name] = count
    return found


def train_command(
    kinds: Mapping[str, Kinds],
    tasks: Mapping[str, Task],
    folders: Iterable[str],
    *,
    units: Mapping[str, int],
) -> str:
    """The command that trains on the data that serves a task; "" where none does.

    kinds: of each NAME=PATH. folders: with task files of the user's own. units: how many parts,
    held out whole, a user's folders have.
    """
    useful = {spec: own for spec, own in kinds.items() if counts_by_group(own, tasks)}
    if not useful:
        return ""
    words = ["vcdeft", "train", *(word for spec in useful for word in ("--data", spec))]
    if not all(map(is_of_photos, useful)):  # one thing's photos have a run file, which names tasks
        words += ["--tasks", tasks_for(sum(useful.values(), Counter()), tasks)]
    words += [word for folder in folders for word in ("--task-folder", folder)]
    if all(units.get(spec, 0) >= ENOUGH for spec in useful):
        words += ["--validation-every", str(HELD_OUT)]
    return shlex.join([*words, "--output", str(free_output(next(iter(useful))))])


def tasks_for(kinds: Kinds, tasks: Mapping[str, Task]) -> str:
    """What `--tasks` takes: the tasks whose pictures all are in the data; where there are none, or
    too many to list, all that it serves."""
    own = counts_by_group(
        kinds, {n: t for n, t in tasks.items() if any(as_read(t) <= kind for kind in kinds)}
    )
    whole = Counter(task.group for task in tasks.values())
    parts = [
        part
        for group, counts in own.items()
        for part in ([group] if len(counts) == whole[group] > 1 and group not in tasks else counts)
    ]
    return ",".join(parts) if 0 < len(parts) <= MOST_PARTS else "all"


def as_read(task: Task) -> set[str]:
    """The roles of a task, as pictures of a folder have them: "after" is read as the target."""
    return {TARGET if role == AFTER else role for role in task.roles}


def free_output(spec: str) -> Path:
    """A run folder called as the data, which is not there yet."""
    name, _, place = spec.partition("=")
    stem = Path(place).stem if Path(place).exists() and Path(place).stem else name
    path = Path("runs", stem)
    number = 2
    while path.exists():
        path, number = Path("runs", f"{stem}-{number}"), number + 1
    return path
