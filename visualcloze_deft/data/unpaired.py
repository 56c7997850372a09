"""Roles of a user's folder that no task pairs, and the task file that would."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence

from visualcloze_deft.data.base import Source
from visualcloze_deft.data.derive import DERIVED, missing
from visualcloze_deft.data.eligible import unused_sources
from visualcloze_deft.errors import UserError
from visualcloze_deft.task_registry.task import ROLE, Task

OWN = "folder"  # the source whose roles a user names
FIRST = ("before", "input", "source", "original")  # roles that sound like what is shown,
LAST = ("after", "output", "result", "edited", "target")  # and like what is generated from it
MOST = 3  # tasks that are proposed for one source


def missing_tasks(source: Source, tasks: Mapping[str, Task]) -> list[str]:
    """A line for each task that a user's folder lacks, see `missing_tasks_for`."""
    counts = {roles: len(indices) for roles, indices in source.kinds.items()}
    return missing_tasks_for(source.name, counts, tasks)


def missing_tasks_for(
    source: str, counts: Mapping[frozenset[str], int], tasks: Mapping[str, Task]
) -> list[str]:
    """A line for each task that is missing, with the command that writes it: the one for most
    items first. Of sources whose roles are ours, none is.

    counts: how many items of the source have just these roles.
    """
    found: Counter[tuple[str, ...]] = Counter()
    for roles, count in counts.items() if source == OWN else ():
        if columns := unpaired_columns(roles, tasks):
            found[columns] += count
    return [task_to_write(source, columns) for columns, _ in found.most_common(MOST)]


def unpaired_columns(roles: frozenset[str], tasks: Mapping[str, Task]) -> tuple[str, ...]:
    """The columns of the task that items with these roles lack: those that none of `tasks` shows
    or generates, beside the target if they have one. Empty where every role is of use."""
    served = [task for task in tasks.values() if not missing(task.roles, roles)]
    asking = [task for task in tasks.values() if not missing(task.conditions, roles)]
    used = {role for task in served for role in needed(task.roles, roles)}
    known = used | {role for task in asking for role in needed(task.conditions, roles)}
    if len(roles) < 2 or not roles - known:
        return ()
    columns = (roles - used) | (roles & {"target"})
    if len(columns) == 1:
        columns |= {min(used)}
    return tuple(sorted(columns, key=place))


def needed(wanted: Sequence[str], roles: Collection[str]) -> set[str]:
    """Of `roles`, those that `wanted` are, or are computed from."""
    return {
        need
        for role in wanted
        for need in ((role,) if role in roles or role not in DERIVED else DERIVED[role].needs)
    }


def place(role: str) -> tuple[int, str]:
    """What columns are sorted by: what is shown, other roles by name, what is generated."""
    word = role.lower()
    shown = FIRST.index(word) - len(FIRST) if word in FIRST else 0
    return (1 + LAST.index(word) if word in LAST else shown), role


def check_paired(
    tasks: Mapping[str, Task], sources: Sequence[Source], known: Mapping[str, Task]
) -> None:
    """Raise `UserError` where a folder that serves none of `tasks` holds pairs that no task of
    `known` names: its pictures would be asked for without their truth."""
    for source in unused_sources(tasks, sources):
        if lines := missing_tasks(source, known):
            raise UserError(lines[0])


def task_to_write(source: str, columns: Sequence[str]) -> str:
    """What to say of a folder whose pairs no task names.

    >>> task_to_write("folder", ["lit", "unlit"]).partition("; ")[2]
    'write one: vcdeft tasks new NAME --columns lit,unlit'
    """
    for role in columns:
        if not ROLE.fullmatch(role):
            return (
                f"no task can name the role {role!r} of {source}: a role is letters, digits, '_' "
                "and '-', and begins with no digit; rename it"
            )
    *shown, made = columns
    return (
        f"no task pairs {' + '.join(shown)} -> {made} of {source}; write one: "
        f"vcdeft tasks new NAME --columns {','.join(columns)}"
    )
