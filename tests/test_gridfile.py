"""A grid file says what is to be generated; a bad one ends in one line that names the fault."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from visualcloze_deft.errors import UserError
from visualcloze_deft.grids.prompt import Prompt, layout_sentence
from visualcloze_deft.inference.grid_reading import read_requests
from visualcloze_deft.inference.request import request
from visualcloze_deft.task_registry.files import load_tasks

TASKS = load_tasks()
GridFile = Callable[..., Path]
Refused = Callable[..., str]
ROW = ["a.png", "b.png"]
QUERY = ["a.png", None]


# ---- what a good file means


def test_null_is_what_is_generated_and_paths_are_relative_to_the_file(
    grid_file: GridFile, tmp_path: Path
) -> None:
    [asked] = read_requests(grid_file(), TASKS)
    assert asked.targets == (1,)
    assert asked.rows[1][1] is None
    assert asked.rows[0][1].getpixel((0, 0)) == (0, 0, 255)
    absolute = grid_file(rows=[[str(tmp_path / "b.png"), None]])
    [asked] = read_requests(absolute, TASKS)
    assert asked.rows[0][0].getpixel((0, 0)) == (0, 0, 255)


def test_the_prompt_holds_layout_task_and_content(grid_file: GridFile) -> None:
    [asked] = read_requests(grid_file(content_prompt="a cup"), TASKS)
    sentence = TASKS["depth-to-image"].sentence()
    assert asked.prompt == Prompt(rows=2, columns=2, task=sentence, content="a cup")


def test_a_task_prompt_replaces_the_sentence_of_the_task(grid_file: GridFile) -> None:
    for keys in ({"task_prompt": "Paint."}, {"task_prompt": "Paint.", "task": None}):
        [asked] = read_requests(grid_file(**keys), TASKS)
        assert asked.task_prompt == "Paint."
    [asked] = read_requests(grid_file(task_prompt=""), TASKS)
    assert asked.task_prompt == ""


def test_without_task_and_prompt_the_examples_speak_alone(grid_file: GridFile) -> None:
    [asked] = read_requests(grid_file({"rows": [ROW, QUERY]}), TASKS)
    assert str(asked.prompt) == layout_sentence(2, 2)


@pytest.mark.parametrize(
    ("own", "given", "seed"), [(None, None, 0), (5, None, 5), (5, 7, 7), (5, 0, 0), (None, 7, 7)]
)
def test_a_given_seed_replaces_the_own_one(
    grid_file: GridFile, own: int | None, given: int | None, seed: int
) -> None:
    [asked] = read_requests(grid_file(seed=own), TASKS, seed=given)
    assert asked.seeds == (seed,)


def test_a_list_holds_several_grids(grid_file: GridFile) -> None:
    path = grid_file([{"rows": [QUERY], "seed": k} for k in range(3)])
    assert [asked.seeds for asked in read_requests(path, TASKS)] == [(0,), (1,), (2,)]


def test_several_targets_are_named_by_their_columns() -> None:
    image = Image.new("RGB", (16, 16))
    assert request([[None, image, None]], TASKS).targets == (0, 2)


# ---- what a bad file ends in


BAD_KEYS = {
    "unknown task": ({"task": "dept-to-image"}, "unknown task 'dept-to-image'; did you mean depth"),
    "task of other width": ({"task": "object-insertion"}, "has 3 columns (view, hole, target)"),
    "task as number": ({"task": 3}, "task must be text or null, not 3"),
    "unknown key": ({"content_promt": "x"}, "'content_promt'; did you mean content_prompt"),
    "seed as text": ({"seed": "7"}, "seed must be a whole number or a list or null, not '7'"),
    "seed as truth": ({"seed": True}, "seed must be a whole number or a list or null, not True"),
    "seed as fraction": ({"seed": 0.5}, "seed must be a whole number or a list or null, not 0.5"),
    "seed too large": ({"seed": 2**70}, "seed"),
    "seed too small": ({"seed": -(2**70)}, "seed"),
    "prompt as list": ({"task_prompt": ["x"]}, "task_prompt must be text or null"),
    "content as number": ({"content_prompt": 1}, "content_prompt must be text or null, not 1"),
    "rows as object": ({"rows": {}}, "rows must be a list, not {}"),
    "rows as null": ({"rows": None}, "rows must be a list, not None"),
    "no rows": ({"rows": []}, "the grid has no rows"),
    "empty row": ({"rows": [[]]}, "the grid has no rows"),
    "row as text": ({"rows": ["a.png"]}, "row 1 must be a list of paths, not 'a.png'"),
    "row as null": ({"rows": [ROW, None]}, "row 2 must be a list of paths, not None"),
    "cell as number": ({"rows": [ROW, [1, None]]}, "row 2: a cell is a path or null, not 1"),
    "ragged": ({"rows": [["a.png"], QUERY]}, "row 1 has 1 images, row 2 has 2"),
    "no target": ({"rows": [ROW, ROW]}, "no target"),
    "hole in an example": ({"rows": [QUERY, QUERY]}, "row 1 is an example and has a hole"),
    "nothing shown": ({"rows": [[None, None]]}, "the grid shows no image"),
    "missing image": ({"rows": [["gone.png", None]]}, "gone.png: no such image"),
    "folder as image": ({"rows": [["", None]]}, "a folder, not an image"),
    "path of no file": ({"rows": [["a\0b.png", None]]}, "b.png"),
    "path too long": ({"rows": [["a" * 300, None]]}, "aaa"),
}


@pytest.mark.parametrize(("keys", "message"), BAD_KEYS.values(), ids=BAD_KEYS)
def test_a_bad_grid_is_named_with_its_fault(
    grid_file: GridFile,
    refused: Refused,
    hollow_model: Path,
    tmp_path: Path,
    keys: dict[str, object],
    message: str,
) -> None:
    path = grid_file(**keys)
    output = tmp_path / "out"
    line = refused("infer", "--examples", path, "--model", hollow_model, "--output", output)
    assert line.startswith(f"vcdeft: {path}: ")
    assert message in line
    assert not output.exists()


BAD_FILES = {
    "typo": (b'{"rows": [["a.png", null]}', "not valid JSON"),
    "trailing comma": (b'{"rows": [["a.png", null],]}', "not valid JSON"),
    "empty": (b"", "not valid JSON"),
    "no text": (b"\xff\xfe\x00", "cannot be read"),
    "a word": (b'"rows"', "expected an object with the key 'rows', found 'rows'"),
    "null": (b"null", "expected an object with the key 'rows', found None"),
    "no grid": (b"[]", "the list of grids is empty"),
    "no rows": (b"{}", "the key 'rows' is missing"),
    "second grid": (b'[{"rows": [["a.png", null]]}, {"row": []}]', "grid 2: unknown key 'row'"),
    "list in list": (b"[[]]", "grid 1: expected an object"),
    "deep": (b"[" * 100_000, "not valid JSON"),
    "long number": (b'{"seed": ' + b"9" * 5000 + b"}", "not valid JSON"),
}


@pytest.mark.parametrize(("content", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_file_is_named(
    grid_file: GridFile, refused: Refused, hollow_model: Path, content: bytes, message: str
) -> None:
    path = grid_file()
    path.write_bytes(content)
    line = refused("infer", "--examples", path, "--model", hollow_model)
    assert str(path) in line
    assert message in line


def test_a_file_that_is_not_there_is_named(
    tmp_path: Path, refused: Refused, hollow_model: Path
) -> None:
    for path, message in (
        (tmp_path / "gone.json", "no such file"),
        (tmp_path, "no .json file of grids in this folder"),
    ):
        line = refused("infer", "--examples", path, "--model", hollow_model)
        assert f"{path}: {message}" in line


def png_of_size(width: int, height: int) -> bytes:
    """A PNG whose header promises more, or less, than its data holds."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
        for chunk in (header, b"IDAT" + zlib.compress(b"\0" * 100), b"IEND")
    )


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"Dear diary",
        None,
        png_of_size(0, 8),
        png_of_size(64, 64),
        png_of_size(100_000, 90_000),
    ],
    ids=["empty", "text", "truncated", "no area", "short of pixels", "huge"],
)
def test_a_bad_image_is_named(
    grid_file: GridFile, refused: Refused, hollow_model: Path, content: bytes | None
) -> None:
    path = grid_file()
    image = path.parent / "b.png"
    image.write_bytes(image.read_bytes()[:-30] if content is None else content)
    line = refused("infer", "--examples", path, "--model", hollow_model)
    assert line.startswith(f"vcdeft: {path}: {image}: ")


def test_a_name_in_a_message_is_on_one_line(grid_file: GridFile) -> None:
    with pytest.raises(UserError, match="unknown task"):
        read_requests(grid_file(task="a\nb"), TASKS)


def test_a_written_grid_may_be_indented_and_in_any_language(grid_file: GridFile) -> None:
    path = grid_file()
    entry = json.loads(path.read_text(encoding="utf-8")) | {"content_prompt": "eine rote Tasse ☕"}
    path.write_text(json.dumps(entry, indent=2, ensure_ascii=False), encoding="utf-8")
    assert read_requests(path, TASKS)[0].content_prompt == "eine rote Tasse ☕"
