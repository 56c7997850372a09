"""Roles of a user's folder that no task pairs, and the task file that would."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from visualcloze_deft.data.base import Source
from visualcloze_deft.data.derive import DERIVED, missing
from visualcloze_deft.data.eligible import unused_sources
from visualcloze_deft.errors import UserError
from visualcloze_deft.task_registry.task import Task

OWN = "folder"  # the source whose roles a user names


def unpaired_columns(source: Source, tasks: Mapping[str, Task]) -> tuple[str, ...]:
    """The columns of a task that is missing: those roles of items that none of `tasks` shows or
    generates, with the target last. Empty where every role is of use."""
    if source.name != OWN:
        return ()
    for roles in source.kinds:
        served = [task for task in tasks.values() if not missing(task.roles, roles)]
        asking = [task for task in tasks.values() if not missing(task.conditions, roles)]
        used = {role for task in served for role in needed(task.roles)}
        known = used | {role for task in asking for role in needed(task.conditions)}
        if len(roles) > 1 and roles - known:
            columns = sorted(roles - used - {"target"}, key=lambda role: (is_result(role), role))
            return (*columns, "target") if "target" in roles else tuple(columns)
    return ()


def check_paired(
    tasks: Mapping[str, Task], sources: Sequence[Source], known: Mapping[str, Task]
) -> None:
    """Raise `UserError` where a folder that serves none of `tasks` holds pairs that no task of
    `known` names: its pictures would be asked for without their truth."""
    for source in unused_sources(tasks, sources):
        if columns := unpaired_columns(source, known):
            raise UserError(task_to_write(source, columns))


def needed(roles: Sequence[str]) -> set[str]:
    """Roles, and those that they can be computed from."""
    return {*roles, *(need for role in roles if role in DERIVED for need in DERIVED[role].needs)}


def is_result(role: str) -> bool:
    """Whether a role sounds like the picture that is to be generated."""
    return role in ("after", "output", "result", "edited")


def task_to_write(source: Source, columns: Sequence[str]) -> str:
    """What to say of a folder whose pairs no task names."""
    *shown, made = columns
    return (
        f"no task pairs {' + '.join(shown)} -> {made} of {source.name}; write one: "
        f"vcdeft tasks new NAME --columns {','.join(columns)}"
    )
