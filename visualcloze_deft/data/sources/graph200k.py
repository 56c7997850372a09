"""The source `graph200k`: Graph200K as VisualCloze unpacks it, a `data.json` beside its pictures.

A row: {"quality_assessment": {"objectConsistency": 4, ...} or null, "description": {"item": "...",
"description_0": "..."} or null, "condition": {"target": "target/0_target.jpg", ...}}.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from visualcloze_deft.data.index import Indexed, Row, index, key_of_files
from visualcloze_deft.errors import OnFault, UserError, stop, suggestion
from visualcloze_deft.images.reading import listing
from visualcloze_deft.storage.inside import located, path_inside
from visualcloze_deft.storage.text_files import parse_json, read_bytes, sound

ROLES = {  # condition with one picture -> role
    "target": "target",
    "reference": "reference",
    "ref": "reference",
    "sam2_mask": "segmentation",
    "uniformer": "uniformer",
    "mask": "object_masks",  # one flat colour per object named; no black and white mask
    "bbox": "boxes",
    "foreground": "mask",  # white on black; foreground and background are cut out with it
    "normal": "normal",
    "depth": "depth",
    "canny": "canny",
    "hed": "hed",
    "mlsd": "mlsd",
    "openpose": "openpose",
    "DepthEdit": "depth_edit",  # same depth, another subject and background
}
LISTS = {  # condition with lists of pictures -> list -> role of its first picture
    "FillEdit": {"image_path": "before"},  # another subject in the place of the target's
    "InstantStyle": {"image_path": "style_image", "style_path": "style_reference"},
    "ReduxStyle": {"image_path": "redux_image", "style_path": "redux_reference"},
}
_UNREAD = {"qwen_2_5_meta"}  # names and corners of the boxes
_KNOWN = {*ROLES, *LISTS, *_UNREAD}
_FIELDS: dict[str, dict[str, Any]] = {  # key of a row -> key in it -> what may stand there
    "quality_assessment": {"objectConsistency": int | float | None},
    "description": {"item": str | None, "description_0": str | None},
}
CONSISTENT = 3  # least objectConsistency of a reference (VisualCloze, arXiv 2504.07960)


class Graph200K(Indexed):
    """The source `graph200k` at `root`, a folder with `data.json`, or that file itself.

    cache: where its index is kept, see `index`. on_fault: gets what is wrong with an item, which
    is then passed over; by default the first ends all.
    """

    may_have = frozenset(ROLES.values()) | {r for roles in LISTS.values() for r in roles.values()}

    def __init__(self, root: Path, *, cache: Path | None = None, on_fault: OnFault = stop) -> None:
        if not root.exists():
            raise UserError(f"{root}: no such folder")
        path = root / "data.json" if root.is_dir() else root
        if not path.is_file():
            raise UserError(
                f"{path}: no such file; expected the data.json that unpacking Graph200K writes, "
                f"found {listing(path.parent)}"
            )
        rows = index(
            lambda: items_of(path, on_fault), key=lambda: key_of_files([path]), cache=cache
        )
        if not rows.num_rows:
            raise UserError(f"{path}: no item of it can be read")
        super().__init__("graph200k", path.parent, rows)


def items_of(path: Path, on_fault: OnFault) -> Iterator[Row]:
    """The items in `data.json`, whose first has its pictures."""
    for number, row in enumerate(read_rows(path)):
        try:
            yield item_of(path, number, row)
        except UserError as fault:
            on_fault(fault)


def item_of(path: Path, number: int, row: Any) -> Row:
    where, folder = f"{path}, item {number}", str(path.parent)
    _check(where, row)
    names = {
        role: located(f"{where}: {condition}", folder, name)
        for role, (condition, name) in picture_names(row).items()
    }
    for name in names.values() if number == 0 else ():
        if not os.path.isfile(path_inside(folder, name)):
            raise UserError(
                f"{where}: no such file {path_inside(folder, name)}; "
                f"paths are relative to {path.name}"
            )
    return Row(key=f"item {number}", paths=names, texts=texts(row))


def picture_names(row: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Role -> where it stands in the row, and the file name as it stands there."""
    names: dict[str, tuple[str, str]] = {}
    for condition, value in row["condition"].items():
        if condition in ROLES and value:
            names[ROLES[condition]] = condition, value
        elif condition in LISTS and value:
            lists = LISTS[condition]
            names |= {role: (f"{condition}: {key}", value[key][0]) for key, role in lists.items()}
    if "reference" in names and not _consistent(row):
        del names["reference"]
    return names


def _consistent(row: Mapping[str, Any]) -> bool:
    quality = row.get("quality_assessment") or {}
    return (quality.get("objectConsistency") or 0) >= CONSISTENT


def texts(row: Mapping[str, Any]) -> dict[str, str]:
    """The caption of the target and, where both subjects have names, the edit that leads to it.

    FillEdit names the subject that was put into the target's place: the one `before` shows.
    """
    description = row.get("description") or {}
    item = description.get("item") or ""
    caption = sound(f"{item} {description.get('description_0') or ''}").strip()
    replaced = (row["condition"].get("FillEdit") or {}).get("name")
    found = {"caption": caption} if caption else {}
    if item and isinstance(replaced, str):
        found["instruction"] = sound(f"replace the {replaced} with {_in_sentence(item)}")
    return found


def _in_sentence(words: str) -> str:
    return f"{words[0].lower()}{words[1:]}".rstrip(".")


def read_rows(path: Path) -> list[Any]:
    """The list in `data.json`."""
    rows = parse_json(str(path), read_bytes(path))
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{path}: expected a list of items, found {str(rows)[:60]!r}")
    return rows


def _check(where: str, row: object) -> None:
    if not isinstance(row, dict) or not isinstance(row.get("condition"), dict):
        raise UserError(f"{where}: expected an object with the key 'condition'")
    for key, fields in _FIELDS.items():
        found = row.get(key) or {}
        if not isinstance(found, dict):
            raise UserError(f"{where}: {key} must be an object or null, not {found!r}")
        for field, kind in fields.items():
            if not isinstance(found.get(field), kind):
                raise UserError(f"{where}: {key}: {field} cannot be {found[field]!r}")
    if not row["condition"].get("target"):
        raise UserError(f"{where}: the condition 'target' is missing")
    for name, value in row["condition"].items():
        if name in LISTS:
            _check_lists(f"{where}: {name}", value, LISTS[name])
        elif name not in _KNOWN:
            raise UserError(f"{where}: unknown condition {name!r}; {suggestion(name, _KNOWN)}")
        elif name in ROLES and not isinstance(value, str | None):
            raise UserError(f"{where}: {name} must be a path or null, not {value!r}")


def _check_lists(where: str, value: object, lists: Mapping[str, str]) -> None:
    if not value:
        return
    if not isinstance(value, dict):
        raise UserError(f"{where} must be an object or null, not {value!r}")
    for key in lists:
        names = value.get(key)
        if not isinstance(names, list) or not names or not isinstance(names[0], str):
            raise UserError(f"{where}: {key} must be a list of paths, not {names!r}")
