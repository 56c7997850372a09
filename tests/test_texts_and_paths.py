"""Texts and paths that other programs wrote: marks and halves of characters, names of any bytes,
tables that were moved, folders whose names look like patterns.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from visualcloze_deft.cli import main
from visualcloze_deft.config.run_settings import load_run
from visualcloze_deft.config.source_specs import from_root, place_and_split
from visualcloze_deft.data.sources import open_source
from visualcloze_deft.data.sources.dreambooth import DreamBooth
from visualcloze_deft.data.sources.folder import Folder
from visualcloze_deft.data.sources.graph200k import Graph200K
from visualcloze_deft.errors import MOST, UserError
from visualcloze_deft.evaluation.folders import read_texts
from visualcloze_deft.evaluation.settings import state_of
from visualcloze_deft.evaluation.subject_suites import read_prompts
from visualcloze_deft.inference.grid_reading import read_requests
from visualcloze_deft.storage.atomic import write_text
from visualcloze_deft.storage.jsonl import read_lines
from visualcloze_deft.storage.text_files import read_json
from visualcloze_deft.task_registry.files import load_tasks, read_tasks
from visualcloze_deft.training.preparation import check_settings
from visualcloze_deft.training.run_folder import append_line

MARK = b"\xef\xbb\xbf"


def paint(path: Path, colour: str = "red") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16), colour).save(path)
    return path


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    for role in ("before", "target"):
        for k in range(2):
            paint(tmp_path / "F" / role / f"{k}.png")
    return tmp_path / "F"


def windows(path: Path, text: str) -> Path:
    """A file as editors of Windows save it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(MARK + text.replace("\n", "\r\n").encode())
    return path


# ---- texts


def test_no_text_holds_a_byte_order_mark(pairs: Path) -> None:
    for name in ("instruction", "caption"):
        windows(pairs / name / "0.txt", "turn day to night\n")
    texts = Folder(pairs).item(0).texts
    assert texts == {"caption": "turn day to night", "instruction": "turn day to night"}
    row = json.dumps({"target": "target/0.png", "caption": "\ufeffa day"}, ensure_ascii=False)
    windows(pairs / "rows.jsonl", row + "\n" + row + "\n")
    assert Folder(pairs).item(1).texts == {"caption": "a day"}


def test_every_file_of_words_may_begin_with_a_mark(tmp_path: Path) -> None:
    assert load_run(str(windows(tmp_path / "run.toml", "steps = 3\nseed = 4\n"))).steps == 3
    task = (
        'summary = "s"\ngroup = "g"\ninstruction = "{day} to {night}"\ncontent = ""\n'
        '[columns]\nday = "day"\nnight = "night"\n'
    )
    assert read_tasks(windows(tmp_path / "day-night.toml", task))[0].roles == ("day", "night")
    paint(tmp_path / "a.png")
    grid = {"rows": [["a.png", None]], "content_prompt": "\ufeffa day"}
    (request,) = read_requests(windows(tmp_path / "grid.json", json.dumps(grid)), load_tasks())
    assert request.content_prompt == "a day"
    for k in range(2):
        paint(tmp_path / "cat" / f"{k}.jpg")
    words = "subject_name,class\ncat,tabby\n\nObject Prompts\n'a {0} {1}'.format(unique_token, "
    words += "class_token)\nLive Subject Prompts\n'b {0} {1}'.format(unique_token, class_token)\n"
    windows(tmp_path / "prompts_and_classes.txt", words)
    assert DreamBooth(tmp_path).item(0).texts == {"caption": "a tabby"}
    assert read_prompts(tmp_path / "prompts_and_classes.txt")["live"] == ["b {0} {1}"]
    prompts = windows(tmp_path / "prompts.json", json.dumps({"a": "a day"}))
    assert read_texts(prompts, {"a": tmp_path / "a.png"}) == {"a": "a day"}


def test_half_of_an_emoji_is_read_as_the_sign_for_what_is_lost(
    pairs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = '{"before": "before/0.png", "target": "target/0.png", "instruction": "add \\ud83c"}\n'
    whole = row.replace("\\ud83c", "\\ud83c\\udf89")
    (pairs / "rows.jsonl").write_text(row + whole)
    source = Folder(pairs, cache=pairs.parent / "index")
    assert source.item(0).texts["instruction"] == "add \ufffd"
    assert source.item(1).texts["instruction"] == "add \U0001f389"
    main(["data", "check", f"folder={pairs}", "--workers", "0"])
    assert "2 items" in capsys.readouterr().out
    grid = '{"task": "image-editing", "rows": [["F/before/0.png", null]], "content_prompt": "%s"}'
    (pairs.parent / "grid.json").write_text(grid % "\\ud83c")
    (request,) = read_requests(pairs.parent / "grid.json", load_tasks())
    assert request.content_prompt == "\ufffd"
    upsampled = {"rows": [["F/before/0.png", None]], "upsampling": {"prompt": "\ud83c"}}
    (pairs.parent / "grid.json").write_text(json.dumps(upsampled))
    (request,) = read_requests(pairs.parent / "grid.json", load_tasks())
    assert request.upsampling[0] is not None
    assert request.upsampling[0].prompt == "\ufffd"
    row = {"target": "target/0.png"}
    words = {"item": "A fox.", "description_0": "\ud83c"}
    (pairs / "data.json").write_text(json.dumps([{"condition": row, "description": words}]))
    assert Graph200K(pairs).item(0).texts["caption"] == "A fox. \ufffd"


@pytest.mark.parametrize("deep", ["[" * 100_000, '{"a":' * 100_000, "1" * 5000])
def test_what_no_parser_reads_is_one_line(tmp_path: Path, deep: str) -> None:
    for name in ("data.json", "rows.jsonl", "grid.json"):
        (tmp_path / name).write_text(deep)
    for read in (
        lambda: Graph200K(tmp_path),
        lambda: Folder(tmp_path),
        lambda: read_requests(tmp_path / "grid.json", load_tasks()),
        lambda: read_json(tmp_path / "data.json"),
    ):
        with pytest.raises(UserError) as raised:
            read()
        assert len(str(raised.value)) <= MOST


def test_a_toml_file_nested_too_deeply_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("a = " + "[" * 100_000)
    with pytest.raises(UserError, match="not valid TOML"):
        load_run(str(tmp_path / "a.toml"))


def test_a_message_is_one_line_that_a_terminal_can_show() -> None:
    message = str(UserError("a\nb\x1b[31m \udce9 " + "x" * 1000 + " leave it"))
    assert message.startswith("a b\\x1b[31m \\udce9 x")
    assert message.endswith("leave it")
    assert len(message) == MOST


@pytest.mark.parametrize("name", ["rows.jsonl", "data.json", "grid.json"])
def test_a_pipe_is_not_waited_for(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    read = {
        "rows.jsonl": lambda path: open_source(f"folder={path.parent}", size=16, seed=0),
        "data.json": lambda path: open_source(f"graph200k={path}", size=16, seed=0),
        "grid.json": lambda path: read_requests(path, load_tasks()),
    }[name]
    with pytest.raises(UserError):
        read(tmp_path / name)


# ---- names of files


@pytest.mark.parametrize("layout", ["subfolders", "suffixes", "table"])
def test_names_of_any_bytes_are_items(tmp_path: Path, layout: str) -> None:
    root = os.fsencode(tmp_path / "F")
    odd = b"caf\xe9"
    names = {"before": b"%b_before.png", "target": b"%b_target.png"}
    if layout == "subfolders":
        names = {"before": b"before/%b.png", "target": b"target/%b.png"}
    row = {}
    for role, name in names.items():
        path = os.path.join(root, name % odd)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        paint(Path(os.fsdecode(path)))
        row[role] = os.fsdecode(name % odd)
    if layout == "table":
        (tmp_path / "F" / "rows.jsonl").write_text(json.dumps(row))
    for cache in (None, tmp_path / "index", tmp_path / "index"):
        item = Folder(tmp_path / "F", cache=cache).item(0)
        assert item.image("before").size == (16, 16)
        item.key.encode()
    os.unlink(os.path.join(root, names["before"] % odd))
    with pytest.raises(UserError, match=r"caf\\udce9") as raised:
        item.image("before")
    append_line(tmp_path / "skipped.jsonl", {"item": item.key, "why": str(raised.value)})


def test_names_hold_without_utf8_mode(tmp_path: Path) -> None:
    for role in ("before", "target"):
        for name in ("0.png", "caf\u00e9.png"):
            paint(tmp_path / "G" / role / name)
    plain = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
    words = ["-m", "visualcloze_deft", "data", "check", "folder=G", "--workers", "0"]
    run = subprocess.run(
        [sys.executable, *words], cwd=tmp_path, env=os.environ | plain, capture_output=True
    )
    assert run.returncode == 0, run.stderr
    assert b"2 items" in run.stdout


@pytest.mark.parametrize("role", ["be\nfore", " ", "be\x1bfore", "be\udce9"])
@pytest.mark.parametrize("layout", ["subfolders", "table"])
def test_a_role_that_is_no_word_is_refused(tmp_path: Path, role: str, layout: str) -> None:
    paint(tmp_path / "target" / "0.png")
    if layout == "table":
        row = {role: "target/0.png", "target": "target/0.png"}
        (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    else:
        paint(tmp_path / role / "0.png")
    with pytest.raises(UserError, match="is no word") as raised:
        Folder(tmp_path)
    assert str(raised.value).isprintable()


# ---- tables that were moved


def unpacked(folder: Path, where: str, count: int = 2) -> Path:
    """Graph200K as its preprocessing writes it, in a folder called `where` then."""
    rows = []
    for k in range(count):
        names = {role: f"{role}/{k}_{role}.png" for role in ("target", "depth")}
        for name in names.values():
            paint(folder / name)
        rows.append({"condition": {role: f"{where}/{name}" for role, name in names.items()}})
    (folder / "data.json").write_text(json.dumps(rows))
    return folder


def test_a_data_json_is_moved_with_its_pictures(tmp_path: Path) -> None:
    unpacked(tmp_path / "train", "/data/graph200k/train")
    (tmp_path / "here").symlink_to("train")
    for place in ("train", "here"):
        for cache in (None, tmp_path / "index"):
            source = Graph200K(tmp_path / place, cache=cache)
            assert len(source) == 2
            assert source.item(1).image("depth").size == (16, 16)


def test_a_table_reached_through_a_link_finds_what_it_names(tmp_path: Path) -> None:
    real = tmp_path / "real"
    unpacked(real, str(real))
    (tmp_path / "here").symlink_to("real")
    assert Graph200K(tmp_path / "here").item(0).image("target").size == (16, 16)
    row = {role: str(real / role / f"0_{role}.png") for role in ("target", "depth")}
    (real / "rows.jsonl").write_text(json.dumps(row))
    assert Folder(tmp_path / "here").item(0).image("depth").size == (16, 16)


def test_a_path_without_an_end_that_exists_is_refused(tmp_path: Path) -> None:
    paint(tmp_path / "elsewhere" / "1_target.png")
    folder = unpacked(tmp_path / "train", "/data/graph200k/train")
    (folder / "target" / "1_target.png").unlink()
    with pytest.raises(UserError, match=r"item 1: target: /data/.*1_target\.png leads out of"):
        Graph200K(folder)
    rows = [{"condition": {"target": str(tmp_path / "elsewhere" / "1_target.png")}}]
    (folder / "data.json").write_text(json.dumps(rows))
    with pytest.raises(UserError, match="no end of it is a file in there"):
        Graph200K(folder)


@pytest.mark.parametrize("name", ["a\ud83c.png", "x" * 5000, "a\0b.png", "/old/" + "x/" * 3000])
@pytest.mark.parametrize("place", [0, 1])
def test_a_name_that_no_file_can_have_is_one_line(tmp_path: Path, name: str, place: int) -> None:
    paint(tmp_path / "a.png")
    rows = [{"condition": {"target": "a.png"}} for _ in range(2)]
    rows[place]["condition"]["target"] = name
    (tmp_path / "data.json").write_text(json.dumps(rows))
    with pytest.raises(UserError) as raised:  # where it is opened, or where it is read
        Graph200K(tmp_path, cache=tmp_path / "index").item(place).image("target")
    assert str(raised.value).isprintable()


def test_the_longest_end_is_meant(tmp_path: Path) -> None:
    paint(tmp_path / "a.png", "red")
    paint(tmp_path / "target" / "a.png", "blue")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"target": "/old/place/target/a.png"}))
    assert Folder(tmp_path).item(0).image("target").getpixel((0, 0)) == (0, 0, 255)


# ---- parquet


def png(colour: str = "red") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (16, 16), colour).save(file, "PNG")
    return file.getvalue()


def parquet(folder: Path, name: str = "train-00000-of-00001", **columns: list[object]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(columns).to_parquet(folder / f"{name}.parquet")
    return folder


@pytest.mark.parametrize("name", ["br[1]ack", "me@host", "a*b", "q?x", "{a,b}", "~x", "a b"])
def test_a_folder_is_called_as_it_is_called(tmp_path: Path, name: str) -> None:
    parquet(tmp_path / "ab", target=[png("blue")] * 3)
    parquet(tmp_path / "br1ack", target=[png("blue")] * 3)
    parquet(tmp_path / name, target=[png()])
    parquet(tmp_path / name, "test", target=[png()] * 2)
    for spec, count in ((name, 1), (f"{name}@test", 2)):
        source = open_source(f"graph200k={tmp_path / spec}", size=16, seed=0)
        assert len(source) == count
        assert source.item(0).image("target").getpixel((0, 0)) == (255, 0, 0)
    for kind, photos in (("folder", "target/{}"), ("dreambooth", "cat/{}")):
        for k in range(2):
            paint(tmp_path / kind / name / f"{photos.format(k)}.png")
        assert len(open_source(f"{kind}={tmp_path / kind / name}", size=16, seed=0)) == 2


def test_a_folder_that_is_there_wins_over_a_split(tmp_path: Path) -> None:
    for name in ("me", "me@host"):
        (tmp_path / name).mkdir()
    assert place_and_split(f"{tmp_path}/me@host") == (f"{tmp_path}/me@host", "train")
    assert place_and_split(f"{tmp_path}/me@host@test") == (f"{tmp_path}/me@host", "test")
    assert place_and_split(f"{tmp_path}/me@test") == (f"{tmp_path}/me", "test")


def test_cells_of_plain_bytes_are_pictures(tmp_path: Path) -> None:
    depth = np.linspace(500, 6000, 256).reshape(16, 16).astype(np.uint16)
    file = io.BytesIO()
    Image.fromarray(depth).save(file, "PNG")
    parquet(tmp_path, target=[png(), png()], depth=[file.getvalue(), None])
    source = open_source(f"graph200k={tmp_path}", size=16, seed=0)
    assert source.item(0).image("target").size == (16, 16)
    assert source.item(0).image("depth").getpixel((0, 0)) == (255, 255, 255)
    assert set(source.item(1).images) == {"target"}


def test_cells_that_name_a_file_are_that_file(tmp_path: Path) -> None:
    paint(tmp_path / "pictures" / "a.png", "blue")
    cells = [{"bytes": None, "path": path} for path in ("pictures/a.png", "/old/pictures/a.png")]
    cells += [{"bytes": None, "path": None}, {"bytes": png(), "path": "gone.png"}]
    parquet(tmp_path, target=[{"bytes": png(), "path": None}] * 4, depth=cells)
    source = open_source(f"graph200k={tmp_path}", size=16, seed=0)
    for k in range(2):
        assert source.item(k).image("depth").getpixel((0, 0)) == (0, 0, 255)
    assert set(source.item(2).images) == {"target"}
    assert source.item(3).image("depth").getpixel((0, 0)) == (255, 0, 0)
    parquet(tmp_path, target=[{"bytes": None, "path": "/etc/hostname"}])
    with pytest.raises(UserError, match="item 0, target: /etc/hostname leads out of"):
        open_source(f"graph200k={tmp_path}", size=16, seed=0).item(0).image("target")


@pytest.mark.parametrize("cells", [["a.png"], [3], [[1, 2]], [{"a": 1}], [0.5], [True]])
def test_a_column_of_anything_else_is_named(tmp_path: Path, cells: list[object]) -> None:
    parquet(tmp_path, target=[png()], depth=cells)
    with pytest.raises(UserError, match=r"column depth holds .*; expected pictures"):
        open_source(f"graph200k={tmp_path}", size=16, seed=0)


# ---- paths of a run


def test_a_declaration_beside_data_is_part_of_what_an_evaluation_is_of(tmp_path: Path) -> None:
    unpacked(tmp_path / "T", ".")
    before = state_of(str(tmp_path / "T"))
    assert state_of(str(tmp_path / "T")) == before
    (tmp_path / "T" / "depth.toml").write_text("meaning = 'picture'")
    assert state_of(str(tmp_path / "T")) != before


def test_data_paths_of_a_run_hold_from_any_folder(
    pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parquet(pairs.parent / "T", target=[png()])
    monkeypatch.chdir(pairs.parent)
    told = ["folder=F", "graph200k=T@train", "graph200k=VisualCloze/Graph200K", "scenes=9"]
    run = load_run(None, [f"data.sources={json.dumps(told)}", 'data.annotate.depth="F"'])
    here = str(pairs.parent)
    assert run.data.sources == (
        f"folder={here}/F",
        f"graph200k={here}/T@train",
        "graph200k=VisualCloze/Graph200K",
        "scenes=9",
    )
    assert run.data.annotate == {"depth": f"{here}/F"}
    assert load_run(None, ["data.embedding_cache=kept"]).data.embedding_cache == f"{here}/kept"
    assert load_run(None, ["data.embedding_cache=run"]).data.embedding_cache == "run"
    assert from_root("depth-anything/Depth-Anything-V2-Small-hf").startswith("depth-anything")


def test_a_setting_that_cannot_be_written_down_is_refused(tmp_path: Path) -> None:
    root = os.path.join(os.fsencode(tmp_path), b"caf\xe9")
    os.makedirs(root)
    run = load_run(None, [f"data.sources={json.dumps(['folder=x'])}"])
    odd = run.data.model_copy(update={"sources": (f"folder={os.fsdecode(root)}",)})
    with pytest.raises(UserError, match=r"data\.sources = .*: a name that is not UTF-8"):
        check_settings(run.model_copy(update={"data": odd}))


def test_files_of_results_name_what_is_not_utf8(tmp_path: Path) -> None:
    odd = os.fsdecode(b"caf\xe9.png")
    write_text(tmp_path / "a.json", json.dumps({"name": odd}, ensure_ascii=False))
    assert read_json(tmp_path / "a.json") == {"name": odd}  # the same file again
    append_line(tmp_path / "lines.jsonl", {"step": 1, "name": odd})
    assert read_lines(tmp_path / "lines.jsonl") == [{"step": 1, "name": odd}]
