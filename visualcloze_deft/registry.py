"""The task registry: one small TOML file per task becomes one `Task` value.

A task names its columns by role, in order; the last one is generated, or the last ones that
`targets` names.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from visualcloze_deft.errors import UserError, nearest
from visualcloze_deft.folders import TASKS

NAME = re.compile(r"[a-z0-9][a-z0-9-]*")
ROLE = re.compile(r"[A-Za-z_][\w-]*")  # what str.format takes as one name
CONTENTS = ("", "caption", "instruction")
_KEYS = {"summary": str, "group": str, "instruction": str, "content": str, "columns": dict}


@dataclass(frozen=True, kw_only=True)
class Task:
    """What one row of a grid holds and how it is said in words.

    columns: role -> phrase, in the order of the grid. instruction: the task sentence, with
    `{role}` where a column is named. content: the item text ("caption", "instruction") that the
    content sentence holds, or "" for none.
    """

    name: str
    group: str
    summary: str
    columns: Mapping[str, str]
    targets: tuple[str, ...]
    instruction: str
    content: str
    path: Path

    @property
    def roles(self) -> tuple[str, ...]:
        return tuple(self.columns)

    def sentence(self, order: Sequence[str] | None = None) -> str:
        """The task sentence for columns in `order`; each is named with its place in the row.

        >>> task = Task(name="t", group="g", summary="", columns={"depth": "depth map",
        ...     "target": "photo"}, targets=("target",), content="", path=Path(),
        ...     instruction="From the {depth} to the {target}.")
        >>> task.sentence()
        'From the depth map [IMAGE1] to the photo [IMAGE2].'
        """
        order = order or self.roles
        named = {role: f"{self.columns[role]} [IMAGE{k}]" for k, role in enumerate(order, 1)}
        return self.instruction.format(**named)


def read_task(path: Path) -> Task:
    """The task in one file; raises `UserError` that names the file, the key and the way out."""
    try:
        fields = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path}: not valid TOML: {error}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    known = {*_KEYS, "targets"}
    for key in fields:
        if key not in known:
            raise UserError(f"{path}: unknown key {key!r}; {nearest(key, known)}")
    for key, kind in _KEYS.items():
        if key not in fields:
            raise UserError(f"{path}: the key {key!r} is missing")
        if not isinstance(fields[key], kind):
            raise UserError(f"{path}: {key} must be a {_WORDS[kind]}, not {fields[key]!r}")
    if fields["content"] not in CONTENTS:
        raise UserError(
            f"{path}: content {fields['content']!r}; {nearest(fields['content'], CONTENTS)}"
        )
    if not NAME.fullmatch(path.stem):
        raise UserError(f"{path}: a task name has small letters, digits and '-' only")
    columns = fields["columns"]
    if len(columns) < 2:
        raise UserError(f"{path}: [columns] needs at least two roles, found {len(columns)}")
    for role, phrase in columns.items():
        if not ROLE.fullmatch(role):
            raise UserError(f"{path}: role {role!r}: letters, digits, '_' and '-' only")
        if not isinstance(phrase, str):
            raise UserError(f"{path}: columns.{role} must be text, not {phrase!r}")
    targets = fields.get("targets", [list(columns)[-1]])
    if not isinstance(targets, list) or not targets or len({*map(str, targets)}) < len(targets):
        raise UserError(f"{path}: targets must be a list of different roles, not {targets!r}")
    if re.search(r"[{}]", re.sub(r"{[^{}]*}", "", fields["instruction"])):
        raise UserError(f"{path}: instruction has a brace without its pair")
    for role in [*targets, *re.findall(r"{(.*?)}", fields["instruction"])]:
        if not isinstance(role, str) or role not in columns:
            raise UserError(f"{path}: {role!r} is no column; {nearest(str(role), columns)}")
    if len(targets) == len(columns):
        raise UserError(f"{path}: every column is a target; leave at least one condition")
    if targets != list(columns)[-len(targets) :]:
        raise UserError(f"{path}: targets {targets!r} must be the last columns, in their order")
    return Task(
        name=path.stem,
        group=fields["group"],
        summary=fields["summary"],
        columns=columns,
        targets=tuple(targets),
        instruction=fields["instruction"],
        content=fields["content"],
        path=path,
    )


_WORDS = {str: "text", dict: "table"}


def load_tasks(folders: Iterable[Path] = ()) -> dict[str, Task]:
    """All tasks by name: the shipped ones, then those of `folders`, which may replace them."""
    tasks = {}
    for folder in (TASKS, *folders):
        if not folder.is_dir():
            raise UserError(f"task folder {folder}: no such folder")
        for path in sorted(folder.glob("*.toml")):
            task = read_task(path)
            tasks[task.name] = task
    return dict(sorted(tasks.items(), key=lambda pair: (pair[1].group, pair[0])))


def select(tasks: Mapping[str, Task], wanted: str) -> dict[str, Task]:
    """The tasks named by `wanted`: "all", or names and groups joined by commas."""
    if wanted == "all":
        return dict(tasks)
    groups = {task.group for task in tasks.values()}
    chosen = {}
    for name in (part.strip() for part in wanted.split(",") if part.strip()):
        if name in tasks:
            chosen[name] = tasks[name]
        elif name in groups:
            chosen.update({k: task for k, task in tasks.items() if task.group == name})
        elif name == "all":
            chosen.update(tasks)
        else:
            raise UserError(f"unknown task {name!r}; {nearest(name, {*tasks, *groups, 'all'})}")
    if not chosen:
        raise UserError(f"no task named in {wanted!r}; 'vcdeft tasks list' shows them")
    return chosen
