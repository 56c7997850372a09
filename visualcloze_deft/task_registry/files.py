"""The task registry: small TOML files become `Task` values.

A file declares one task, or a family: one task for each role of a set. A task names its columns by
role, in order; the last one is generated, or the last ones that `targets` names. What roles are
called and which sets there are stands in `roles.toml`, once for all tasks of a folder.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from visualcloze_deft.errors import UserError, suggestion
from visualcloze_deft.paths import TASKS
from visualcloze_deft.storage.adapter_places import is_of_adapter
from visualcloze_deft.storage.toml_files import read_toml
from visualcloze_deft.task_registry.task import CONTENTS, NAME, ROLE, Task, first_phrase

ROLES_FILE = "roles.toml"
_KEYS: dict[str, type | tuple[type, ...]] = {
    "summary": str,
    "group": str,
    "instruction": (str, list),
    "content": str,
    "columns": (dict, list),
}
_FAMILY = {"each": str, "name": str, "without": list}
_WORDS: dict[object, str] = {
    str: "text",
    list: "list",
    (str, list): "text or a list of texts",
    (dict, list): "table of phrases or a list of roles",
}


@dataclass(frozen=True, kw_only=True)
class Roles:
    """What `roles.toml` declares.

    phrases: role -> what it is called in a sentence. sets: name of a set -> role -> what that role
    is called in the names of a family's tasks.
    """

    phrases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    sets: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def __or__(self, more: Roles) -> Roles:
        return Roles(phrases={**self.phrases, **more.phrases}, sets={**self.sets, **more.sets})


def read_roles(path: Path) -> Roles:
    """The roles and sets in one `roles.toml`."""
    fields = read_toml(path)
    for key in fields:
        if key not in ("phrases", "sets"):
            raise UserError(f"{path}: unknown key {key!r}; {suggestion(key, ('phrases', 'sets'))}")
        if not isinstance(fields[key], dict):
            raise UserError(f"{path}: {key} must be a table, not {fields[key]!r}")
    phrases = {
        role: _phrases(path, f"phrases.{role}", said)
        for role, said in fields.get("phrases", {}).items()
    }
    sets = {}
    for name, members in fields.get("sets", {}).items():
        if isinstance(members, list) and members:
            members = {str(role): str(role).replace("_", "-") for role in members}
        if not isinstance(members, dict) or not members:
            raise UserError(f"{path}: sets.{name} must be a list of roles, or a table of names")
        for role, said in members.items():
            if not ROLE.fullmatch(role):
                raise UserError(f"{path}: role {role!r}: letters, digits, '_' and '-' only")
            if not isinstance(said, str) or not NAME.fullmatch(said):
                raise UserError(
                    f"{path}: sets.{name}.{role} {said!r}: small letters, digits and '-' only"
                )
        sets[name] = members
    return Roles(phrases=phrases, sets=sets)


def _phrases(path: Path, key: str, said: object) -> tuple[str, ...]:
    found = (said,) if isinstance(said, str) else tuple(said) if isinstance(said, list) else ()
    if not found or not all(isinstance(phrase, str) for phrase in found):
        raise UserError(f"{path}: {key} must be text, or a list of texts, not {said!r}")
    return tuple(map(str, found))


def read_tasks(path: Path, roles: Roles | None = None) -> list[Task]:
    """The task or the family in one file.

    Raises `UserError` that names the file, the key and the way out.
    """
    roles = roles or Roles()
    fields = read_toml(path)
    known = {*_KEYS, *_FAMILY, "targets"}
    for key in fields:
        if key not in known:
            raise UserError(f"{path}: unknown key {key!r}; {suggestion(key, known)}")
    for key, kind in _KEYS.items():
        if key not in fields:
            raise UserError(f"{path}: the key {key!r} is missing")
        if not isinstance(fields[key], kind):
            raise UserError(f"{path}: {key} must be a {_WORDS[kind]}, not {fields[key]!r}")
    if fields["content"] not in CONTENTS:
        raise UserError(
            f"{path}: content {fields['content']!r}; {suggestion(fields['content'], CONTENTS)}"
        )
    if "each" in fields:
        return _family(path, fields, roles)
    for key in ("name", "without"):
        if key in fields:
            raise UserError(f"{path}: {key} goes with 'each'; a single task is called as its file")
    if not NAME.fullmatch(path.stem):
        raise UserError(f"{path}: a task name has small letters, digits and '-' only")
    return [_task(path, path.stem, fields, roles)]


def _family(path: Path, fields: dict[str, Any], roles: Roles) -> list[Task]:
    """One task for each role of the set `each`, whose name stands for that role everywhere."""
    for key, kind in _FAMILY.items():
        if key in fields and not isinstance(fields[key], kind):
            raise UserError(f"{path}: {key} must be a {_WORDS[kind]}, not {fields[key]!r}")
    each, columns = fields["each"], fields["columns"]
    if each not in roles.sets:
        raise UserError(f"{path}: each {each!r} is no set of roles; {suggestion(each, roles.sets)}")
    if not isinstance(columns, list) or each not in columns:
        raise UserError(f"{path}: columns must be a list of roles with {each!r} among them")
    if f"{{{each}}}" not in fields.get("name", ""):
        raise UserError(f"{path}: name must hold {{{each}}}, e.g. name = '{{{each}}}-to-image'")
    members = roles.sets[each]
    for role in fields.get("without", []):
        if role not in members:
            raise UserError(f"{path}: without {role!r}; {suggestion(str(role), members)}")
    found = []
    for role, called in members.items():
        if role in fields.get("without", []):
            continue

        def put(text: str, value: str) -> str:
            return text.replace(f"{{{each}}}", value)

        name = put(fields["name"], called)
        if not NAME.fullmatch(name):
            raise UserError(f"{path}: name {name!r}: small letters, digits and '-' only")
        phrase = first_phrase(roles.phrases.get(role, (role,)))
        instructions = _phrases(path, "instruction", fields["instruction"])
        one = fields | {
            "summary": put(fields["summary"], phrase),
            "instruction": [put(said, f"{{{role}}}") for said in instructions],
            "columns": [role if column == each else column for column in columns],
        }
        if isinstance(fields.get("targets"), list):
            one["targets"] = [role if t == each else t for t in fields["targets"]]
        found.append(_task(path, name, one, roles))
    return found


def _task(path: Path, name: str, fields: Mapping[str, Any], roles: Roles) -> Task:
    columns = _columns(path, fields["columns"], roles)
    instructions = _phrases(path, "instruction", fields["instruction"])
    targets = fields.get("targets", [list(columns)[-1]])
    if not isinstance(targets, list) or not targets or len({*map(str, targets)}) < len(targets):
        raise UserError(f"{path}: targets must be a list of different roles, not {targets!r}")
    named = list(targets)
    for said in instructions:
        if re.search(r"[{}]", re.sub(r"{[^{}]*}", "", said)):
            raise UserError(f"{path}: instruction has a brace without its pair")
        named += re.findall(r"{(.*?)}", said)
    for role in named:
        if not isinstance(role, str) or role not in columns:
            raise UserError(f"{path}: {role!r} is no column; {suggestion(str(role), columns)}")
    of_words = len(columns) == 1 and fields["content"]  # one picture of what its text says
    if len(targets) == len(columns) and not of_words:
        raise UserError(
            f"{path}: every column is a target; leave at least one condition, or one column and "
            "its content"
        )
    if targets != list(columns)[-len(targets) :]:
        raise UserError(f"{path}: targets {targets!r} must be the last columns, in their order")
    return Task(
        name=name,
        group=fields["group"],
        summary=fields["summary"],
        columns=columns,
        targets=tuple(targets),
        instructions=instructions,
        content=fields["content"],
        path=path,
    )


def _columns(path: Path, columns: object, roles: Roles) -> dict[str, tuple[str, ...]]:
    """Role -> phrases: a table says them, a list of roles takes them from `roles.toml`."""
    if isinstance(columns, dict):
        found = {role: _phrases(path, f"columns.{role}", said) for role, said in columns.items()}
    else:
        assert isinstance(columns, list)
        found = {}
        for role in columns:
            if role not in roles.phrases:
                raise UserError(
                    f"{path}: columns: {ROLES_FILE} has no phrase for {role!r}; "
                    f"{suggestion(str(role), roles.phrases)}"
                )
            if role in found:
                raise UserError(f"{path}: columns: {role!r} stands there twice")
            found[role] = roles.phrases[role]
    if not found:
        raise UserError(f"{path}: [columns] is empty; name the roles of a row")
    for role in found:
        if not ROLE.fullmatch(role):
            raise UserError(f"{path}: role {role!r}: letters, digits, '_' and '-' only")
    return found


def load_roles(folders: Iterable[Path] = ()) -> Roles:
    """The shipped roles and sets, then those of `folders` that have any, which may replace them."""
    roles = Roles()
    for folder in (TASKS, *folders):
        roles = roles | _roles_in(folder)
    return roles


def _roles_in(folder: Path) -> Roles:
    if not folder.is_dir():
        raise UserError(f"task folder {folder}: no such folder")
    path = folder / ROLES_FILE
    return read_roles(path) if os.path.lexists(path) else Roles()


def load_tasks(folders: Iterable[Path] = ()) -> dict[str, Task]:
    """All tasks by name, group by group: the shipped ones and those of `folders`.

    No two may have one name. A folder's words do not change the tasks before it.

    The folder `tasks` of an adapter holds the tasks that it was trained on. They replace shipped
    tasks of their names, and give way to a user's own. Raises `UserError` where two adapters were
    trained on different tasks of one name.
    """
    given = [*dict.fromkeys(folders)]
    roles = Roles()
    tasks: dict[str, Task] = {}
    for folder in (TASKS, *(one for one in given if not is_of_adapter(one))):
        roles = roles | _roles_in(folder)
        for task in _tasks_in(folder, roles):
            if task.name in tasks:
                raise UserError(
                    f"{task.path}: a task {task.name!r} is declared in {tasks[task.name].path} "
                    "already; rename one"
                )
            tasks[task.name] = task
    own = {name for name, task in tasks.items() if task.path.parent != TASKS}
    trained = _carried([one for one in given if is_of_adapter(one)], but=own)
    tasks |= {name: task for name, task in trained.items() if not is_same(task, tasks.get(name))}
    return dict(sorted(tasks.items(), key=lambda pair: (pair[1].group, pair[0])))


def _tasks_in(folder: Path, roles: Roles) -> Iterator[Task]:
    for path in sorted(folder.glob("*.toml")):
        if path.name != ROLES_FILE:
            yield from read_tasks(path, roles)


def _carried(folders: Iterable[Path], *, but: Collection[str]) -> dict[str, Task]:
    """The tasks of several adapters, without those that are called as one of `but`."""
    found: dict[str, Task] = {}
    for folder in folders:
        for task in _tasks_in(folder, Roles()):
            if task.name not in but and not is_same(task, found.setdefault(task.name, task)):
                raise UserError(
                    f"{task.path}: another adapter was trained on another task {task.name!r} "
                    f"({found[task.name].path}); give the one that you mean with --task-folder"
                )
    return {name: task for name, task in found.items() if name not in but}


def is_same(task: Task, other: Task | None) -> bool:
    """Whether two tasks say the same, their columns in one order, whichever files declare them."""
    return other is not None and task.roles == other.roles and task.as_file() == other.as_file()
