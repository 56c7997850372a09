"""The source `folder`: a user's own pictures, as they lie in one of four layouts.

tables      rows.jsonl       {"depth": "a.png", "target": "b.png", "caption": "..."}
            metadata.csv     file_name,depth_file_name,text
shards      a-000.tar        0001.depth.png  0001.target.png  0001.txt
subfolders  depth/0001.png   target/0001.png  caption/0001.txt
names       0001_depth.png   0001_target.png  0001.txt
            depth_0001.png   target_0001.png  0001.txt
            0001.png         0001.txt         photos without roles: targets
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from visualcloze_deft.data.base import Item
from visualcloze_deft.data.index import (
    SEPARATOR,
    Indexed,
    Row,
    index,
    key_of_files,
    key_of_names,
)
from visualcloze_deft.data.sources.layouts import names, shards, subfolders, tables
from visualcloze_deft.data.sources.layouts.reading import (
    TARGET,
    TEXTS,
    Reading,
    places_of,
)
from visualcloze_deft.errors import OnFault, UserError, stop
from visualcloze_deft.images.reading import folders_in, listing
from visualcloze_deft.storage.inside import path_inside
from visualcloze_deft.storage.tar_members import member_at
from visualcloze_deft.storage.text_files import read_text, sound


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How pictures lie. fits: whether something lies so at a path. read: its items. key: what
    their index depends on, without reading a picture. by_name: items are called as files are."""

    fits: Callable[[Path], bool]
    read: Callable[[Path, Reading], Iterator[Row]]
    key: Callable[[Path], str]
    by_name: bool


TABLES = "a table *.jsonl or metadata.csv"
LAYOUTS = {
    TABLES: Layout(
        fits=tables.fits,
        read=tables.read,
        key=lambda path: key_of_files(tables.tables_in(path)),
        by_name=False,
    ),
    "shards *.tar": Layout(fits=shards.fits, read=shards.read, key=shards.key, by_name=False),
    "sub-folders depth/0001.png": Layout(
        fits=subfolders.fits, read=subfolders.read, key=key_of_names, by_name=True
    ),
    "pictures 0001_depth.png or depth_0001.png": Layout(
        fits=names.fits, read=names.read, key=key_of_names, by_name=True
    ),
}


class Folder(Indexed):
    """The source `folder` at `path`: a folder in one of the layouts, a table or a shard.

    cache: where its index is kept, see `index`. on_fault: gets what is wrong with a row, which is
    then passed over; by default the first ends all. notes: how the folder was read, for people;
    empty where the index was there.
    """

    def __init__(self, path: Path, *, cache: Path | None = None, on_fault: OnFault = stop) -> None:
        layout = layout_of(path)
        told = Reading(on_fault=on_fault)
        rows = index(lambda: layout.read(path, told), key=lambda: layout.key(path), cache=cache)
        if not rows.num_rows:
            raise UserError(f"{path}: expected {expected()}; found no item")
        super().__init__("folder", path if path.is_dir() else path.parent, rows)
        self.by_name = layout.by_name
        self.notes = tuple(told.notes)

    @cached_property
    def units(self) -> NDArray[np.int64] | None:
        """The unit of each row: rows of a table that share a picture are one, which is held out
        whole. None where no two do."""
        return None if self.by_name else units_in(self.table["paths"])

    def item(self, index: int) -> Item:
        """The item; a caption that its row lacks is read beside the target. Tasks read it in place
        of an instruction that the item lacks."""
        item = super().item(index)
        texts = dict(item.texts)
        if not texts.get("caption") and TARGET in item.images:
            path = self.caption_files(index)[-1]
            texts |= {"caption": sound(read_text(path)).strip()} if path.is_file() else {}
        bare = texts.get("caption") and not texts.get("instruction")
        return replace(item, texts=texts, instead={"instruction": "caption"} if bare else {})

    def caption_files(self, index: int) -> list[Path]:
        """The files that may hold the caption of an item with a target: the first that is there is
        read, and the last is the place for a new one."""
        key, place = self._target(index)
        if member_at(place):
            return [self.folder / "caption" / f"{key}.txt"]
        named = places_of("caption", key) if self.by_name else []
        beside = Path(path_inside(str(self.folder), place)).with_suffix(".txt")
        return [*(self.folder / name for name in named), beside]

    def text_files(self, index: int) -> list[Path]:
        """All files that may hold a text of an item."""
        key, kind = (self.table[name][index].as_py() for name in ("key", "kind"))
        named = [place for text in TEXTS for place in places_of(text, key)] if self.by_name else []
        captions = self.caption_files(index) if TARGET in kind.split(SEPARATOR) else []
        return [*(self.folder / name for name in named), *captions]

    def caption_name(self, index: int) -> str:
        """What the caption of an item with a target is called in a folder of captions alone."""
        key, place = self._target(index)
        named = self.by_name or member_at(place)
        return f"{key if named else os.path.splitext(os.path.normpath(place))[0]}.txt"

    def _target(self, index: int) -> tuple[str, str]:
        """The key of an item, and the path of its target in the index."""
        row = {name: self.table[name][index].as_py() for name in ("key", "kind", "paths")}
        place = row["paths"][row["kind"].split(SEPARATOR).index(TARGET)]
        return row["key"], os.fsdecode(place)


def units_in(paths: pa.ChunkedArray) -> NDArray[np.int64] | None:
    """Numbers of rows, equal where a way leads from one to the other by pictures that two rows
    have; in the order of the rows. paths: those of each row."""
    named = paths.combine_chunks()
    encoded = named.flatten().dictionary_encode()
    places = [os.path.normpath(os.fsdecode(path)) for path in encoded.dictionary.to_pylist()]
    _, codes = np.unique(places, return_inverse=True)
    pictures = codes[encoded.indices.to_numpy(zero_copy_only=False)]
    rows = pa.compute.list_parent_indices(named).to_numpy(zero_copy_only=False)
    count, most = len(paths), int(pictures.max(initial=-1)) + 1
    if most == len(pictures):
        return None
    links = coo_array((np.ones(len(rows)), (rows, count + pictures)), shape=(count + most,) * 2)
    _, labels = connected_components(links, directed=False)
    _, first, units = np.unique(labels[:count], return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[units]


def layout_of(path: Path) -> Layout:
    """The layout at `path`: a table names pictures wherever they lie, else there is only one.

    Raises `UserError` where none fits, or several do.
    """
    if not path.is_dir() and not (path.is_file() and path.suffix in (*tables.SUFFIXES, ".tar")):
        raise UserError(f"{path}: no such folder, nor a table .jsonl or .csv, nor a shard .tar")
    found = [name for name, layout in LAYOUTS.items() if layout.fits(path)]
    if not found:
        raise UserError(f"{path}: expected {expected()}; found {found_in(path)}")
    if len(found) > 1 and not (found[0] == TABLES and "shards *.tar" not in found):
        raise UserError(f"{path}: both {' and '.join(found[:2])}; keep one layout")
    return LAYOUTS[found[0]]


def expected() -> str:
    """The layouts in words."""
    *most, last = LAYOUTS
    return f"{', '.join(most)}, or {last}"


def found_in(path: Path) -> str:
    """What a folder without a layout holds, and where in it there is one."""
    if not path.is_dir():
        return "no row"
    for folder in folders_in(path):
        if any(layout.fits(folder) for layout in LAYOUTS.values()):
            return f"{listing(path)}; the folder {folder.name} has a layout: folder={folder}"
    return listing(path)
