"""An index of many items in a file that is mapped, not read: a second start takes a moment, and
processes share one copy.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute
from PIL import Image

from visualcloze_deft.data.base import Item
from visualcloze_deft.errors import printable, reading
from visualcloze_deft.images.depth import Depth, declared
from visualcloze_deft.images.maps import read_role
from visualcloze_deft.images.reading import files_below
from visualcloze_deft.storage.atomic import atomic_write
from visualcloze_deft.storage.inside import path_inside
from visualcloze_deft.storage.tar_members import member_at

FORMAT = "5"  # part of every key: raise it when what a row holds changes
SEPARATOR = "\n"  # no role has one
CHUNK = 10_000  # rows held while an index is made
_SCHEMA = pa.schema(
    {
        "key": pa.string(),
        "kind": pa.string(),  # roles, joined by SEPARATOR
        "paths": pa.list_(pa.binary()),  # one for each role; names of files may be any bytes
        "texts": pa.string(),  # JSON
    }
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """An item on paper. paths: role -> file in the source's folder, as it is written there, or the
    place of a member of an archive, see `storage.tar_members`."""

    key: str
    paths: Mapping[str, str]
    texts: Mapping[str, str] = field(default_factory=dict)


class Indexed:
    """A source whose items are files, told by the rows of an index.

    name, folder: of the source. table: what `index` gives.
    """

    def __init__(self, name: str, folder: Path, table: pa.Table) -> None:
        self.name = name
        self.folder = folder
        self.table = table
        self.depth = declared(folder)
        self.roles = frozenset(role for kind in self.kinds for role in kind)

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @cached_property
    def kinds(self) -> dict[frozenset[str], Sequence[int]]:
        of_kind: dict[str, int] = {}
        roles: dict[frozenset[str], int] = {}
        parts = []
        for chunk in self.table["kind"].chunks:
            encoded = pa.compute.dictionary_encode(chunk)
            for kind in encoded.dictionary.to_pylist():
                if kind not in of_kind:  # the same roles in another order are one kind
                    own = frozenset(kind.split(SEPARATOR))
                    of_kind[kind] = roles.setdefault(own, len(roles))
            here = np.array([of_kind[kind] for kind in encoded.dictionary.to_pylist()], np.int32)
            parts.append(here[encoded.indices.to_numpy()])
        codes = np.concatenate(parts) if parts else np.zeros(0, np.int32)
        if len(roles) == 1:
            return dict.fromkeys(roles, range(len(codes)))
        return {own: np.flatnonzero(codes == code).tolist() for own, code in roles.items()}

    def item(self, index: int) -> Item:
        with reading(f"{self.folder}, item {index}", "its index is damaged; remove it"):
            row = {name: self.table[name][index].as_py() for name in _SCHEMA.names}
            paths = [*zip(row["kind"].split(SEPARATOR), row["paths"], strict=True)]
            texts = json.loads(row["texts"])
        return Item(
            key=row["key"],
            images={
                role: partial(picture_at, role, str(self.folder), os.fsdecode(path), self.depth)
                for role, path in paths
            },
            texts=texts,
        )


def picture_at(role: str, folder: str, place: str, depth: Depth | None) -> Image.Image:
    """The picture at a place of `Row.paths`, in the sense of its role."""
    member = member_at(place)
    if member is None:
        return read_role(role, path_inside(folder, place), depth)
    return read_role(role, f"{folder}/{member.archive}/{member.name}", depth, member.read(folder))


def index(
    rows: Callable[[], Iterable[Row]], *, key: Callable[[], str], cache: Path | None
) -> pa.Table:
    """The table of `rows`, which are read only if `cache` has no index of this key.

    cache: a folder; None: the table is held in memory. key: of all that the rows depend on.
    """
    if cache is None:
        return pa.Table.from_batches(_batches(rows()), schema=_SCHEMA)
    path = cache / f"{key()}.arrow"
    found = _mapped(path)
    if found is None:
        _write(rows(), path)
        found = _mapped(path)
        assert found is not None
    return found


def _mapped(path: Path) -> pa.Table | None:
    """The table in a file, which stays on disk; None where it is not there, or damaged."""
    if not path.is_file():
        return None
    try:
        return pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    except (OSError, pa.ArrowInvalid):
        return None


def _write(rows: Iterable[Row], path: Path) -> None:
    """A table in a file that is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)

    def save(staged: Path) -> None:
        with pa.OSFile(str(staged), "wb") as file, pa.ipc.new_file(file, _SCHEMA) as writer:
            for batch in _batches(rows):
                writer.write_batch(batch)

    atomic_write(path, save)


def _batches(rows: Iterable[Row]) -> Iterator[pa.RecordBatch]:
    left = iter(rows)
    while chunk := list(islice(left, CHUNK)):
        columns = [
            [printable(row.key) for row in chunk],
            [SEPARATOR.join(row.paths) for row in chunk],
            [list(map(os.fsencode, row.paths.values())) for row in chunk],
            [json.dumps(dict(row.texts), ensure_ascii=False) for row in chunk],
        ]
        yield pa.RecordBatch.from_pydict(dict(zip(_SCHEMA.names, columns, strict=True)), _SCHEMA)


def key_of_files(paths: Iterable[Path]) -> str:
    """A key of where the files are and what stands in them."""
    digest = hashlib.sha256(FORMAT.encode())
    for path in paths:
        digest.update(b"\0%b\0" % os.fsencode(path.absolute()))
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:32]


def key_of_names(folder: Path) -> str:
    """A key of the paths, sizes and times of all files in `folder` and its subfolders, and of what
    links in it lead to; a folder that links lead to again is told once."""
    return key_of_states(files_below(folder))


def key_of_states(paths: Iterable[str]) -> str:
    """A key of the paths, sizes and times of files, which are not read."""
    digest = hashlib.sha256(FORMAT.encode())
    for path in paths:
        told = os.stat(path) if os.path.exists(path) else os.lstat(path)  # a link to nothing
        name = os.fsencode(os.path.abspath(path))
        digest.update(b"%b\0%d\0%d\n" % (name, told.st_size, told.st_mtime_ns))
    return digest.hexdigest()[:32]
