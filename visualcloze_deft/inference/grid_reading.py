"""What `vcdeft infer --examples` reads: a JSON file of one grid or a list of them, or a folder of
such files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from visualcloze_deft.config.numbers import is_number
from visualcloze_deft.errors import UserError, suggestion
from visualcloze_deft.images.depth import declared
from visualcloze_deft.images.reading import images_in
from visualcloze_deft.inference.compiled import Compiled
from visualcloze_deft.inference.pictures import read_once
from visualcloze_deft.inference.request import Request, request, roles_of
from visualcloze_deft.inference.upsampling import Upsampling
from visualcloze_deft.storage.text_files import read_json, read_text, sound
from visualcloze_deft.task_registry.task import Task

_KEYS: dict[str, tuple[type, ...]] = {
    "task": (str, type(None)),
    "task_prompt": (str, type(None)),
    "content_prompt": (str, type(None)),
    "rows": (list,),
    "seed": (int, list, type(None)),
    "upsampling": (dict, list, int, float, type(None)),
}
_UPSAMPLING_KEYS: dict[str, tuple[type, ...]] = {
    "scale": (int, float),
    "width": (int, type(None)),
    "height": (int, type(None)),
    "strength": (int, float),
    "prompt": (str, type(None)),
}
RECORDED = "rows_sha256"  # a key of the records of `vcdeft infer`, which say more than a grid


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One grid of a file, its pictures not read yet. name: of what is made of it; where: in words.
    folder: that its paths start from. compiled: examples that go before it, a query row."""

    name: str
    where: str
    folder: Path
    value: Any
    compiled: Compiled | None = None

    def request(
        self,
        tasks: Mapping[str, Task],
        *,
        seed: int | None = None,
        images: int = 1,
        upsampling: Upsampling | None = None,
    ) -> Request:
        """The grid with its pictures. seed: replaces its own; images: see `request`; upsampling:
        where it names none. Errors name file, grid and key."""
        with self.errors():
            return _read_entry(self, tasks, seed=seed, images=images, upsampling=upsampling)

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Put the grid's place before what is wrong with it."""
        try:
            yield
        except UserError as error:
            raise UserError(f"{self.where}: {error}") from None


def read_entries(path: Path, compiled: Compiled | None = None) -> list[Entry]:
    """All grids of a file, or of every .json file in a folder but for records of `vcdeft infer`.

    compiled: examples that go before each.
    """
    if not path.is_dir():
        return _entries_of(path, "", compiled)
    files = sorted(file for file in path.glob("*.json") if file.is_file())
    every = [entry for file in files for entry in _entries_of(file, f"{file.stem}-", compiled)]
    entries = [e for e in every if not (isinstance(e.value, dict) and RECORDED in e.value)]
    if not entries:
        raise UserError(f"examples {path}: no .json file of grids in this folder")
    return entries


def read_requests(
    path: Path,
    tasks: Mapping[str, Task],
    *,
    seed: int | None = None,
    images: int = 1,
    upsampling: Upsampling | None = None,
    compiled: Compiled | None = None,
) -> list[Request]:
    """All grids of a file or folder with their pictures, see `Entry.request`."""
    return [
        entry.request(tasks, seed=seed, images=images, upsampling=upsampling)
        for entry in read_entries(path, compiled)
    ]


def picture_entries(folder: Path, compiled: Compiled) -> list[Entry]:
    """A grid for each picture in a folder: the query of compiled examples. A text file of the same
    name is its content."""
    if not folder.is_dir():
        raise UserError(f"queries {folder}: no folder")
    columns = len(compiled.rows[0])
    if columns - len(compiled.targets) != 1:
        raise UserError(
            f"queries {folder}: a query of these examples has {columns} cells, of which "
            f"{len(compiled.targets)} are asked for; give a grid file of query rows, --examples"
        )
    pictures = images_in(folder)
    if not pictures:
        raise UserError(f"queries {folder}: no picture in this folder")
    return [
        Entry(
            name=stem,
            where=str(picture),
            folder=folder,
            value={
                "rows": [[None if c in compiled.targets else picture.name for c in range(columns)]],
                "content_prompt": caption_of(picture),
            },
            compiled=compiled,
        )
        for stem, picture in pictures.items()
    ]


def caption_of(picture: Path) -> str | None:
    """What the text file beside a picture says."""
    text = picture.with_suffix(".txt")
    return read_text(text).strip() or None if text.is_file() else None


def _entries_of(path: Path, prefix: str, compiled: Compiled | None) -> list[Entry]:
    try:
        content = read_json(path)
    except UserError as error:
        raise UserError(f"examples {error}") from None
    values = content if isinstance(content, list) else [content]
    if not values:
        raise UserError(f"{path}: the list of grids is empty")
    return [
        Entry(
            name=f"{prefix}{number:03d}",
            where=f"{path}, grid {number}" if isinstance(content, list) else str(path),
            folder=path.parent,
            value=value,
            compiled=compiled,
        )
        for number, value in enumerate(values, 1)
    ]


def check_keys(value: Any, known: Mapping[str, tuple[type, ...]], what: str) -> None:
    """Raise `UserError` unless `value` is an object of these keys and types."""
    if not isinstance(value, dict):
        raise UserError(f"expected {what}, found {value!r}")
    for key, found in value.items():
        if key not in known:
            raise UserError(f"unknown key {key!r}; {suggestion(key, known)}")
        if not isinstance(found, known[key]) or isinstance(found, bool):
            kinds = " or ".join(dict.fromkeys(_WORDS[kind] for kind in known[key]))
            raise UserError(f"{key} must be {kinds}, not {found!r}")


def _read_entry(
    entry: Entry,
    tasks: Mapping[str, Task],
    *,
    seed: int | None,
    images: int,
    upsampling: Upsampling | None,
) -> Request:
    value = entry.value
    if isinstance(value, dict) and RECORDED in value:  # what `vcdeft infer` wrote of a grid
        value = {key: value[key] for key in _KEYS if key in value}
    check_keys(value, _KEYS, "an object with the key 'rows'")
    if "rows" not in value:
        raise UserError("the key 'rows' is missing")
    paths: list[tuple[Path | None, ...]] = []
    for r, row in enumerate(value["rows"], 1):
        if not isinstance(row, list):
            raise UserError(f"row {r} must be a list of paths, not {row!r}")
        for cell in row:
            if not isinstance(cell, str | None):
                raise UserError(f"row {r}: a cell is a path or null, not {cell!r}")
        paths.append(
            tuple(None if cell is None else (entry.folder / cell).absolute() for cell in row)
        )
    own = value.get("seed")
    depth = declared(entry.folder)
    words = {name: value.get(name) for name in ("task", "task_prompt", "content_prompt")}
    shown: list[Sequence[Image.Image | None]] = []
    if entry.compiled is not None:
        (*shown, _), words = entry.compiled.before(paths, words)
    task = words["task"]
    read = [
        [
            (None, None) if path is None else read_once(role, path, depth)
            for role, path in zip(roles_of(task, tasks, len(row)), row, strict=True)
        ]
        for row in paths
    ]
    asked = request(
        [*shown, *([image for image, _ in row] for row in read)],
        tasks,
        **words,
        seed=seed if seed is not None else own if own is not None else 0,
        images=images,
        upsampling=_upsampling(value.get("upsampling"), upsampling),
    )
    digests = tuple(tuple(digest for _, digest in row) for row in read)
    return replace(asked, paths=tuple(paths), digests=digests)


def _upsampling(
    told: Any, otherwise: Upsampling | None
) -> Upsampling | list[Upsampling | None] | None:
    if told is None:
        return otherwise
    if isinstance(told, list):
        return [None if one is None else _one_upsampling(one) for one in told]
    return _one_upsampling(told)


def _one_upsampling(told: Any) -> Upsampling:
    if is_number(told):
        return Upsampling(scale=told)
    check_keys(told, _UPSAMPLING_KEYS, "an object, a number or null for upsampling")
    prompt = told.get("prompt")
    return Upsampling(**told | {"prompt": None if prompt is None else sound(prompt)})


_WORDS = {
    str: "text",
    type(None): "null",
    list: "a list",
    int: "a whole number",
    float: "a number",
    dict: "an object",
}
