"""`vcdeft data check` lists what of a folder no item shows, and why."""

from __future__ import annotations

import io
import os
import shutil
import tarfile
from pathlib import Path

import datasets
import pytest
from PIL import Image

from visualcloze_deft.cli import main
from visualcloze_deft.data.left_out import left_out
from visualcloze_deft.data.sources import open_source


def paint(path: Path, size: tuple[int, int] = (16, 16)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "red").save(path)
    return path


def lines(spec: str) -> str:
    return "\n".join(left_out(open_source(spec, size=32, seed=0)))


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Two pairs, and nothing else."""
    for role in ("before", "target"):
        for k in range(2):
            paint(tmp_path / "F" / role / f"{k}.png")
    return tmp_path / "F"


def test_nothing_is_said_where_all_is_taken(pairs: Path) -> None:
    (pairs / "caption").mkdir()
    (pairs / "caption" / "0.txt").write_text("a")
    (pairs / ".DS_Store").write_text("a")
    (pairs / "README.md").write_text("a")
    assert lines(f"folder={pairs}") == ""


def test_texts_that_no_item_reads_are_named(pairs: Path) -> None:
    for place in ("target/0.txt", "0_instruction.txt", "instruction/1.txt", "1.txt"):
        (pairs / place).parent.mkdir(exist_ok=True)
        (pairs / place).write_text("read")
    assert lines(f"folder={pairs}") == ""
    for place in ("before/0.txt", "captions/0.txt", "7.txt", ".cache/0.txt"):
        (pairs / place).parent.mkdir(exist_ok=True)
        (pairs / place).write_text("not read")
    said = lines(f"folder={pairs}")
    assert said.endswith("a text that is read for no item")
    assert ".cache" not in said
    assert all(name in said for name in ("before/0.txt", "captions/0.txt", "7.txt"))


def test_a_shard_is_taken_where_an_item_is_in_it(pairs: Path, tmp_path: Path) -> None:
    for name in ("a.tar", "b.tar"):
        with tarfile.open(tmp_path / name, "w") as archive:
            if name == "a.tar":
                archive.add(pairs / "target" / "0.png", "0.png")
    assert lines(f"folder={tmp_path / 'a.tar'}") == lines(f"folder={tmp_path}")
    assert "b.tar: .tar is not read" in lines(f"folder={tmp_path}")
    assert "a.tar" not in lines(f"folder={tmp_path}")


def test_pictures_in_deeper_folders_and_other_files_are_named(
    pairs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for k in range(5):
        paint(pairs / "target" / "more" / f"{k}.png")
    (pairs / "target" / "raw.nef").write_bytes(b"x")
    (pairs / "target" / "layers.psd").write_bytes(b"x")
    (pairs / "target" / "lost.mov").symlink_to("gone.mov")
    (pairs / "target" / "0.txt").symlink_to("0.txt")
    os.mkfifo(pairs / "target" / "1.txt")
    main(["data", "check", f"folder={pairs}", "--workers", "0"])
    said = capsys.readouterr().err
    more = "target/more/0.png, target/more/1.png, target/more/2.png and 2 more"
    assert f"left out: {more}: a picture that belongs to no item" in said
    assert "left out: target/raw.nef: .nef is not read" in said
    assert "left out: target/layers.psd: .psd is not read" in said
    assert "left out: target/0.txt, target/lost.mov: a link that leads nowhere" in said
    assert "left out: target/1.txt: a pipe or a device" in said


def test_names_of_any_length_leave_a_line_short(pairs: Path) -> None:
    for letter in "abc":
        (pairs / "target" / f"{letter * 200}.nef").write_bytes(b"x")
    (line,) = lines(f"folder={pairs}").splitlines()
    assert len(line) < 400
    assert line.endswith(".nef is not read")


def test_pictures_that_no_row_of_a_table_names_are_named(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        paint(tmp_path / f"{name}.png")
    (tmp_path / "rows.jsonl").write_text('{"before": "a.png", "target": "b.png"}')
    assert lines(f"folder={tmp_path}") == "c.png: a picture that belongs to no item"


def test_links_are_followed_once_and_loops_end(pairs: Path) -> None:
    (pairs / "before" / "up").symlink_to("..")
    (pairs / "README.md").symlink_to("gone.md")
    shutil.move(pairs / "target", pairs.parent / "photos")
    (pairs / "target").symlink_to(pairs.parent / "photos")  # a folder elsewhere is the user's own
    for cache in (None, pairs.parent / "index"):
        assert len(open_source(f"folder={pairs}", size=32, seed=0, cache=cache)) == 2
    assert lines(f"folder={pairs}") == ""


def test_a_picture_that_is_a_broken_link_is_named(
    pairs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for role in ("before", "target"):
        (pairs / role / "2.png").symlink_to("gone.png")
    assert len(open_source(f"folder={pairs}", size=32, seed=0, cache=pairs.parent / "i")) == 3
    with pytest.raises(SystemExit) as ended:
        main(["data", "check", f"folder={pairs}", "--workers", "0"])
    assert ended.value.code == 1
    assert "2.png: no such image; it is a link that leads nowhere" in capsys.readouterr().err


def png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(file, "PNG")
    return file.getvalue()


def shard(path: Path, **columns: list[object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict({"target": [png()]} | columns).to_parquet(path)


def test_missing_shards_and_other_splits_are_named(tmp_path: Path) -> None:
    for k in (0, 3):
        shard(tmp_path / "data" / f"train-{k:05d}-of-00004.parquet", watermark=[1])
    shard(tmp_path / "data" / "test-00000-of-00001.parquet")
    said = lines(f"graph200k={tmp_path}")
    assert (
        "train-00001-of-00004.parquet, train-00002-of-00004.parquet: missing; 2 of 4 files" in said
    )
    assert "test-00000-of-00001.parquet: of another split than train" in said
    assert "watermark: columns that no role is read from" in said


def test_a_subject_of_one_photo_is_named(tmp_path: Path) -> None:
    for name in ("cat/0", "cat/1", "dog/0", "loose"):
        paint(tmp_path / f"{name}.jpg")
    assert "loose.jpg, dog/0.jpg: a picture that belongs to no item" in lines(
        f"dreambooth={tmp_path}"
    )


def test_boxes_of_objects_without_a_folder_are_named(tmp_path: Path) -> None:
    for k in (1, 2):
        paint(tmp_path / "Objects" / "001_cup" / "images" / f"00{k}.jpg")
    paint(tmp_path / "Objects" / "002_bowl" / "images" / "001.jpg")
    place = tmp_path / "Scenes" / "easy" / "desk_001"
    for k in range(2):
        paint(place / f"rgb_00{k}.jpg", (40, 30))
    box = "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox>"
    (place / "rgb_000.xml").write_text(
        "<a><size><width>40</width><height>30</height></size>"
        + "".join(f"<object><name>{n}</name>{box}</object>" for n in ("001_cup", "009_fork"))
        + "</a>"
    )
    said = lines(f"insdet={tmp_path}")
    assert "009_fork: no folder in Objects; 1 boxes are passed over" in said
    assert "002_bowl: fewer than two views" in said
    assert "Scenes/easy/desk_001/rgb_001.jpg: a picture that belongs to no item" in said
    assert "same_place.jsonl: not there" in said
    assert "rgb_000.jpg" not in said


def test_names_are_said_without_what_a_terminal_obeys(pairs: Path) -> None:
    os.rename(pairs / "target" / "1.png", os.fsencode(pairs) + b"/target/1\xe9\x1b[2J.psd")
    os.unlink(pairs / "before" / "1.png")
    assert lines(f"folder={pairs}") == "target/1\\udce9\\x1b[2J.psd: .psd is not read"
