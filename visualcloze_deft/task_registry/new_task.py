"""A task file to start from, for `vcdeft tasks new`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from visualcloze_deft.errors import UserError
from visualcloze_deft.storage.atomic import output_folder, write_text
from visualcloze_deft.task_registry.files import load_tasks, read_tasks
from visualcloze_deft.task_registry.task import NAME, ROLE

PLACEHOLDER = "One line for 'vcdeft tasks list'."
TEMPLATE = """\
# The task {name}: vcdeft tasks check {path}
summary = "{summary}"
group = "own"  # tasks of one group are drawn as often as those of another

# The task sentence. {{ROLE}} becomes the first phrase of that column and its place in the grid.
# Several sentences in a list are drawn at random in training; inference says the first.
instruction = {instruction}

# The text that describes the result: "caption", "instruction" (what is to be done), or "" for none.
# A folder holds it beside the picture: 0001.txt, or 0001_instruction.txt.
content = "caption"
{targets}
# The columns of a row, in order. A column is a role: the sub-folder, file ending or key that your
# data has. Its phrases say what the picture is; {last}.
[columns]
{columns}
"""


def write_new_task(
    name: str, columns: Sequence[str], folder: Path, *, targets: Sequence[str] = ()
) -> Path:
    """Write FOLDER/NAME.toml, a task with these columns whose sentences are to be edited.

    targets: the columns that are generated, the last one where not named. Raises `UserError` for a
    name that is taken, or columns that make no task; nothing is written then.
    """
    if not NAME.fullmatch(name):
        raise UserError(f"task name {name!r}: small letters, digits and '-' only")
    for role in columns:
        if not ROLE.fullmatch(role):
            raise UserError(f"--columns {role!r}: letters, digits, '_' and '-' only")
        if columns.count(role) > 1:
            raise UserError(f"--columns {role!r}: named twice; every column has a role of its own")
    chosen = list(targets) or [*columns[-1:]]
    conditions = [role for role in columns if role not in chosen]
    if not conditions or not chosen or [*columns[len(conditions) :]] != chosen:
        raise UserError(
            f"--columns {','.join(columns)}: give one column that is shown and one that is "
            "generated, e.g. before,after; those of --targets come last, in their order"
        )
    known = load_tasks([folder] if folder.is_dir() else [])
    path = folder / f"{name}.toml"
    if path.exists():
        raise UserError(f"{path}: exists already; edit it, or choose another name")
    if name in known:
        raise UserError(f"task {name!r} exists already ({known[name].path}); choose another name")
    output_folder(folder)
    write_text(path, text_of(name, columns, chosen, path))
    read_tasks(path)
    return path


def text_of(name: str, columns: Sequence[str], targets: Sequence[str], path: Path) -> str:
    """The text of a task file with comments."""
    conditions = columns[: len(columns) - len(targets)]
    sentence = f"From the {listed(conditions)} to the {listed(targets)}."
    several = "those that `targets` names are generated" if len(targets) > 1 else ""
    return TEMPLATE.format(
        summary=PLACEHOLDER,
        name=name,
        path=path,
        instruction=json.dumps(sentence),
        targets=f"targets = {json.dumps(list(targets))}\n" if len(targets) > 1 else "",
        last=several or "the last one is generated",
        columns="\n".join(f'{role} = ["{said(role)}"]' for role in columns),
    )


def listed(roles: Sequence[str]) -> str:
    """
    >>> listed(["depth", "style", "mask"])
    '{depth}, the {style} and the {mask}'
    """
    *first, last = [f"{{{role}}}" for role in roles]
    return f"{', the '.join(first)} and the {last}" if first else last


def said(role: str) -> str:
    """What a role is called until the user says better."""
    words = role.replace("_", " ").replace("-", " ").strip()
    return words if words.endswith(("image", "photo", "map", "mask")) else f"{words} image"
