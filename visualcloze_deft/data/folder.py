"""The source `folder`: a user's own pictures, paired by a table, by subfolder or by suffix.

    rows.jsonl               {"depth": "a.png", "target": "b.png", "caption": "...", ...}
                             {"task": "relighting", "images": ["x_0.jpg", "x_1.jpg"], "prompt": null}
    depth/0001.png           target/0001.png           caption/0001.txt   instruction/0001.txt
    0001_depth.png           0001_target.png           0001.txt           0001_instruction.txt
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from visualcloze_deft.data.images import images_in, listing, read_image
from visualcloze_deft.data.item import Item
from visualcloze_deft.errors import UserError, nearest

# Where the texts of the item called {0} may stand. The first file found counts.
TEXTS = {
    "caption": ("{0}.txt", "caption/{0}.txt", "target/{0}.txt"),
    "instruction": ("{0}_instruction.txt", "instruction/{0}.txt"),
}
# A suffix is one word, or one of the roles that hold an underscore themselves.
_SUFFIXED = re.compile(r"(.+?)_(view_turned|style_image|style_reference|image_\d+|[a-z][a-z0-9]*)")
_LAYOUTS = "a table *.jsonl, subfolders depth/0001.png, or suffixes 0001_depth.png"


@dataclass(frozen=True, kw_only=True)
class Row:
    """What the folder holds of one item."""

    key: str
    images: Mapping[str, Path]
    texts: Mapping[str, str]


class Folder:
    """The source `folder` at `path`: a folder in one of the three layouts, or a .jsonl file."""

    name = "folder"

    def __init__(self, path: Path) -> None:
        if path.suffix == ".jsonl" and path.is_file():
            self.rows = read_table(path)
        elif path.is_dir():
            self.rows = read_folder(path)
        else:
            raise UserError(f"{path}: no such folder or .jsonl file")
        if not self.rows:
            raise UserError(f"{path}: expected {_LAYOUTS}; found {listing(path.parent)}")
        self.roles = frozenset(role for row in self.rows for role in row.images)

    def __len__(self) -> int:
        return len(self.rows)

    def item(self, index: int) -> Item:
        row = self.rows[index]
        images = {role: partial(read_image, path) for role, path in row.images.items()}
        return Item(key=row.key, images=images, texts=row.texts)


def read_folder(root: Path) -> list[Row]:
    """The rows of the tables in `root`; without any, those of its subfolders or suffixes."""
    tables = sorted(root.glob("*.jsonl"))
    if tables:
        return [row for table in tables for row in read_table(table)]
    by_stem: dict[str, dict[str, Path]] = defaultdict(dict)
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        for stem, path in images_in(folder).items():
            by_stem[stem][folder.name] = path
    loose = images_in(root)
    if by_stem and loose:
        raise UserError(f"{root}: pictures both in subfolders and beside them; keep one layout")
    for stem, path in loose.items():
        parts = _SUFFIXED.fullmatch(stem)
        if parts is None:
            raise UserError(f"{path}: expected a role at the end, such as {stem}_target")
        by_stem[parts[1]][parts[2]] = path
    return [_paired(root, stem, images) for stem, images in sorted(by_stem.items())]


def _paired(root: Path, stem: str, images: Mapping[str, Path]) -> Row:
    if len(images) == 1 and "target" not in images:
        [path] = images.values()
        raise UserError(f"{path}: stands alone; no other role has a picture called {stem!r}")
    texts = {}
    for name, places in TEXTS.items():
        for path in (root / place.format(stem) for place in places):
            if name not in texts and path.is_file():
                texts[name] = _read_text(path)
    return Row(key=stem, images=images, texts=texts)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text: {error}") from None


def read_table(path: Path) -> list[Row]:
    """One row per line of a .jsonl file; paths are relative to the file."""
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            fields = json.loads(line)
        except ValueError as error:
            raise UserError(f"{where}: not valid JSON: {error}") from None
        if not isinstance(fields, dict):
            raise UserError(f"{where}: expected an object {{...}}, found {fields!r}")
        names, texts = _edit(where, fields) if "images" in fields else _roles(where, fields)
        images = {role: path.parent / name for role, name in names.items()}
        for role, image in images.items():
            if not image.is_file():
                raise UserError(f"{where}: {role}: no such file {image}")
        rows.append(Row(key=f"{path.name}:{number}", images=images, texts=texts))
    return rows


def _roles(where: str, fields: Mapping[str, object]) -> tuple[dict[str, str], dict[str, str]]:
    """File names and texts of a row whose keys are roles, "caption" and "instruction"."""
    for key, value in fields.items():
        if not isinstance(value, str):
            kind = "text" if key in TEXTS else "the path of a picture"
            raise UserError(f"{where}: {key} must be {kind}, not {value!r}")
    texts = {key: str(fields[key]) for key in TEXTS if key in fields}
    names = {key: str(value) for key, value in fields.items() if key not in TEXTS}
    if not names:
        raise UserError(f"{where}: names no picture; expected e.g. {{'target': 'a.png'}}")
    return names, texts


def _edit(where: str, fields: Mapping[str, object]) -> tuple[dict[str, str], dict[str, str]]:
    """File names and texts of a row of "images" in order; the last one is the result."""
    known = ("task", "images", "prompt")
    for key in fields:
        if key not in known:
            raise UserError(f"{where}: unknown key {key!r} beside 'images'; {nearest(key, known)}")
    names, prompt = fields["images"], fields.get("prompt")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise UserError(f"{where}: images must be a list of paths, not {names!r}")
    if prompt is not None and not isinstance(prompt, str):
        raise UserError(f"{where}: prompt must be text or null, not {prompt!r}")
    before = ["before"] if len(names) == 2 else [f"image_{k}" for k in range(1, len(names))]
    texts = {} if prompt is None else {"instruction": prompt, "caption": prompt}
    return dict(zip([*before, "target"], names, strict=True)), texts
