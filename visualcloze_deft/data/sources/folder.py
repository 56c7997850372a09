"""The source `folder`: a user's own pictures, paired by a table, by subfolder or by suffix.

rows.jsonl      {"depth": "a.png", "target": "b.png", "caption": "...", "instruction": "..."}
                {"task": "relighting", "images": ["x_0.jpg", "x_1.jpg"], "prompt": null}
subfolders      depth/0001.png  target/0001.png  caption/0001.txt  instruction/0001.txt
suffixes        0001_depth.png  0001_target.png  0001.txt  0001_instruction.txt
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

from visualcloze_deft.data.index import Indexed, Row, index, key_of_files, key_of_names
from visualcloze_deft.errors import UserError, suggestion
from visualcloze_deft.images.reading import folders_in, images_in, listing
from visualcloze_deft.storage.inside import located, path_inside
from visualcloze_deft.storage.text_files import check_file, parse_json, read_text, sound

# Where the texts of the item called {0} may stand. The first file found counts.
TEXTS = {
    "caption": ("{0}.txt", "caption/{0}.txt", "target/{0}.txt"),
    "instruction": ("{0}_instruction.txt", "instruction/{0}.txt"),
}
# A suffix is one word, or one of the roles that hold an underscore themselves.
_SUFFIXED = re.compile(r"(.+?)_(view_turned|style_image|style_reference|image_\d+|[a-z][a-z0-9]*)")
_LAYOUTS = "a table *.jsonl, subfolders depth/0001.png, or suffixes 0001_depth.png"


class Folder(Indexed):
    """The source `folder` at `path`: a folder in one of the three layouts, or a .jsonl file.

    cache: where its index is kept, see `index`.
    """

    def __init__(self, path: Path, *, cache: Path | None = None) -> None:
        tables = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
        if not path.is_dir() and not (path.is_file() and path.suffix == ".jsonl"):
            raise UserError(f"{path}: no such folder or .jsonl file")
        folder = path if path.is_dir() else path.parent
        if tables:
            rows = index(
                lambda: (row for table in tables for row in read_table(table)),
                key=lambda: key_of_files(tables),
                cache=cache,
            )
        else:
            rows = index(lambda: read_folder(path), key=lambda: key_of_names(path), cache=cache)
        if not rows.num_rows:
            found = listing(path) if path.is_dir() else "no row"
            raise UserError(f"{path}: expected {_LAYOUTS}; found {found}")
        super().__init__("folder", folder, rows)


def read_folder(root: Path) -> Iterator[Row]:
    """The items in subfolders of `root`, or of its pictures' suffixes."""
    by_stem: dict[str, dict[str, str]] = defaultdict(dict)
    for folder in folders_in(root):
        pictures = images_in(folder)
        if pictures:
            _check_role(str(folder), folder.name)
        for stem, path in pictures.items():
            by_stem[stem][folder.name] = f"{folder.name}/{path.name}"
    loose = images_in(root)
    if by_stem and loose:
        raise UserError(f"{root}: pictures both in subfolders and beside them; keep one layout")
    for stem, path in loose.items():
        parts = _SUFFIXED.fullmatch(stem)
        if parts is None:
            raise UserError(f"{path}: expected a role at the end, such as {stem}_target")
        by_stem[parts[1]][parts[2]] = path.name
    return (_paired(root, stem, paths) for stem, paths in sorted(by_stem.items()))


def _paired(root: Path, stem: str, paths: Mapping[str, str]) -> Row:
    if len(paths) == 1 and "target" not in paths:
        [name] = paths.values()
        raise UserError(f"{root / name}: stands alone; no other role has a picture called {stem!r}")
    texts = {}
    for name, places in TEXTS.items():
        for path in (root / place.format(stem) for place in places):
            if name not in texts and path.is_file():
                texts[name] = sound(read_text(path)).strip()
    return Row(key=stem, paths=paths, texts=texts)


def _check_role(where: str, role: str) -> None:
    if not role.strip() or not role.isprintable():
        raise UserError(f"{where}: the role {role!r} is no word; give it letters, no line break")


def read_table(path: Path) -> Iterator[Row]:
    """One item per line of a .jsonl file; paths are relative to the file and lead nowhere but into
    its folder."""
    file, folder = str(path), str(path.parent)
    check_file(path)
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                where = f"{file}, line {number}"
                names, texts = _row(where, line)
                paths = {role: _picture(where, folder, role, names[role]) for role in names}
                yield Row(key=f"{path.name}:{number}", paths=paths, texts=texts)


def _picture(where: str, folder: str, role: str, name: str) -> str:
    """The path in `folder` of the picture that a row calls `name`, which is there."""
    _check_role(where, role)
    found = located(f"{where}: {role}", folder, name)
    if not os.path.isfile(path_inside(folder, found)):
        raise UserError(f"{where}: {role}: no such file {path_inside(folder, found)}")
    return found


def _row(where: str, line: bytes) -> tuple[dict[str, str], dict[str, str]]:
    """File names and texts of a line."""
    row = parse_json(where, line)
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected an object, {{...}}, not {row!r}")
    return _edit(where, row) if "images" in row else _roles(where, row)


def _roles(where: str, row: Mapping[str, object]) -> tuple[dict[str, str], dict[str, str]]:
    """File names and texts of a row whose keys are roles, "caption" and "instruction"."""
    for key, value in row.items():
        if not isinstance(value, str):
            kind = "text" if key in TEXTS else "the path of a picture"
            raise UserError(f"{where}: {key} must be {kind}, not {value!r}")
    texts = {key: sound(str(row[key])) for key in TEXTS if key in row}
    names = {key: str(value) for key, value in row.items() if key not in TEXTS}
    if not names:
        raise UserError(f"{where}: names no picture; expected e.g. {{'target': 'a.png'}}")
    return names, texts


def _edit(where: str, row: Mapping[str, object]) -> tuple[dict[str, str], dict[str, str]]:
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
