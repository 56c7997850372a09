"""Task files: every shipped one works, every broken one is named with its fault."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from visualcloze_deft.data.mixture import Mixture
from visualcloze_deft.data.scenes import Scenes
from visualcloze_deft.errors import UserError
from visualcloze_deft.folders import TASKS
from visualcloze_deft.registry import Task, load_tasks, read_task, select

SHIPPED = load_tasks()
GOOD = """
summary = "A photo painted."
group = "own"
instruction = "From the {sketch} and the {style} to the {target}."
content = "caption"

[columns]
sketch = "pencil sketch"
style = "painting"
target = "painted photo"
"""
HEAVY = ("torch", "diffusers", "transformers", "peft", "deepspeed", "cv2", "datasets")


def task_file(folder: Path, text: str = GOOD, name: str = "painting") -> Path:
    path = folder / f"{name}.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_every_shipped_file_is_a_task() -> None:
    assert {task.path for task in SHIPPED.values()} == set(TASKS.glob("*.toml"))
    assert all(name == task.name == task.path.stem for name, task in SHIPPED.items())


@pytest.mark.parametrize("task", SHIPPED.values(), ids=SHIPPED)
def test_a_shipped_task_can_be_drawn_from_scenes(task: Task) -> None:
    example = Mixture({task.name: task}, [Scenes(size=32)], seed=0)[0]
    assert {len(row) for row in example.rows} == {len(task.columns)}
    assert {image.size for row in example.rows for image in row} == {(32, 32)}
    assert {image.mode for row in example.rows for image in row} == {"RGB"}


@pytest.mark.parametrize("task", SHIPPED.values(), ids=SHIPPED)
def test_a_shipped_sentence_names_every_column_once(task: Task) -> None:
    assert re.findall(r"\[IMAGE(\d)\]", task.sentence()) == [
        str(k) for k in range(1, len(task.columns) + 1)
    ]


def test_a_sentence_numbers_the_columns_in_the_order_given(tmp_path: Path) -> None:
    task = read_task(task_file(tmp_path))
    assert task.sentence() == (
        "From the pencil sketch [IMAGE1] and the painting [IMAGE2] to the painted photo [IMAGE3]."
    )
    assert task.sentence(("style", "sketch", "target")) == (
        "From the pencil sketch [IMAGE2] and the painting [IMAGE1] to the painted photo [IMAGE3]."
    )


def test_the_last_column_is_the_target_unless_targets_are_named(tmp_path: Path) -> None:
    assert read_task(task_file(tmp_path)).targets == ("target",)
    named = f'targets = ["style", "target"]\n{GOOD}'
    assert read_task(task_file(tmp_path, named)).targets == ("style", "target")


@pytest.mark.parametrize("role", ["DepthEdit", "InstantStyle_image_0", "_x", "a-b", "größe"])
def test_a_role_is_named_as_the_data_names_it(tmp_path: Path, role: str) -> None:
    text = GOOD.replace("{style}", f"{{{role}}}").replace("style =", f'"{role}" =')
    task = read_task(task_file(tmp_path, text))
    assert role in task.roles
    assert f"painting [IMAGE{task.roles.index(role) + 1}]" in task.sentence()


BROKEN = {
    "no TOML": ("summary = ", "", "not valid TOML"),
    "missing key": ('group = "own"', "", "the key 'group' is missing"),
    "mistyped key": ("instruction =", "instrucktion =", "did you mean instruction"),
    "text as number": ('content = "caption"', "content = 3", "content must be a text, not 3"),
    "no columns": (GOOD[GOOD.index("[columns]") :], "", "the key 'columns' is missing"),
    "columns as list": (GOOD[GOOD.index("[columns]") :], 'columns = ["a"]', "columns must be a"),
    "one column": ('sketch = "pencil sketch"\nstyle = "painting"\n', "", "at least two roles"),
    "phrase as number": ('"painting"', "5", "columns.style must be text, not 5"),
    "unknown column": ("{sketch}", "{skech}", "'skech' is no column; did you mean sketch"),
    "numbered column": ("{sketch}", "{0}", "'0' is no column"),
    "empty column": ("{sketch}", "{}", "'' is no column"),
    "open brace": ("{target}", "{target", "instruction"),
    "closed brace": ("{sketch}", "sketch}", "instruction"),
    "unknown target": ("summary", 'targets = ["traget"]\nsummary', "did you mean target"),
    "target as text": ("summary", 'targets = "target"\nsummary', "targets must be a list"),
    "no target": ("summary", "targets = []\nsummary", "targets must be a list"),
    "target as number": ("summary", "targets = [1]\nsummary", "1 is no column"),
    "target as list": ("summary", 'targets = [["target"]]\nsummary', "target"),
    "target twice": ("summary", 'targets = ["target", "target"]\nsummary', "target"),
    "target before a condition": (
        "summary",
        'targets = ["sketch"]\nsummary',
        "must be the last columns",
    ),
    "role with a dot": ('style = "painting"', '"a.b" = "painting"', "role 'a.b'"),
    "all targets": (
        "summary",
        'targets = ["sketch", "style", "target"]\nsummary',
        "every column is a target",
    ),
}


@pytest.mark.parametrize(("old", "new", "fault"), BROKEN.values(), ids=BROKEN)
def test_a_broken_task_file_is_named_with_its_fault(
    tmp_path: Path, old: str, new: str, fault: str
) -> None:
    assert GOOD.count(old) >= 1
    path = task_file(tmp_path, GOOD.replace(old, new, 1))
    with pytest.raises(UserError) as raised:
        load_tasks([tmp_path])
    assert str(raised.value).startswith(f"{path}: ")
    assert fault in str(raised.value)


@pytest.mark.parametrize("name", ["Painting", "my painting", "-painting", "peinture_à_huile"])
def test_a_name_that_cannot_be_typed_is_refused(tmp_path: Path, name: str) -> None:
    path = task_file(tmp_path, name=name)
    with pytest.raises(UserError, match="a task name has") as raised:
        load_tasks([tmp_path])
    assert str(path) in str(raised.value)


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "painting.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"painting\.toml: cannot be read"):
        load_tasks([tmp_path])


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"task folder {tmp_path / 'gone'}: no such folder"):
        load_tasks([tmp_path / "gone"])


def test_a_folder_adds_and_replaces_tasks(tmp_path: Path) -> None:
    task_file(tmp_path)
    replaced = task_file(tmp_path, name="depth-to-image")
    known = load_tasks([tmp_path])
    assert set(known) == {*SHIPPED, "painting"}
    assert known["depth-to-image"].path == replaced
    assert known["canny-to-image"] == SHIPPED["canny-to-image"]


def test_tasks_of_one_group_stand_together() -> None:
    groups = [task.group for task in SHIPPED.values()]
    assert groups == sorted(groups)


def test_tasks_are_selected_by_name_by_group_and_all_at_once() -> None:
    assert select(SHIPPED, "all") == SHIPPED
    assert list(select(SHIPPED, "novel-view")) == ["novel-view"]
    assert list(select(SHIPPED, "insdet")) == ["novel-view", "object-insertion"]
    assert list(select(SHIPPED, " subject-driven, insdet,novel-view ")) == [
        "subject-driven",
        "novel-view",
        "object-insertion",
    ]


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("dept-to-image", "unknown task 'dept-to-image'; did you mean depth-to-image"),
        ("novel-view,restauration", "unknown task 'restauration'; did you mean restoration"),
        ("xyz", "unknown task 'xyz'; known: all, canny-to-image"),
        ("", "no task named in ''"),
        (" , ", "no task named in"),
    ],
)
def test_an_unknown_task_is_met_with_the_nearest(wanted: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        select(SHIPPED, wanted)


def test_all_beside_other_names_is_still_all() -> None:
    assert select(SHIPPED, "novel-view,all").keys() == SHIPPED.keys()


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["tasks", "list"], ["train", "--help"], ["infer", "--help"], ["tasks", "--help"]],
    ids=" ".join,
)
def test_help_and_listings_load_nothing_heavy(arguments: list[str]) -> None:
    script = f"""
import sys
from visualcloze_deft.cli import main
main({arguments})
sys.exit(", ".join(name for name in {HEAVY} if name in sys.modules))
"""
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert ended.stderr.strip() == ""
    assert ended.stdout


def test_the_listing_shows_every_task_with_what_is_generated() -> None:
    listing = subprocess.run(
        [sys.executable, "-m", "visualcloze_deft", "tasks", "list"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for task in SHIPPED.values():
        assert re.search(rf"^  {task.name} .*-> {task.roles[-1]}$", listing, re.MULTILINE)
        assert task.summary in listing
