"""The source `folder` reads pictures as they lie: the same pictures in every layout are the same
items, and names that could mean two things are refused."""

from __future__ import annotations

import csv
import io
import json
import re
import shlex
import subprocess
import sys
import tarfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from visualcloze_deft.cli import main
from visualcloze_deft.config.run_settings import load_run
from visualcloze_deft.data.base import Part
from visualcloze_deft.data.mixture import content
from visualcloze_deft.data.sources import open_source
from visualcloze_deft.data.sources.folder import Folder
from visualcloze_deft.errors import UserError
from visualcloze_deft.storage.tar_members import member_at, members_of
from visualcloze_deft.task_registry.files import load_tasks
from visualcloze_deft.task_registry.new_task import write_new_task
from visualcloze_deft.training.run_data import mixture_of
from visualcloze_deft.training.sample_sheets import item_sheet

Pictures = Mapping[str, Mapping[str, int]]  # item -> role -> grey value
Texts = Mapping[str, str]
PAIRS: Pictures = {
    "0001": {"depth": 10, "target": 20},
    "red-car": {"depth": 30, "target": 40},
    "my_cup 3": {"depth": 50, "target": 60},
}
CAPTIONS = {"0001": "one", "red-car": "a red car, parked", "my_cup 3": "3 cups ☕"}


def png(value: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (16, 12), (value, value, value)).save(file, "PNG")
    return file.getvalue()


def put(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def tar(path: Path, members: Sequence[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            header = tarfile.TarInfo(name)
            header.size = len(content)
            archive.addfile(header, io.BytesIO(content))
    return path


# ---- the layouts


def subfolders(root: Path, pictures: Pictures, texts: Texts) -> None:
    for item, roles in pictures.items():
        for role, value in roles.items():
            put(root / role / f"{item}.png", png(value))
        put(root / "caption" / f"{item}.txt", texts[item])


def named(form: str) -> Callable[[Path, Pictures, Texts], None]:
    def write(root: Path, pictures: Pictures, texts: Texts) -> None:
        for item, roles in pictures.items():
            for role, value in roles.items():
                put(root / f"{form.format(item=item, role=role)}.png", png(value))
            put(root / f"{item}.txt", texts[item])

    return write


def beside(root: Path, pictures: Pictures, texts: Texts) -> None:
    """Sub-folders, with captions beside the targets."""
    subfolders(root, pictures, texts)
    last = [*next(iter(pictures.values()))][-1]
    for item in pictures:
        (root / "caption" / f"{item}.txt").rename(root / last / f"{item}.txt")
    (root / "caption").rmdir()


def own_table(root: Path, pictures: Pictures, texts: Texts) -> None:
    rows = []
    for item, roles in pictures.items():
        paths = {role: f"{item}/{role}.png" for role in roles}
        for role, path in paths.items():
            put(root / path, png(roles[role]))
        rows.append({**paths, "caption": texts[item]})
    put(root / "rows.jsonl", "\n".join(json.dumps(row) for row in rows))


def imagefolder_rows(root: Path, pictures: Pictures, texts: Texts) -> list[dict[str, str]]:
    rows = []
    for item, roles in pictures.items():
        row = {}
        for role, value in [*roles.items()][::-1]:  # file_name first, as `datasets` expects it
            path = f"images/{item}.{role}.png"
            row["file_name" if role == "target" else f"{role}_file_name"] = path
            put(root / path, png(value))
        rows.append({**row, "text": texts[item]})
    return rows


def imagefolder_jsonl(root: Path, pictures: Pictures, texts: Texts) -> None:
    rows = imagefolder_rows(root, pictures, texts)
    put(root / "metadata.jsonl", "\n".join(map(json.dumps, rows)))


def imagefolder_csv(root: Path, pictures: Pictures, texts: Texts) -> None:
    rows = imagefolder_rows(root, pictures, texts)
    with (root / "metadata.csv").open("w", encoding="utf-8-sig", newline="") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)


def shard(root: Path, pictures: Pictures, texts: Texts) -> None:
    members = []
    for item, roles in pictures.items():
        members += [(f"{item}.{role}.png", png(value)) for role, value in roles.items()]
        members.append((f"{item}.txt", texts[item].encode()))
    tar(root / "pairs-000.tar", members)


def shards_with_json(root: Path, pictures: Pictures, texts: Texts) -> None:
    """A shard for each item, whose target has no role in its name."""
    for item, roles in pictures.items():
        names = {role: "" if role == "target" else f".{role}" for role in roles}
        members = [(f"./a/{item}{names[role]}.png", png(value)) for role, value in roles.items()]
        members.append((f"./a/{item}.json", json.dumps({"prompt": texts[item], "w": 3}).encode()))
        tar(root / f"{item}.tar", members)


LAYOUTS = {
    "subfolders": subfolders,
    "captions beside": beside,
    "0001_depth": named("{item}_{role}"),
    "0001-depth": named("{item}-{role}"),
    "depth_0001": named("{role}_{item}"),
    "depth-0001": named("{role}-{item}"),
    "rows.jsonl": own_table,
    "metadata.jsonl": imagefolder_jsonl,
    "metadata.csv": imagefolder_csv,
    "tar": shard,
    "tars": shards_with_json,
}
every_layout = pytest.mark.parametrize("layout", LAYOUTS)


def seen(source: Folder) -> list[tuple[dict[str, int], dict[str, str]]]:
    """Grey values by role, and texts, of all items, in an order of their own."""
    items = [source.item(index) for index in range(len(source))]
    told = [
        ({role: item.image(role).getpixel((3, 3))[0] for role in sorted(item.images)}, item.texts)
        for item in items
    ]
    return sorted(told, key=lambda one: sorted(one[0].values()))


@every_layout
def test_the_same_pictures_in_every_layout_are_the_same_items(tmp_path: Path, layout: str) -> None:
    LAYOUTS[layout](tmp_path, PAIRS, CAPTIONS)
    assert seen(Folder(tmp_path)) == [
        (roles, {"caption": CAPTIONS[item]}) for item, roles in PAIRS.items()
    ]


@every_layout
def test_after_is_the_target_in_every_layout_and_it_is_said(tmp_path: Path, layout: str) -> None:
    pairs = {item: {"before": v["depth"], "after": v["target"]} for item, v in PAIRS.items()}
    LAYOUTS[layout](tmp_path, pairs, CAPTIONS)
    source = Folder(tmp_path)
    assert seen(source) == [
        ({"before": v["depth"], "target": v["target"]}, {"caption": CAPTIONS[item]})
        for item, v in PAIRS.items()
    ]
    assert "after: read as target; a task may call it either" in source.notes


@every_layout
def test_an_index_is_made_once_and_anew_where_an_item_comes(tmp_path: Path, layout: str) -> None:
    folder, cache = tmp_path / "data", tmp_path / "cache"
    first = dict([*PAIRS.items()][:2])
    LAYOUTS[layout](folder, first, CAPTIONS)
    opened = [Folder(folder, cache=place) for place in (None, cache, cache)]
    assert seen(opened[0]) == seen(opened[1]) == seen(opened[2])
    assert len([*cache.iterdir()]) == 1
    LAYOUTS[layout](folder, PAIRS, CAPTIONS)
    assert len(Folder(folder, cache=cache)) == 3
    assert len([*cache.iterdir()]) == 2


# ---- what other libraries read


@pytest.mark.parametrize("layout", ["metadata.jsonl", "metadata.csv"])
def test_an_imagefolder_is_read_as_the_datasets_library_reads_it(
    tmp_path: Path, layout: str
) -> None:
    LAYOUTS[layout](tmp_path / "data", PAIRS, CAPTIONS)
    told = datasets.load_dataset(
        "imagefolder", data_dir=str(tmp_path / "data"), split="train", cache_dir=str(tmp_path / "c")
    )
    source = Folder(tmp_path / "data")
    for row, item in zip(told, map(source.item, range(3)), strict=True):
        assert item.texts == {"caption": row["text"]}
        for column, role in {"image": "target", "depth": "depth"}.items():
            assert np.array_equal(row[column].convert("RGB"), item.image(role))


def test_a_shard_is_read_as_the_datasets_library_reads_it(tmp_path: Path) -> None:
    shard(tmp_path, PAIRS, CAPTIONS)
    files = str(tmp_path / "pairs-000.tar")
    told = datasets.load_dataset(
        "webdataset", data_files={"train": files}, split="train", cache_dir=str(tmp_path / "c")
    )
    source = Folder(Path(files))
    for row, item in zip(told, map(source.item, range(3)), strict=True):
        assert item.key == f"pairs-000/{row['__key__']}"
        assert item.texts == {"caption": row["txt"]}
        for role in ("depth", "target"):
            assert np.array_equal(row[f"{role}.png"].convert("RGB"), item.image(role))


def test_sub_folders_with_capitals_are_the_roles_that_tasks_name(tmp_path: Path) -> None:
    subfolders(tmp_path, {"1": {"Before": 3, "After": 4, "My": 5}}, {"1": ""})
    item = Folder(tmp_path).item(0)
    assert [*item.images] == ["before", "My", "target"]
    assert item.image("target").getpixel((0, 0)) == (4, 4, 4)


@pytest.mark.parametrize("write", [own_table, imagefolder_csv, shard, shards_with_json])
def test_roles_with_capitals_are_those_that_tasks_name_in_tables_and_shards(
    tmp_path: Path, write: Callable[[Path, Pictures, Texts], None]
) -> None:
    write(tmp_path, {"1": {"Depth": 3, "target": 4, "My": 5}}, {"1": "said"})
    [kind] = Folder(tmp_path).kinds
    assert kind == {"depth", "target", "My"}


def test_two_names_of_one_role_in_a_row_are_refused(tmp_path: Path) -> None:
    own_table(tmp_path, {"1": {"Depth": 3, "depth": 4, "target": 5}}, {"1": "said"})
    with pytest.raises(UserError, match="line 1: two of Depth, depth, target are one role"):
        Folder(tmp_path)


# ---- names


@pytest.mark.parametrize(
    ("names", "items"),
    [
        ("IMG_1 IMG_2", {"IMG_1": "target", "IMG_2": "target"}),
        (
            "photo_1 photo_2 2024-01-02",
            dict.fromkeys(("photo_1", "photo_2", "2024-01-02"), "target"),
        ),
        ("big_target small_target", {"big": "target", "small": "target"}),
        ("depth_street target_street", {"street": "depth target"}),
        (
            "depth_street target_street depth_park target_park",
            {"park": "depth target", "street": "depth target"},
        ),
        ("day_1 night_1 day_2 night_2", {"1": "day night", "2": "day night"}),
        ("1_lit 1_unlit 2_lit 2_unlit", {"1": "lit unlit", "2": "lit unlit"}),
        ("view_turned_7 view_7 target_7", {"7": "target view view_turned"}),
        ("7_object_masks 7_target", {"7": "object_masks target"}),
        ("image_1_0003 image_2_0003 target_0003", {"0003": "image_1 image_2 target"}),
        ("1-before 1-after", {"1": "before target"}),
        ("Before_1 After_1 BEFORE_2 AFTER_2", {"1": "before target", "2": "before target"}),
        ("1_Depth 1_Target", {"1": "depth target"}),
    ],
)
def test_a_name_holds_a_role_at_its_end_or_its_beginning(
    tmp_path: Path, names: str, items: dict[str, str]
) -> None:
    for name in names.split():
        put(tmp_path / f"{name}.png", png(7))
    source = Folder(tmp_path)
    found = {
        item.key: " ".join(sorted(item.images)) for item in map(source.item, range(len(source)))
    }
    assert found == items


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            "day_street night_street day_park night_park",
            "'day_park' may be park of 'day' or day of",
        ),
        ("dog_sitting dog_running", "one item with the roles running, sitting, or photos?"),
        ("view_a place_a view_b place_b", "'place_a' may be a of 'place' or place of 'a'"),
        ("before_1 after_1 before_2", "before_2.png: stands alone; .* sub-folder target"),
        ("lit_1 unlit_1 lit_2", "lit_2.png: stands alone"),
        ("1_depth 1_target 2", "2.png: expected a role at the end, such as 2_target"),
        (
            "1_depth 1-depth 1_target",
            "1_depth.png: 1-depth.png is depth of '1' too; keep one|1-dep",
        ),
        ("depth_1 target_1 2", "2.png: expected a role at the beginning, such as target_2"),
        ("IMG_1 IMG_2 forest_rain", r"IMG_1.png \(and 1 more\): expected a role at the end"),
    ],
)
def test_names_that_may_mean_two_things_are_refused(
    tmp_path: Path, names: str, message: str
) -> None:
    for name in names.split():
        put(tmp_path / f"{name}.png", png(7))
    with pytest.raises(UserError, match=message) as raised:
        Folder(tmp_path)
    assert str(raised.value).startswith(str(tmp_path))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ("target/1.png 1_target.png", "both .* keep one layout"),
        ("rows.jsonl a.tar", "both a table .* and shards .*; keep one layout"),
        ("metadata.csv metadata.jsonl", "both metadata.csv and metadata.jsonl; keep one"),
        ("Depth/1.png depth/1.png", "depth: Depth is the role depth too; keep one of them"),
        ("a.tar b.png", "both shards .*; keep one layout"),
        ("train/metadata.jsonl", "the folder train has a layout: folder=.*train"),
        ("a.tar.gz", r"expected .*shards \*\.tar.* found a\.tar\.gz"),
    ],
)
def test_several_layouts_or_a_deeper_one_are_refused(
    tmp_path: Path, files: str, message: str
) -> None:
    for name in files.split():
        put(tmp_path / name, png(7))
    with pytest.raises(UserError, match=message):
        Folder(tmp_path)


# ---- imagefolder


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"file_name": 3}, "file_name must be one path, not 3"),
        ({"file_names": ["a.png"]}, "file_names must be one path"),
        ({"file_name": "b.png"}, "target: no such file"),
        ({"file_name": "../a.png"}, "leads out of"),
        ({"file_name": "/etc/passwd"}, "leads out of"),
        ({"file_name": "a.png", "target_file_name": "a.png"}, "both name the target"),
        ({"file_name": "a.png", "text": 4}, "text must be text, not 4"),
        ({"file_name": None, "text": "a"}, "names no picture"),
        ({"_file_name": "a.png", "file_name": "a.png"}, "both name the target"),
        ({"target": "x.tar\0000\0009\0a.png"}, "is the name of no file"),
    ],
)
def test_a_broken_row_of_an_imagefolder_names_its_line(
    tmp_path: Path, row: object, message: str
) -> None:
    put(tmp_path / "a.png", png(1))
    put(tmp_path / "metadata.jsonl", json.dumps(row))
    with pytest.raises(UserError, match=message) as raised:
        Folder(tmp_path)
    assert str(raised.value).startswith(f"{tmp_path / 'metadata.jsonl'}, line 1: ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file_name,text\na.png,b,c\n", "line 2: more cells than columns"),
        ("file_name,text,text\na.png,b,c\n", "two columns are called 'text'"),
        ('file_name,text\n"a.png,b\n', "after line 1: not valid CSV"),
        ("file_name,text\na.png,caf\xe9\n".encode("latin-1"), "cannot be read as CSV .*utf-8"),
        ("file_name\n", "found no item"),
        ("label\n3\n", "label: no such file"),
    ],
)
def test_a_broken_csv_is_one_line(tmp_path: Path, text: str | bytes, message: str) -> None:
    put(tmp_path / "a.png", png(1))
    put(tmp_path / "metadata.csv", text)
    with pytest.raises(UserError, match=message):
        Folder(tmp_path)


def test_columns_that_nothing_reads_are_named_and_null_is_no_picture(tmp_path: Path) -> None:
    put(tmp_path / "a.png", png(1))
    rows = [
        {"file_name": "a.png", "depth_file_name": None, "label": 3, "edit_prompt": "paint it"},
        {"file_name": "a.png", "depth_file_name": "a.png", "text": None},
    ]
    put(tmp_path / "metadata.jsonl", "\n".join(map(json.dumps, rows)))
    source = Folder(tmp_path)
    assert [{*source.item(k).images} for k in (0, 1)] == [{"target"}, {"target", "depth"}]
    assert source.item(0).texts == {"instruction": "paint it"}
    assert "label: a column that is not read" in source.notes
    assert "file_name: read as target" in source.notes


# ---- shards


def test_a_member_is_read_where_it_lies(tmp_path: Path) -> None:
    contents = [("a/1.txt", b"x" * 700), ("2.bin", b""), ("3.bin", b"end")]
    members = [*members_of(tar(tmp_path / "a.tar", contents))]
    assert [(one.name, one.read(str(tmp_path))) for one in members] == contents
    assert [member_at(one.place) for one in members] == members
    assert member_at("a/1.txt") is None


def spoiled(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "cut":
        del data[1000:]
    elif how == "header":
        data[1024 + 148] ^= 0x55  # the checksum of the second member
    path.write_bytes(data if how != "empty" else b"")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("cut", "damaged"),
        ("header", "damaged at byte 1024; what follows cannot be read"),
        ("empty", "damaged"),
    ],
)
def test_a_damaged_shard_is_refused_and_never_half_read(
    tmp_path: Path, how: str, message: str
) -> None:
    path = tar(tmp_path / "a.tar", [(f"{k}.jpg", png(k)) for k in range(3)])
    spoiled(path, how)
    with pytest.raises(UserError, match=message) as raised:
        Folder(path)
    assert str(raised.value).startswith(str(path))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("../a.jpg", b"")], "leads out of it"),
        ([("/a.jpg", b"")], "leads out of it"),
        ([("a.jpg", b""), ("a.jpg", b"")], "a.jpg is there twice"),
        ([("a.jpg", b""), ("a.target.png", b"")], "two pictures are its target"),
        ([("a.jpg", b""), ("a.png", b"")], "two pictures are its target"),
        ([("a.jpg", b""), ("a.json", b"{")], "a.json: not valid JSON"),
        ([("a.jpg", b""), ("a.json", b'{"text": 3}')], "a.json: text must be text"),
        ([("a.jpg", b""), ("a.txt", b"caf\xe9")], "a.txt: cannot be read as UTF-8"),
        ([("a.jpg", b""), ("a.txt", b"x" * (2 << 20))], "too many for a text"),
        ([("a.txt", b"")], "found no item"),
    ],
)
def test_a_broken_sample_is_named(
    tmp_path: Path, members: list[tuple[str, bytes]], message: str
) -> None:
    path = tar(tmp_path / "s.tar", members)
    with pytest.raises(UserError, match=message) as raised:
        Folder(path)
    assert str(raised.value).startswith(str(path))


def test_a_broken_picture_of_a_shard_is_named_and_a_link_is_no_picture(tmp_path: Path) -> None:
    path = tar(tmp_path / "s.tar", [("a.jpg", b"no picture"), ("b.png", png(1))])
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("c.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    source = Folder(path)
    assert len(source) == 2
    with pytest.raises(UserError, match=r"s\.tar/a\.jpg: not an image"):
        source.item(0).image("target")


@every_layout
def test_a_task_that_reads_the_instruction_takes_a_caption_where_there_is_none(
    tmp_path: Path, layout: str
) -> None:
    pairs = {item: {"before": v["depth"], "after": v["target"]} for item, v in PAIRS.items()}
    LAYOUTS[layout](tmp_path, pairs, CAPTIONS)
    source, tasks = Folder(tmp_path), load_tasks()
    items = [source.item(k) for k in range(len(source))]
    for name in ("image-editing", "depth-to-image"):
        assert {content(tasks[name], item) for item in items} == {*CAPTIONS.values()}
    assert {content(tasks["image-to-depth"], item) for item in items} == {""}


def test_an_instruction_stays_what_a_task_reads_that_names_it(tmp_path: Path) -> None:
    for name in ("before/1", "after/1", "before/2", "after/2"):
        put(tmp_path / f"{name}.png", png(1))
    put(tmp_path / "1.txt", "a house at night")
    put(tmp_path / "1_instruction.txt", "make it night")
    put(tmp_path / "2_instruction.txt", "make it day")
    source, tasks = Folder(tmp_path), load_tasks()
    items = [source.item(k) for k in (0, 1)]
    edits = [content(tasks["image-editing"], item) for item in items]
    assert edits == ["make it night", "make it day"]
    captions = [content(tasks["depth-to-image"], item) for item in items]
    assert captions == ["a house at night", ""]


def test_a_preview_shows_what_is_generated_last(tmp_path: Path) -> None:
    put(tmp_path / "before" / "1.png", png(0))
    put(tmp_path / "after" / "1.png", png(255))
    put(tmp_path / "mark" / "1.png", png(0))
    sheet = np.asarray(item_sheet(Folder(tmp_path), count=1, seed=0).convert("L"))
    middle = sheet[sheet.shape[0] * 2 // 3]
    assert [middle[len(middle) * k // 6] for k in (1, 3, 5)] == [0, 0, 255]


def test_captions_of_a_shard_may_stand_in_a_folder_beside_it(tmp_path: Path) -> None:
    tar(tmp_path / "s.tar", [("x/a.jpg", png(1))])
    put(tmp_path / "caption" / "s" / "x" / "a.txt", "a wall")
    assert Folder(tmp_path).item(0).texts == {"caption": "a wall"}


# ---- data check


def checked(capsys: pytest.CaptureFixture[str], *specs: str) -> tuple[str, str, int]:
    status = 0
    try:
        main(["data", "check", *specs, "--workers", "0"])
    except SystemExit as ended:
        status = int(ended.code or 0)
    shown = capsys.readouterr()
    return shown.out, shown.err, status


def test_a_check_lists_every_fault_of_every_source(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table, pairs, gone = (tmp_path / name for name in ("table", "pairs", "gone"))
    put(table / "a.png", png(1))
    put(table / "bad.png", b"")
    lines = ['{"target": "a.png"}', "{", '{"target": "no.png"}', '{"target": "bad.png"}', "[]"]
    put(table / "rows.jsonl", "\n".join(lines))
    for name in ("before/1", "after/1", "before/2", "after/3"):
        put(pairs / f"{name}.png", png(1))
    said, faults, status = checked(capsys, *(f"folder={p}" for p in (table, gone, pairs)))
    for fault in (
        "rows.jsonl, line 2: not valid JSON",
        "rows.jsonl, line 3: target: no such file",
        "rows.jsonl, line 5: expected an object",
        "rows.jsonl:4, target: ",
        "gone: no such folder",
        "before/2.png: stands alone",
    ):
        assert fault in faults
    assert status == 2
    assert "5 pictures or rows are broken" in faults
    assert said.rstrip().splitlines()[-1].startswith("  vcdeft train --data folder=")
    assert checked(capsys, f"folder={pairs}")[2] == 1


def test_a_check_of_graph200k_lists_every_fault(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(tmp_path / "a.png", png(1))
    good = {"condition": {"target": "a.png"}}
    rows = [good, {"condition": {}}, {"condition": {"target": "../a.png"}}, good]
    put(tmp_path / "data.json", json.dumps(rows))
    said, faults, status = checked(capsys, f"graph200k={tmp_path}")
    assert "item 1: the condition 'target' is missing" in faults
    assert "item 2: target: ../a.png leads out of" in faults
    assert "2 items" in said
    assert status == 1


@pytest.mark.parametrize(
    ("roles", "tasks"),
    [
        ("before after", "image-editing"),
        ("depth target", "depth-to-image,image-to-depth"),
        ("target", "all"),
        ("image_1 image_2 target", "image-composition"),
        ("before depth_edit target", "depth-editing,image-editing"),  # one is called as their group
    ],
)
def test_a_check_ends_with_the_command_that_trains_on_the_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], roles: str, tasks: str
) -> None:
    root = tmp_path / "my data"
    for role in roles.split():
        put(root / role / "1.png", png(1))
    said, _, status = checked(capsys, f"folder={root}")
    words = shlex.split(said.rstrip().splitlines()[-1])
    assert status == 0
    assert words[:2] == ["vcdeft", "train"]
    options = dict(zip(words[2::2], words[3::2], strict=True))
    assert options == {
        "--data": f"folder={root}",
        "--tasks": tasks,
        "--output": "runs/my data",
    }
    told = [f"data.sources={json.dumps([options['--data']])}", f"data.tasks={tasks}"]
    assert len(mixture_of(load_run(None, told)).names) >= 1


def test_a_check_tells_captions_that_stand_in_for_instructions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for k in range(3):
        put(tmp_path / "before" / f"{k}.png", png(k))
        put(tmp_path / "after" / f"{k}.png", png(k))
        put(tmp_path / f"{k}.txt", f"make it {k}")
    put(tmp_path / "2_instruction.txt", "paint it")
    said, _, _ = checked(capsys, f"folder={tmp_path}")
    line = "instruction: missing in 2 items; image-editing: the caption is read instead"
    assert said.count(line) == 1
    assert said.count("is read instead") == 1


def test_a_check_counts_pairs_of_different_proportions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"1": (600, 400), "2": (320, 240), "3": (160, 120), "4": (161, 120), "5": (300, 300)}
    for name, size in sizes.items():
        for role, pixels in (("before", (320, 240)), ("after", size)):
            (tmp_path / role).mkdir(exist_ok=True)
            Image.new("RGB", pixels).save(tmp_path / role / f"{name}.png")
    said, _, status = checked(capsys, f"folder={tmp_path}")
    assert status == 0
    assert "2 items with images of different proportions, first 1 (before 320 x 240, " in said


@pytest.mark.parametrize(("count", "kept"), [(9, False), (10, True)])
def test_the_command_of_a_check_holds_out_pairs_where_there_are_enough(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], count: int, kept: bool
) -> None:
    for k in range(count):
        put(tmp_path / "before" / f"{k}.png", png(k))
        put(tmp_path / "after" / f"{k}.png", png(k))
    said, _, _ = checked(capsys, f"folder={tmp_path}")
    assert ("--validation-every 5" in said) == kept


def test_rows_of_one_picture_are_not_held_out_by_the_command_of_a_check(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing would be left to train on."""
    put(tmp_path / "a.png", png(1))
    put(tmp_path / "b.png", png(1))
    put(tmp_path / "rows.jsonl", '{"before": "a.png", "target": "b.png"}\n' * 12)
    assert "--validation-every" not in checked(capsys, f"folder={tmp_path}")[0]


@pytest.mark.parametrize(
    ("roles", "advice"),
    [
        (
            "lit unlit",
            "no task pairs lit -> unlit of folder; .*: vcdeft tasks new NAME --columns lit,unlit",
        ),
        ("output input mask2", r"no task pairs input \+ mask2 -> output of folder"),
        ("lit target", "no task pairs lit -> target of folder; .* --columns lit,target"),
        ("depth lit target", "no task pairs lit -> target"),
        ("a b c", r"no task pairs a \+ b -> c of folder; .* --columns a,b,c"),
        ("my-photos 1x", "no task can name the role '1x'"),
    ],
)
def test_a_check_says_how_roles_of_ones_own_become_a_task(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], roles: str, advice: str
) -> None:
    for role in roles.split():
        put(tmp_path / role / "1.png", png(1))
    said, _, _ = checked(capsys, f"folder={tmp_path}")
    assert len(re.findall(advice, said)) == 1


def test_photos_serve_what_is_made_of_a_target_and_the_check_names_the_other_way(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for k in range(3):
        put(tmp_path / f"IMG_{k}.png", png(k))
        put(tmp_path / f"IMG_{k}.txt", f"photo {k}")
    said, _, _ = checked(capsys, f"folder={tmp_path}")
    assert f"photos={tmp_path}" in said
    assert "colourisation" in said
    assert "canny-to-image" in said
    assert "no task pairs" not in said
    assert Folder(tmp_path).item(2).texts == {"caption": "photo 2"}


@every_layout
@pytest.mark.parametrize("columns", ["before,after", "before,target"])
def test_pairs_of_before_and_after_serve_a_task_of_either_name_in_every_layout(
    tmp_path: Path, layout: str, columns: str
) -> None:
    pairs = {item: {"before": v["depth"], "after": v["target"]} for item, v in PAIRS.items()}
    LAYOUTS[layout](tmp_path / "data", pairs, CAPTIONS)
    own = write_new_task("relight", columns.split(","), tmp_path / "own").parent
    told = {
        "data.sources": [f"folder={tmp_path / 'data'}"],
        "data.task_folders": [str(own)],
        "data.resolution": 32,
    }
    run = load_run(None, [*(f"{k}={json.dumps(v)}" for k, v in told.items()), "data.tasks=relight"])
    row = mixture_of(run)[0].rows[-1]
    assert [np.asarray(cell).mean() for cell in row] in [[*v.values()] for v in pairs.values()]


@pytest.mark.processes
def test_the_command_that_a_check_ends_with_runs_as_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("before/1", "after/1", "before/2", "after/2"):
        put(tmp_path / "my data" / f"{name}.png", png(len(name)))
    own = write_new_task("relight", ["before", "after"], tmp_path / "my tasks").parent
    said, _, _ = checked(capsys, f"folder={tmp_path / 'my data'}", "--task-folder", str(own))
    program, *words = shlex.split(said.rstrip().splitlines()[-1])
    assert (program, words[0]) == ("vcdeft", "train")
    assert words[words.index("--tasks") + 1] == "image-editing,relight"
    short = ["--steps", "1", "--batch", "1", "--processes", "1"]
    command = [sys.executable, "-m", "visualcloze_deft", *words, *short]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "my data" / "adapter" / "tasks" / "relight.toml").is_file()


def test_a_folder_opens_as_a_source_from_a_table_or_a_shard(tmp_path: Path) -> None:
    imagefolder_csv(tmp_path / "a", PAIRS, CAPTIONS)
    shard(tmp_path / "b", PAIRS, CAPTIONS)
    for place in ("a/metadata.csv", "b/pairs-000.tar"):
        assert len(open_source(f"folder={tmp_path / place}", size=16, seed=0)) == 3


def test_rows_that_share_a_picture_are_held_out_together(tmp_path: Path) -> None:
    """Also where a third row has one picture of each, and names of one file are written in two
    ways."""
    names = [("a", "1"), ("b", "2"), ("./a", "3"), ("c", "3"), ("d", "4"), ("b", "5")]
    for name in {name.strip("./") for pair in names for name in pair}:
        Image.effect_noise((32, 32), 50).save(tmp_path / f"{name}.png")
    rows = [{"before": f"{one}.png", "target": f"{other}.png"} for one, other in names]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = Folder(tmp_path)
    assert source.units is not None
    assert source.units.tolist() == [0, 1, 0, 0, 2, 1]
    shown, kept = (Part(source, every=2, held_out=held_out) for held_out in (False, True))
    pictures = [{name for k in part.own for name in rows[k].values()} for part in (shown, kept)]
    assert not pictures[0] & pictures[1]


def test_rows_without_a_picture_in_common_are_units_of_their_own(tmp_path: Path) -> None:
    for name in "abcd":
        Image.effect_noise((32, 32), 50).save(tmp_path / f"{name}.png")
    rows = [{"before": "a.png", "target": "b.png"}, {"before": "c.png", "target": "d.png"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert Folder(tmp_path).units is None
