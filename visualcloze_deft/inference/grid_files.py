"""Grids written as files that `vcdeft infer` takes."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from visualcloze_deft.data.example import Example
from visualcloze_deft.errors import UserError
from visualcloze_deft.storage.atomic import check_foreign, output_folder, write_png, write_text


def write_grids(examples: Iterable[Example], folder: Path) -> Path:
    """The pictures of `examples` and a grid file for `vcdeft infer`; a truth that is known stays
    beside it."""
    path = folder / "grid.json"
    if path.exists():
        raise UserError(f"--output {folder}: holds grids already; choose another")
    check_foreign(folder, (), what="grids of vcdeft")
    output_folder(folder)
    written: list[Path] = []
    try:
        entries = [
            written_grid(example, folder, number, written)
            for number, example in enumerate(examples, 1)
        ]
        write_text(path, json.dumps(entries, indent=1))
    except BaseException:  # a full disk, or data that is broken: pictures alone are of no use
        for picture in written:
            picture.unlink(missing_ok=True)
        raise
    return path


def written_grid(
    example: Example, folder: Path, number: int, written: list[Path]
) -> dict[str, Any]:
    """The entry of a grid in its file; its pictures are written, their paths put to `written`."""
    rows: list[list[str | None]] = []
    for r, row in enumerate(example.rows):
        names: list[str | None] = []
        for c, image in enumerate(row):
            hidden = r == len(example.rows) - 1 and example.hidden[c]
            name = f"{number:03d}-{r + 1}{c + 1}{'-truth' if hidden else ''}.png"
            if image is not None:
                write_png(folder / name, image)
                written.append(folder / name)
            names.append(None if hidden else name)
        rows.append(names)
    return {
        "task": example.task,
        "content_prompt": example.content or None,
        "rows": rows,
        "seed": example.index,
    }
