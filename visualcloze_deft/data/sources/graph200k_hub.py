"""Graph200K as it is published: a table of the `datasets` library, one row an item, pictures
encoded in its cells (`VisualCloze/Graph200K` on the hub). Nothing is unpacked; a picture is
decoded when it is asked for.
"""

from __future__ import annotations

import glob
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.compute
from PIL import Image

from visualcloze_deft.config.source_specs import place_and_split
from visualcloze_deft.data.base import Item
from visualcloze_deft.data.sources.graph200k import CONSISTENT, ROLES, texts
from visualcloze_deft.errors import UserError
from visualcloze_deft.images.depth import declared
from visualcloze_deft.images.maps import read_role
from visualcloze_deft.images.reading import listing
from visualcloze_deft.storage.inside import located, path_inside
from visualcloze_deft.storage.text_files import parse_json

COLUMNS = {  # column with pictures -> role
    **{name: role for name, role in ROLES.items() if name not in ("reference", "mask", "bbox")},
    "qwen_2_5_mask": "object_masks",
    "qwen_2_5_bounding_box": "boxes",
    "FillEdit_image_0": "before",
    "InstantStyle_image_0": "style_image",
    "InstantStyle_ref_0": "style_reference",
    "ReduxStyle_image_0": "redux_image",
    "ReduxStyle_ref_0": "redux_reference",
}
WORDS = ("description", "quality_assessment")  # columns that are read beside pictures


class GraphTable:
    """The source `graph200k` at `place`: a folder with parquet files or one that `save_to_disk`
    wrote, or a hub id; "@SPLIT" behind it chooses the split, "train" by default."""

    name = "graph200k"

    def __init__(self, place: str) -> None:
        self.folder, self.split = place_and_split(place)
        self.place = place
        table = open_table(self.folder, self.split)
        self.depth = declared(Path(self.folder))
        if "target" not in table.column_names:
            raise UserError(
                f"{place}: expected Graph200K's columns, target among them; found "
                f"{', '.join(table.column_names[:8])}"
            )
        self.table = table
        self.cells = {
            role: encoded(place, table.select_columns([column]), column)
            for column, role in COLUMNS.items()
            if column in table.column_names
        }
        words = [name for name in WORDS if name in table.column_names]
        self.words = table.select_columns(words) if words else None
        self.there = {role: there(cells) for role, cells in self.cells.items()}
        if "reference" in self.there:
            self.there["reference"] &= self._consistent()
        self.roles = frozenset(role for role, rows in self.there.items() if rows.any())

    def __len__(self) -> int:
        return len(self.table)

    @cached_property
    def kinds(self) -> dict[frozenset[str], Sequence[int]]:
        roles = list(self.there)
        bits = sum(self.there[role].astype(np.int64) << k for k, role in enumerate(roles))
        found: dict[frozenset[str], Sequence[int]] = {}
        for pattern in np.unique(bits).tolist():
            own = frozenset(role for k, role in enumerate(roles) if pattern >> k & 1)
            found[own] = np.flatnonzero(bits == pattern).tolist()
        return found

    def item(self, index: int) -> Item:
        images: dict[str, Callable[[], Image.Image]] = {
            role: partial(self._picture, role, index)
            for role, rows in self.there.items()
            if rows[index]
        }
        words = {} if self.words is None else self.words[index]
        where = f"{self.place}, item {index}"
        row = {"description": said(where, words.get("description")), "condition": {}}
        return Item(key=f"item {index}", images=images, texts=texts(row))

    def _picture(self, role: str, index: int) -> Image.Image:
        cells = self.cells[role]
        cell = cells[index][cells.column_names[0]]
        where = f"{self.place}, item {index}, {role}"
        if isinstance(cell, dict) and cell["bytes"] is None:
            path = path_inside(self.folder, located(where, self.folder, cell["path"]))
            return read_role(role, path, self.depth)
        data = cell["bytes"] if isinstance(cell, dict) else cell
        return read_role(role, where, self.depth, data)

    def _consistent(self) -> np.ndarray:
        """Whether each reference shows the target's subject."""
        column = "quality_assessment"
        if self.words is None or column not in self.words.column_names:
            return np.zeros(len(self), bool)
        cells = self.words.with_format("arrow")[:][column]
        levels = (said(column, cell.as_py()).get("objectConsistency") for cell in cells)
        return np.fromiter(
            (isinstance(level, int | float) and level >= CONSISTENT for level in levels),
            bool,
            count=len(self),
        )


def there(cells: datasets.Dataset) -> np.ndarray:
    """Which cells of a table of one column hold something, without reading it."""
    column = cells.with_format("arrow")[:][cells.column_names[0]]
    found: np.ndarray = pyarrow.compute.is_valid(column).to_numpy().copy()  # to be written to
    if pyarrow.types.is_struct(column.type):
        parts = [pyarrow.compute.struct_field(column, name) for name in ("bytes", "path")]
        found &= np.logical_or(*(pyarrow.compute.is_valid(part).to_numpy() for part in parts))
    return found


def open_table(where: str, split: str) -> datasets.Dataset:
    """The table in a folder, or of the hub."""
    folder = Path(where)
    datasets.disable_progress_bars()
    try:
        if not folder.exists():
            if where.count("/") != 1:
                raise UserError(f"{where}: no such folder")
            return datasets.load_dataset(where, split=split)
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            found = datasets.load_from_disk(str(folder))
            return found[split] if isinstance(found, datasets.DatasetDict) else found
        files = [glob.escape(path) for path in shards(folder, split)]
        if not files:
            raise UserError(
                f"{folder}: expected data.json, {split}*.parquet, or what save_to_disk writes; "
                f"found {listing(folder)}"
            )
        return datasets.load_dataset("parquet", data_files={split: files}, split=split)
    except UserError:
        raise
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetGenerationError) as error:
        raise UserError(f"{where}: {str(error).splitlines()[0]}") from None
    finally:
        datasets.enable_progress_bars()


def shards(folder: Path, split: str) -> list[str]:
    """The parquet files of a split, sorted."""
    return sorted(
        str(path)
        for path in folder.rglob("*.parquet")
        if path.name.startswith(split) and path.is_file()
    )


def encoded(place: str, table: datasets.Dataset, column: str) -> datasets.Dataset:
    """The column's cells as encoded pictures: {"bytes", "path"}, plain bytes, or None.

    Raises `UserError` where it holds anything else.
    """
    feature = table.features[column]
    if isinstance(feature, datasets.Image):
        return table.cast_column(column, datasets.Image(decode=False))
    kind = table.with_format("arrow")[:0][column].type
    names = {kind.field(k).name for k in range(kind.num_fields)}
    binary = pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)
    if not (binary or names == {"bytes", "path"}):
        raise UserError(f"{place}: column {column} holds {kind}; expected pictures, as bytes")
    return table


def said(where: str, cell: object) -> Mapping[str, Any]:
    """A cell that holds an object, or the JSON of one."""
    if isinstance(cell, str):
        try:
            cell = parse_json(where, cell)
        except UserError:
            return {}
    return cell if isinstance(cell, dict) else {}
