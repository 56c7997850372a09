"""The file that `vcdeft infer --examples` reads: one grid or a list of them, in JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from visualcloze_deft import grid
from visualcloze_deft.data.images import as_rgb, read_image
from visualcloze_deft.errors import UserError, nearest
from visualcloze_deft.prompt import Prompt
from visualcloze_deft.registry import Task

_KEYS: dict[str, tuple[type, ...]] = {
    "task": (str, type(None)),
    "task_prompt": (str, type(None)),
    "content_prompt": (str, type(None)),
    "rows": (list,),
    "seed": (int, type(None)),
}


@dataclass(frozen=True, kw_only=True)
class Request:
    """One grid to complete, checked: rows end in the query, None marks what to generate.

    paths: where each image of `rows` was read, () where they were given as images.
    """

    rows: tuple[tuple[Image.Image | None, ...], ...]
    paths: tuple[tuple[Path | None, ...], ...] = ()
    task: str | None = None
    task_prompt: str
    content_prompt: str
    seed: int

    @property
    def prompt(self) -> Prompt:
        rows, columns = len(self.rows), len(self.rows[0])
        return Prompt(
            rows=rows, columns=columns, task=self.task_prompt, content=self.content_prompt
        )

    @property
    def targets(self) -> tuple[int, ...]:
        """The columns of the last row that are generated."""
        return tuple(c for c, image in enumerate(self.rows[-1]) if image is None)


def request(
    rows: list[list[Image.Image | None]],
    tasks: Mapping[str, Task],
    *,
    task: str | None = None,
    task_prompt: str | None = None,
    content_prompt: str | None = None,
    seed: int = 0,
) -> Request:
    """Check one grid. `task` names a registered task; `task_prompt` says the instruction itself.

    Images of any mode become 8-bit RGB as files do: see `images.as_rgb`.
    """
    grid.check_rows(rows)
    for r, row in enumerate(rows, 1):
        for image in row:
            if not isinstance(image, Image.Image | None):
                raise UserError(f"row {r}: a cell is a PIL image or None, not {image!r}")
    rows = [[image and as_rgb("an image of the rows", image) for image in row] for row in rows]
    if not 0 <= seed < 2**63:
        raise UserError(f"seed must be between 0 and 2**63 - 1, not {seed}")
    if task is not None:
        if task not in tasks:
            raise UserError(f"unknown task {task!r}; {nearest(task, tasks)}")
        roles = tasks[task].roles
        if len(roles) != len(rows[0]):
            raise UserError(
                f"task {task} has {len(roles)} columns ({', '.join(roles)}), the rows have "
                f"{len(rows[0])}"
            )
        task_prompt = task_prompt if task_prompt is not None else tasks[task].sentence()
    return Request(
        rows=tuple(tuple(row) for row in rows),
        task=task,
        task_prompt=task_prompt or "",
        content_prompt=content_prompt or "",
        seed=seed,
    )


def read_requests(path: Path, tasks: Mapping[str, Task], *, seed: int | None) -> list[Request]:
    """All grids of a file; `seed` replaces theirs. Errors name file, grid and key."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"examples {path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"examples {path}: cannot be read: {error}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, too
        raise UserError(f"{path}: not valid JSON: {error}") from None
    entries = content if isinstance(content, list) else [content]
    if not entries:
        raise UserError(f"{path}: the list of grids is empty")
    requests = []
    for number, entry in enumerate(entries, 1):
        where = f"{path}, grid {number}" if isinstance(content, list) else str(path)
        try:
            requests.append(_read_entry(entry, path.parent, tasks, seed))
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
    return requests


def _read_entry(entry: Any, folder: Path, tasks: Mapping[str, Task], seed: int | None) -> Request:
    if not isinstance(entry, dict):
        raise UserError(f"expected an object with the key 'rows', found {entry!r}")
    for key, value in entry.items():
        if key not in _KEYS:
            raise UserError(f"unknown key {key!r}; {nearest(key, _KEYS)}")
        if not isinstance(value, _KEYS[key]) or isinstance(value, bool):
            kinds = " or ".join(_WORDS[kind] for kind in _KEYS[key])
            raise UserError(f"{key} must be {kinds}, not {value!r}")
    if "rows" not in entry:
        raise UserError("the key 'rows' is missing")
    paths: list[tuple[Path | None, ...]] = []
    for r, row in enumerate(entry["rows"], 1):
        if not isinstance(row, list):
            raise UserError(f"row {r} must be a list of paths, not {row!r}")
        for cell in row:
            if not isinstance(cell, str | None):
                raise UserError(f"row {r}: a cell is a path or null, not {cell!r}")
        paths.append(tuple(None if cell is None else (folder / cell).absolute() for cell in row))
    rows = [[None if path is None else read_image(path) for path in row] for row in paths]
    own = entry.get("seed")
    asked = request(
        rows,
        tasks,
        task=entry.get("task"),
        task_prompt=entry.get("task_prompt"),
        content_prompt=entry.get("content_prompt"),
        seed=seed if seed is not None else own or 0,
    )
    return replace(asked, paths=tuple(paths))


_WORDS = {str: "text", type(None): "null", list: "a list", int: "a whole number"}
