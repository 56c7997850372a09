"""A table of rows: our own `*.jsonl`, and `metadata.jsonl` or `metadata.csv` of a Hugging Face
imagefolder (https://huggingface.co/docs/datasets/image_dataset#imagefolder).

own          {"depth": "a.png", "target": "b.png", "caption": "...", "instruction": "..."}
             {"task": "relighting", "images": ["x_0.jpg", "x_1.jpg"], "prompt": null}
imagefolder  {"file_name": "b.png", "depth_file_name": "a.png", "text": "..."}
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from visualcloze_deft.data.index import Row
from visualcloze_deft.data.sources.layouts.reading import (
    TARGET,
    TEXTS,
    Reading,
    as_role,
    check_role,
    with_target,
)
from visualcloze_deft.errors import UserError, reading, suggestion
from visualcloze_deft.storage.inside import located, path_inside
from visualcloze_deft.storage.text_files import check_file, parse_json, sound

CSV = "metadata.csv"
SUFFIXES = (".jsonl", ".csv")
FILE = "file_name"  # of an imagefolder: alone it is the target's, behind "depth_" that of depth
SAID = {  # text -> columns that may hold it; of several, the first is read
    "caption": ("caption", "text", "prompt"),
    "instruction": ("instruction", "edit_prompt", "edit"),
}
Named = tuple[dict[str, str], dict[str, str]]  # file names by role, texts by name


def tables_in(path: Path) -> list[Path]:
    """The tables at `path`: that file itself, or all in that folder, sorted."""
    if not path.is_dir():
        return [path] if path.suffix in SUFFIXES else []
    return sorted([*path.glob("*.jsonl"), *path.glob(CSV)])


def fits(path: Path) -> bool:
    return bool(tables_in(path))


def read(path: Path, told: Reading) -> Iterator[Row]:
    """One item per row; paths are relative to the table and lead nowhere but into its folder."""
    tables = tables_in(path)
    if len(same := [table.name for table in tables if table.stem == "metadata"]) > 1:
        raise UserError(f"{path}: both {' and '.join(same)}; keep one of them")
    for table in tables:
        check_file(table)
        told.note(f"items are the rows of {table.name}")
        yield from (read_csv if table.suffix == ".csv" else read_jsonl)(table, told)


def read_jsonl(path: Path, told: Reading) -> Iterator[Row]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                where = f"{path}, line {number}"
                try:
                    yield row_of(path, number, parse_json(where, line), told)
                except UserError as fault:
                    told.on_fault(fault)


def read_csv(path: Path, told: Reading) -> Iterator[Row]:
    """The rows of a table whose first line names its columns; an empty cell is left out."""
    for number, cells in cells_of(path):
        try:
            if None in cells:
                raise UserError(f"{path}, line {number}: more cells than columns")
            yield row_of(path, number, {name: c for name, c in cells.items() if c}, told)
        except UserError as fault:
            told.on_fault(fault)


def cells_of(path: Path) -> Iterator[tuple[int, dict[str | None, str]]]:
    """The number of the last line, and the cells by column, of each row of a .csv."""
    with reading(path, "cannot be read as CSV"), path.open(encoding="utf-8-sig", newline="") as f:
        rows = csv.DictReader(f, strict=True)
        try:
            names = rows.fieldnames or []
            if twice := [name for name in names if names.count(name) > 1]:
                raise UserError(f"{path}: two columns are called {twice[0]!r}")
            yield from ((rows.line_num, cells) for cells in rows)
        except csv.Error as error:
            raise UserError(
                f"{path}, after line {rows.line_num}: not valid CSV ({error})"
            ) from None


def row_of(path: Path, number: int, row: object, told: Reading) -> Row:
    where, folder = f"{path}, line {number}", str(path.parent)
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected an object, {{...}}, not {row!r}")
    if "images" in row:
        names, texts = _edit(where, row)
    elif any(is_file_column(key) for key in row):
        names, texts = _imagefolder(where, row, told)
    else:
        names, texts = _roles(where, row)
    if not names:
        raise UserError(f"{where}: names no picture; expected e.g. {{'target': 'a.png'}}")
    roles = {as_role(role): name for role, name in names.items()}
    if len(roles) < len(names):
        raise UserError(f"{where}: two of {', '.join(names)} are one role; keep one of them")
    paths = {role: _picture(where, folder, role, name) for role, name in roles.items()}
    return Row(key=f"{path.name}:{number}", paths=with_target(paths, told), texts=texts)


def _picture(where: str, folder: str, role: str, name: str) -> str:
    """The path in `folder` of the picture that a row calls `name`, which is there."""
    check_role(where, role)
    found = located(f"{where}: {role}", folder, name)
    if not os.path.isfile(path_inside(folder, found)):
        raise UserError(f"{where}: {role}: no such file {path_inside(folder, found)}")
    return found


def is_file_column(name: str) -> bool:
    """Whether a column of an imagefolder names files: one in each row, or a list of them."""
    return name.removesuffix("s") == FILE or name.removesuffix("s").endswith(f"_{FILE}")


def _imagefolder(where: str, row: Mapping[str, object], told: Reading) -> Named:
    """File names and texts of a row with the columns of an imagefolder. Null is left out."""
    names: dict[str, str] = {}
    for column in filter(is_file_column, row):
        role, value = column.removesuffix(FILE).rstrip("_") or TARGET, row[column]
        if value is None:
            continue
        if column.endswith("s") or not isinstance(value, str):
            raise UserError(f"{where}: {column} must be one path, not {value!r}")
        if role in names:
            raise UserError(f"{where}: file_name and target_file_name both name the target")
        names[role] = value
        told.note(f"{column}: read as {role}")
    texts = texts_in(where, row)
    known = {column for columns in SAID.values() for column in columns}
    for column in row:
        if column not in known and not is_file_column(column):
            told.note(f"{column}: a column that is not read")
    return names, texts


def texts_in(where: str, row: Mapping[str, object]) -> dict[str, str]:
    """The texts in an object that others wrote; null and "" are left out."""
    texts = {}
    for name, columns in SAID.items():
        for column in columns:
            if not isinstance(value := row.get(column), str | None):
                raise UserError(f"{where}: {column} must be text, not {value!r}")
        if found := [said for column in columns if (said := str(row.get(column) or ""))]:
            texts[name] = sound(found[0]).strip()
    return texts


def _roles(where: str, row: Mapping[str, object]) -> Named:
    """File names and texts of a row whose keys are roles, "caption" and "instruction"."""
    for key, value in row.items():
        if not isinstance(value, str):
            kind = "text" if key in TEXTS else "the path of a picture"
            raise UserError(f"{where}: {key} must be {kind}, not {value!r}")
    texts = {key: sound(str(row[key])) for key in TEXTS if key in row}
    return {key: str(value) for key, value in row.items() if key not in TEXTS}, texts


def _edit(where: str, row: Mapping[str, object]) -> Named:
    """File names and texts of a row of "images" in order; the last one is the result."""
    known = ("task", "images", "prompt")
    for key in row:
        if key not in known:
            raise UserError(
                f"{where}: unknown key {key!r} beside 'images'; {suggestion(key, known)}"
            )
    names, prompt = row["images"], row.get("prompt")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise UserError(f"{where}: images must be a list of paths, not {names!r}")
    for key in ("task", "prompt"):
        if not isinstance(row.get(key), str | None):
            raise UserError(f"{where}: {key} must be text or null, not {row[key]!r}")
    before = ["before"] if len(names) == 2 else [f"image_{k}" for k in range(1, len(names))]
    said = sound(str(prompt or ""))
    texts = {"instruction": said, "caption": said} if said else {}
    return dict(zip([*before, "target"], names, strict=True)), texts
