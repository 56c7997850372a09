"""An index of items: made once, mapped afterwards, made anew when what it tells has changed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from visualcloze_deft.data.index import Indexed, Row, index, key_of_files, key_of_names
from visualcloze_deft.data.sources import open_source
from visualcloze_deft.errors import UserError

ROWS = [
    Row(key="a", paths={"target": "a b.png", "depth": "ä.png"}, texts={"caption": "eine Tasse ☕"}),
    Row(key="b", paths={"target": "b.png"}),
    Row(key="c", paths={"depth": "ä.png", "target": "b.png"}),
]


def rows() -> Iterator[Row]:
    yield from ROWS


def not_again() -> Iterator[Row]:
    raise AssertionError("read again")


def pictures(folder: Path, *names: str) -> None:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / name)


def test_rows_are_items_again_and_read_only_once(tmp_path: Path) -> None:
    pictures(tmp_path, "a b.png", "b.png", "ä.png")
    cache = tmp_path / "cache"
    tables = [
        index(rows, key=lambda: "k", cache=None),
        index(rows, key=lambda: "k", cache=cache),
        index(not_again, key=lambda: "k", cache=cache),
    ]
    for source in (Indexed("x", tmp_path, table) for table in tables):
        assert len(source) == 3
        assert source.kinds == {frozenset({"target", "depth"}): [0, 2], frozenset({"target"}): [1]}
        assert source.roles == {"target", "depth"}
        for number, row in enumerate(ROWS):
            item = source.item(number)
            assert (item.key, item.texts) == (row.key, row.texts)
            assert set(item.images) == set(row.paths)
        assert source.item(0).image("depth").getpixel((0, 0)) == (2, 0, 0)


def test_what_fails_while_it_is_made_leaves_no_index(tmp_path: Path) -> None:
    def broken() -> Iterator[Row]:
        yield ROWS[0]
        raise UserError("line 2")

    with pytest.raises(UserError, match="line 2"):
        index(broken, key=lambda: "k", cache=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_index_is_made_again(tmp_path: Path) -> None:
    index(rows, key=lambda: "k", cache=tmp_path)
    [path] = tmp_path.iterdir()
    os.truncate(path, path.stat().st_size // 2)
    assert index(rows, key=lambda: "k", cache=tmp_path).num_rows == 3


def test_another_table_has_another_key(tmp_path: Path) -> None:
    table = tmp_path / "a.jsonl"
    table.write_text("one")
    before = key_of_files([table])
    assert key_of_files([table]) == before
    table.write_text("two")
    assert key_of_files([table]) != before


def test_a_folder_has_another_key_when_a_file_comes_goes_or_changes(tmp_path: Path) -> None:
    pictures(tmp_path, "target/1.png", "depth/1.png")
    keys = [key_of_names(tmp_path)]
    (tmp_path / "depth" / "1.txt").write_text("a")
    keys.append(key_of_names(tmp_path))
    os.utime(tmp_path / "depth" / "1.txt", ns=(0, 0))
    keys.append(key_of_names(tmp_path))
    (tmp_path / "depth" / "1.png").unlink()
    keys.append(key_of_names(tmp_path))
    assert len(set(keys)) == 4
    assert key_of_names(tmp_path) == keys[-1]


@pytest.mark.parametrize("layout", ["jsonl", "subfolders", "suffixes", "graph200k"])
def test_a_source_is_the_same_with_its_index_and_knows_what_changed(
    tmp_path: Path, layout: str
) -> None:
    folder, cache = tmp_path / "data", tmp_path / "cache"
    names = {"suffixes": "{1}_{0}.png"}.get(layout, "{0}/{1}.png")
    paths = {role: names.format(role, 1) for role in ("depth", "target")}
    pictures(folder, *paths.values())
    if layout == "jsonl":
        (folder / "rows.jsonl").write_text(json.dumps({**paths, "caption": "one"}) + "\n")
    if layout == "graph200k":
        (folder / "data.json").write_text(json.dumps([{"condition": paths}]))
    spec = f"{'graph200k' if layout == 'graph200k' else 'folder'}={folder}"
    opened = [open_source(spec, size=16, seed=0, cache=c) for c in (None, cache, cache)]
    items = [source.item(0) for source in opened]
    assert items[0].key == items[1].key == items[2].key
    assert len({item.image("target").tobytes() for item in items}) == 1
    assert len(list(cache.iterdir())) == 1
    if layout in ("jsonl", "graph200k"):
        [table] = [path for path in folder.iterdir() if path.suffix in (".jsonl", ".json")]
        line = table.read_text()
        table.write_text(line * 2 if layout == "jsonl" else f"{line[:-1]},{line[1:]}")
    else:
        pictures(folder, *(names.format(role, 2) for role in ("depth", "target")))
    assert len(open_source(spec, size=16, seed=0, cache=cache)) == 2
    assert len(list(cache.iterdir())) == 2
