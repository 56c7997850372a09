"""DreamBench++ asks and does not answer: its items are queries without a truth."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from visualcloze_deft.cli import main
from visualcloze_deft.config.run_settings import parse_run
from visualcloze_deft.data.query_sources import query_sources
from visualcloze_deft.data.sources import open_source
from visualcloze_deft.data.sources.dreambench_plus import DreamBenchPlus
from visualcloze_deft.errors import UserError
from visualcloze_deft.inference.grid_reading import read_requests
from visualcloze_deft.task_registry.files import load_tasks
from visualcloze_deft.training.run_data import mixture_of
from visualcloze_deft.training.summary import summary_of

REAL = Path(os.environ.get("VCDEFT_DATA", ""))
real_data = pytest.mark.skipif(
    not os.environ.get("VCDEFT_DATA"), reason="VCDEFT_DATA names no folder of real data"
)
PROMPTS = {
    "animal/00": ["fox", "a fox in snow", "a fox at sea"],
    "style/00": ["ink", "an ink fort"],
}
TASKS = load_tasks()


@pytest.fixture
def bench(tmp_path: Path) -> Path:
    """Two subjects with three prompts, the pictures blue."""
    root = tmp_path / "bench"
    for stem, lines in PROMPTS.items():
        for place in ("images", "captions"):
            (root / "data" / place / stem).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), "blue").save(root / "data" / "images" / f"{stem}.jpg")
        text = "\n".join([*lines, ""])
        (root / "data" / "captions" / f"{stem}.txt").write_text(text, encoding="utf-8")
    return root


@pytest.fixture
def dogs(tmp_path: Path) -> Path:
    """A DreamBooth of one subject in three red photos."""
    (tmp_path / "dogs" / "dog").mkdir(parents=True)
    for k in range(3):
        Image.new("RGB", (32, 32), "red").save(tmp_path / "dogs" / "dog" / f"{k}.jpg")
    return tmp_path / "dogs"


def asked(output: Path, *words: object) -> list[dict[str, Any]]:
    """The grids that `vcdeft tasks example subject-driven WORDS` writes."""
    main(["tasks", "example", "subject-driven", "--output", str(output), *map(str, words)])
    grids: list[dict[str, Any]] = json.loads((output / "grid.json").read_text())
    return grids


# ---- the source


def test_every_prompt_is_an_item(bench: Path) -> None:
    source = DreamBenchPlus(bench)
    items = [source.item(k) for k in range(len(source))]
    assert [item.key for item in items] == ["animal/00 1", "animal/00 2", "style/00 1"]
    assert [item.texts["caption"] for item in items] == [
        "a fox in snow",
        "a fox at sea",
        "an ink fort",
    ]
    assert [item.texts["subject"] for item in items] == ["fox", "fox", "ink"]
    assert source.roles == DreamBenchPlus.roles == set(items[0].images)


def test_the_folder_called_data_does_too(bench: Path) -> None:
    assert len(DreamBenchPlus(bench / "data")) == len(DreamBenchPlus(bench))


def test_pictures_need_no_folders_of_classes_and_have_any_name(tmp_path: Path) -> None:
    for name in ("images", "captions"):
        (tmp_path / name).mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "0_ein Bär.v2.jpg")
    (tmp_path / "captions" / "0_ein Bär.v2.txt").write_bytes("\ufeffBär\r\nBär im Bad".encode())
    item = DreamBenchPlus(tmp_path).item(0)
    assert item.key == "0_ein Bär.v2 1"
    assert item.texts == {"caption": "Bär im Bad", "subject": "Bär"}
    assert item.image("reference").size == (8, 8)


@pytest.mark.parametrize(
    ("path", "content", "message"),
    [
        ("captions/animal/00.txt", None, r"00\.jpg: its prompts .*00\.txt are missing"),
        ("captions/animal/00.txt", b"", "expected the subject in line 1"),
        ("captions/animal/00.txt", b"fox\n\n", "expected the subject in line 1"),
        ("captions/animal/00.txt", b"\na fox", "expected the subject in line 1"),
        ("captions/animal/00.txt", b"caf\xe9\na", "cannot be read as UTF-8"),
        ("captions/animal/01.txt", b"cat\na cat", r"its picture images/animal/01\.jpg is missing"),
        ("images/animal/00.png", b"", r"00\.jpg has the same stem"),
    ],
)
def test_what_does_not_belong_together_is_named(
    bench: Path, path: str, content: bytes | None, message: str
) -> None:
    if content is None:
        (bench / "data" / path).unlink()
    else:
        (bench / "data" / path).write_bytes(content)
    with pytest.raises(UserError, match=message) as raised:
        DreamBenchPlus(bench)
    assert str(raised.value).startswith(str(bench / "data"))


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected the folders images and captions; found nothing"):
        DreamBenchPlus(tmp_path)
    for name in ("images", "captions"):
        (tmp_path / name).mkdir()
    with pytest.raises(UserError, match="images: no picture in it"):
        DreamBenchPlus(tmp_path)


# ---- its questions


def test_a_question_has_no_truth_and_an_example_from_other_data(
    bench: Path, dogs: Path, tmp_path: Path
) -> None:
    data = ["--data", f"dreambench-plus={bench}", "--data", f"dreambooth={dogs}"]
    grids = asked(tmp_path / "grids", *data, "--count", 3)
    assert [grid["content_prompt"] for grid in grids] == [
        "a fox in snow",
        "a fox at sea",
        "an ink fort",
    ]
    assert sorted(path.name for path in (tmp_path / "grids").glob("001*")) == [
        "001-11.png",
        "001-12.png",
        "001-21.png",
    ]
    for request in read_requests(tmp_path / "grids" / "grid.json", TASKS):
        assert request.task == "subject-driven"
        example, (shown, target) = request.rows
        for image in (*example, shown):
            assert image is not None
            red, _, blue = image.getpixel((5, 5))
            assert (red > 200) == (image is not shown)
            assert (blue > 200) == (image is shown)
        assert target is None


def test_the_order_of_the_data_does_not_matter_and_the_same_is_asked_again(
    bench: Path, dogs: Path, tmp_path: Path
) -> None:
    data = ["--data", f"dreambooth={dogs}", "--data", f"dreambench-plus={bench}"]
    first = asked(tmp_path / "1", *data)
    assert first == asked(tmp_path / "2", *data[2:], *data[:2])
    assert first == asked(tmp_path / "3", *data)


def test_few_questions_are_spread_and_there_are_no_more_than_items(bench: Path) -> None:
    source = DreamBenchPlus(bench)
    asking = query_sources({"subject-driven": TASKS["subject-driven"]}, [source], rows=1)
    keys = {
        count: [
            example.keys[-1]
            for example in asking["subject-driven"].grids(
                count=count, rows=1, seed=0, resolution=16
            )
        ]
        for count in (1, 2, 3, 9)
    }
    every = [source.item(k).key for k in range(3)]
    assert keys == {1: every[:1], 2: every[:2], 3: every, 9: every}


def test_without_data_that_has_all_roles_a_question_has_one_row(
    bench: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    words = ["--data", f"dreambench-plus={bench}"]
    [grid] = asked(tmp_path / "grids", *words, "--rows", 1)
    assert grid["rows"] == [["001-11.png", None]]
    line = refused("tasks", "example", "subject-driven", *words, "--output", tmp_path / "none")
    assert "no data source has all its roles (dreambench-plus lacks target)" in line
    assert "--rows 1" in line
    assert not (tmp_path / "none" / "grid.json").exists()


def test_other_tasks_keep_their_truth(bench: Path, dogs: Path, tmp_path: Path) -> None:
    words = ["--data", f"dreambench-plus={bench}", "--data", f"dreambooth={dogs}"]
    output = tmp_path / "grids"
    main(["tasks", "example", "subject-*,deblurring", *words, "--output", str(output)])
    grids = json.loads((output / "grid.json").read_text())
    truth = {path.name[:3] for path in output.glob("*-truth.png")}
    assert {grid["task"]: f"{k:03}" in truth for k, grid in enumerate(grids, 1)} == {
        "subject-driven": False,
        "subject-extraction": True,
        "deblurring": True,
    }


# ---- its place in a run


def test_a_run_says_which_data_it_does_not_train_on(
    bench: Path, dogs: Path, tmp_path: Path
) -> None:
    sources = [f"dreambench-plus={bench}", f"dreambooth={dogs}"]
    data = {"sources": sources, "tasks": "subject-driven"}
    settings = {"data": data, "output": str(tmp_path / "run"), "gradient_checkpointing": "none"}
    run = parse_run(settings, where="test")
    mixture = mixture_of(run)
    assert {mixture[k].keys[-1].split()[0] for k in range(20)} == {"dog"}
    said = "\n".join(summary_of(run, mixture, processes=1))
    assert "dreambench-plus has nothing that these tasks are trained on" in said
    assert "dreambooth has nothing" not in said


def test_nothing_can_be_trained_on_it_alone(bench: Path, refused: Callable[..., str]) -> None:
    words = ["train", "--data", f"dreambench-plus={bench}"]
    assert "dreambench-plus has the roles reference" in refused(*words)
    line = refused(*words, "--tasks", "subject-driven")
    assert "(dreambench-plus lacks target)" in line


def test_a_check_says_what_it_can_ask(bench: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["data", "check", f"dreambench-plus={bench}", "--workers", "0"])
    said = capsys.readouterr().out
    assert "3 items" in said
    assert "none; it can ask, without truth: subject-driven" in said


@real_data
def test_the_real_one_is_asked(tmp_path: Path) -> None:
    bench, dogs = REAL / "dreambench_plus", REAL / "dreambooth"
    assert len(open_source(f"dreambench-plus={bench}", size=64, seed=0)) == 6
    words = ["--data", f"dreambench-plus={bench}", "--data", f"dreambooth={dogs}", "--count", 9]
    grids = asked(tmp_path / "grids", *words)
    assert len(grids) == 6
    assert grids[0]["content_prompt"].startswith("A photograph of a heron")
    assert len(read_requests(tmp_path / "grids" / "grid.json", TASKS)) == 6
