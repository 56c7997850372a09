"""A folder of annotations: pictures of roles that a source lacks, by the index of its items.

DIR/annotations.json   of which source, by which models, and which items could not be read
DIR/depth/000012.png   the role depth of item 12
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
from PIL import Image
from pydantic import BaseModel

from visualcloze_deft.data.base import Source
from visualcloze_deft.errors import UserError
from visualcloze_deft.storage.atomic import write_png, write_text

RECORD = "annotations.json"
SAMPLE = 16  # items spread over a source whose keys its fingerprint reads


class Made(BaseModel):
    """What a folder of annotations tells of one role; skipped: items without a picture."""

    model: str
    finished: bool = False
    skipped: list[int] = []


class Record(BaseModel):
    """`annotations.json`; source: its name for people."""

    source: str
    items: int
    fingerprint: str
    roles: dict[str, Made] = {}


def save(image: Image.Image, path: Path) -> None:
    """The PNG at `path` is there whole or not at all."""
    write_png(path, image)


def picture_path(folder: Path, role: str, index: int) -> Path:
    return folder / role / f"{index:06d}.png"


def is_stored(place: str) -> bool:
    """Whether `place` is a folder that `annotate` wrote, not a model."""
    return (Path(place) / RECORD).is_file()


def finished(role: str, folder: Path) -> Made:
    roles = read_record(folder).roles
    if role not in roles:
        raise UserError(f"annotate {role}={folder}: this folder has {', '.join(sorted(roles))}")
    if not roles[role].finished:
        raise UserError(
            f"annotate {role}={folder}: not finished; give the same 'vcdeft data annotate' again, "
            "it goes on where it stopped"
        )
    return roles[role]


def another(folder: Path, source: Source) -> str:
    """How the source that the annotations in `folder` belong to is another one; "": it is not."""
    record = read_record(folder)
    if record.fingerprint == fingerprint(source):
        return ""
    return (
        f"{folder}: annotations of {record.source} with {record.items} items, not of this "
        f"{source.name} with {len(source)}; annotate it into a folder of its own"
    )


def fingerprint(source: Source) -> str:
    """What tells a source from others without reading a picture: its name and length, and the keys
    of some items."""
    spread = np.linspace(0, len(source) - 1, min(len(source), SAMPLE)).astype(int).tolist()
    told = [source.name, len(source), [key_of(source, index) for index in spread]]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def key_of(source: Source, index: int) -> str:
    """The key of an item, also of one whose texts are broken."""
    try:
        return source.item(index).key
    except UserError:
        return f"item {index}"


def read_record(folder: Path) -> Record:
    try:
        return Record.model_validate_json((folder / RECORD).read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(
            f"{folder / RECORD}: damaged, or not written by 'vcdeft data annotate'"
        ) from None


def write_record(record: Record, folder: Path) -> None:
    write_text(folder / RECORD, record.model_dump_json(indent=1))
