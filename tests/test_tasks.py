"""Task files: every shipped one works, every broken one is named with its fault."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import tomli_w
from PIL import Image

from visualcloze_deft.cli import main
from visualcloze_deft.config.run_settings import Recipe
from visualcloze_deft.data.degrade import DEGRADATIONS
from visualcloze_deft.data.derive import missing
from visualcloze_deft.data.mixture import Mixture
from visualcloze_deft.data.sources import graph200k
from visualcloze_deft.data.sources.graph200k import Graph200K
from visualcloze_deft.data.sources.scenes import Scenes
from visualcloze_deft.errors import UserError
from visualcloze_deft.paths import TASKS
from visualcloze_deft.task_registry.files import ROLES_FILE, load_tasks, read_tasks
from visualcloze_deft.task_registry.select import select

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


def test_every_shipped_file_declares_tasks() -> None:
    files = {path for path in TASKS.glob("*.toml") if path.name != ROLES_FILE}
    assert {task.path for task in SHIPPED.values()} == files


CONDITIONS = set(
    "canny depth hed normal mlsd openpose segmentation uniformer object_masks "
    "foreground background".split()
)


def graph200k_combinations() -> dict[str, set[tuple[frozenset[str], str]]]:
    """Shown and generated roles of Graph200K's 129 column combinations, group by group."""
    styles = ("style_reference", "style_image"), ("redux_reference", "redux_image")
    plain = CONDITIONS - {"foreground", "background"}

    def to(target: str, *shown: str) -> tuple[frozenset[str], str]:
        return frozenset(shown), target

    return {
        "conditional-generation": {to("target", c) for c in CONDITIONS},
        "conditional-generation-with-reference": {
            to("target", c, "reference") for c in CONDITIONS - {"foreground"}
        },
        "conditional-generation-with-style": {to(s, c, r) for c in plain for r, s in styles},
        "subject-driven": {to("target", "reference")},
        "subject-extraction": {to("reference", "target")},
        "style-transfer": {
            to("style_image", "target", "style_reference"),
            to("redux_image", "target", "redux_reference"),
            to("style_image", "reference", "style_reference"),
        },
        "style-transfer-with-condition": {
            to("style_image", "reference", c, "style_reference") for c in plain
        },
        "image-editing": {to("target", "before"), to("target", "depth_edit")},
        "image-editing-with-reference": {
            to("target", "before", "reference"),
            to("target", "depth_edit", "reference"),
        },
        "dense-prediction": {to(c, "target") for c in plain - {"object_masks"}},
        "restoration": {to("target", d) for d in DEGRADATIONS},
        "restoration-with-reference": {to("target", d, "reference") for d in DEGRADATIONS},
    }


def test_graph200ks_129_combinations_are_shipped_each_once() -> None:
    expected = graph200k_combinations()
    found: dict[str, list[tuple[frozenset[str], str]]] = {group: [] for group in expected}
    for task in SHIPPED.values():
        if task.group in expected:
            found[task.group].append((frozenset(task.conditions), *task.targets))
    assert {group: set(pairs) for group, pairs in found.items()} == expected
    assert sum(map(len, found.values())) == 129
    assert len(DEGRADATIONS) == 32


@pytest.fixture(scope="module")
def whole_graph(tmp_path_factory: pytest.TempPathFactory) -> tuple[Graph200K, dict[str, int]]:
    """Three items of Graph200K with every condition there is, each a picture of one grey value of
    its own: role -> that value."""
    folder = tmp_path_factory.mktemp("graph200k")
    values: dict[str, int] = {}

    def paint(name: str, role: str) -> str:
        values.setdefault(role, 10 + 12 * len(values))
        (folder / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (48, 32), (values[role],) * 3).save(folder / name)
        return name

    rows = []
    for k in range(3):
        condition: dict[str, object] = {
            name: paint(f"{name}/{k}.png", role)
            for name, role in graph200k.ROLES.items()
            if name != "ref"
        }
        for name, lists in graph200k.LISTS.items():
            condition[name] = {key: [paint(f"{name}/{k}_{key}.png", r)] for key, r in lists.items()}
        quality = {"objectConsistency": 4}
        rows.append({"quality_assessment": quality, "description": None, "condition": condition})
    (folder / "data.json").write_text(json.dumps(rows), encoding="utf-8")
    return Graph200K(folder), values


@pytest.mark.parametrize(
    "name", [n for n, t in SHIPPED.items() if t.group in graph200k_combinations()]
)
def test_every_combination_is_drawn_from_graph200k_with_its_columns_in_place(
    whole_graph: tuple[Graph200K, dict[str, int]], name: str
) -> None:
    source, values = whole_graph
    task = SHIPPED[name]
    recipe = Recipe(examples=(0, 0, 1), shuffle_columns=False)
    example = Mixture({name: task}, [source], seed=0, resolution=32, recipe=recipe)[0]
    assert len(example.rows) == 3
    assert len(set(example.keys)) == 3
    for row in example.rows:
        assert len(row) == len(task.roles)
        for role, image in zip(task.roles, row, strict=True):
            assert image.mode == "RGB"
            if role in values:
                assert image.getpixel((5, 5)) == (values[role],) * 3
            elif role not in ("foreground", "background", "canny"):
                assert image.size == (32, 16)  # a cell: it was derived


def test_phrases_are_varied_in_training_and_the_usual_ones_where_asked() -> None:
    task = SHIPPED["depth-to-image"]
    said = {}
    for share in (0.0, 1.0):
        recipe = Recipe(paraphrase=share, keep_task=1, caption_dropout=0)
        mixture = Mixture(
            {task.name: task}, [Scenes(size=32)], seed=0, resolution=32, recipe=recipe
        )
        said[share] = {mixture[i].task_sentence for i in range(30)}
    assert said[0.0] == {"From the depth map [IMAGE1] to the photo [IMAGE2]."}
    assert len(said[1.0]) > 5


SCENES = [name for name, task in SHIPPED.items() if not missing(task.roles, Scenes.roles)]


@pytest.mark.parametrize("name", SCENES)
def test_what_scenes_can_serve_can_be_drawn_from_them(name: str) -> None:
    example = Mixture({name: SHIPPED[name]}, [Scenes(size=32)], seed=0, resolution=32)[0]
    assert {len(row) for row in example.rows} == {len(SHIPPED[name].columns)}
    assert {image.size for row in example.rows for image in row} == {(32, 32)}
    assert {image.mode for row in example.rows for image in row} == {"RGB"}


def test_every_shipped_sentence_names_every_column_once() -> None:
    for task in SHIPPED.values():
        for sentence in task.instructions:
            named = re.findall(r"{(.*?)}", sentence)
            assert sorted(named) == sorted(task.roles), task.name


def test_a_sentence_numbers_the_columns_in_the_order_given(tmp_path: Path) -> None:
    (task,) = read_tasks(task_file(tmp_path))
    assert task.sentence() == (
        "From the pencil sketch [IMAGE1] and the painting [IMAGE2] to the painted photo [IMAGE3]."
    )
    assert task.sentence(("style", "sketch", "target")) == (
        "From the pencil sketch [IMAGE2] and the painting [IMAGE1] to the painted photo [IMAGE3]."
    )


def test_the_last_column_is_the_target_unless_targets_are_named(tmp_path: Path) -> None:
    assert read_tasks(task_file(tmp_path))[0].targets == ("target",)
    named = f'targets = ["style", "target"]\n{GOOD}'
    assert read_tasks(task_file(tmp_path, named))[0].targets == ("style", "target")


@pytest.mark.parametrize("role", ["DepthEdit", "InstantStyle_image_0", "_x", "a-b", "größe"])
def test_a_role_is_named_as_the_data_names_it(tmp_path: Path, role: str) -> None:
    text = GOOD.replace("{style}", f"{{{role}}}").replace("style =", f'"{role}" =')
    (task,) = read_tasks(task_file(tmp_path, text))
    assert role in task.roles
    assert f"painting [IMAGE{task.roles.index(role) + 1}]" in task.sentence()


BROKEN = {
    "no TOML": ("summary = ", "", "not valid TOML"),
    "missing key": ('group = "own"', "", "the key 'group' is missing"),
    "mistyped key": ("instruction =", "instrucktion =", "did you mean instruction"),
    "text as number": ('content = "caption"', "content = 3", "content must be a text, not 3"),
    "no columns": (GOOD[GOOD.index("[columns]") :], "", "the key 'columns' is missing"),
    "columns as text": (GOOD[GOOD.index("[columns]") :], 'columns = "a"', "columns must be a"),
    "role without phrase": (
        GOOD[GOOD.index("[columns]") :],
        'columns = ["sketch", "target"]',
        "roles.toml has no phrase for 'sketch'",
    ),
    "one column, no content": (
        GOOD[GOOD.index("instruction") :],
        'instruction = "A {target}."\ncontent = ""\ncolumns = { target = "photo" }',
        "every column is a target",
    ),
    "phrase as number": (
        '"painting"',
        "5",
        "columns.style must be text, or a list of texts, not 5",
    ),
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
    with pytest.raises(UserError, match=r"painting\.toml: cannot be read as UTF-8"):
        load_tasks([tmp_path])


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"task folder {tmp_path / 'gone'}: no such folder"):
        load_tasks([tmp_path / "gone"])


def test_a_folder_adds_tasks_and_replaces_none(tmp_path: Path) -> None:
    task_file(tmp_path)
    known = load_tasks([tmp_path])
    assert set(known) == {*SHIPPED, "painting"}
    assert known["canny-to-image"] == SHIPPED["canny-to-image"]
    path = task_file(tmp_path, name="depth-to-image")
    with pytest.raises(UserError, match=r"a task 'depth-to-image' is declared in .* already") as e:
        load_tasks([tmp_path])
    assert str(e.value).startswith(f"{path}: ")


ROLES = """
[phrases]
sketch = ["sketch", "pencil sketch"]
ink = "ink drawing"
target = "photo"

[sets]
drawing = ["sketch", "ink"]

[sets.paint]
sketch = "pencil"
"""
FAMILY = """
each = "drawing"
name = "{drawing}-to-photo"
summary = "A photo of its {drawing}."
group = "own"
instruction = ["From the {drawing} to the {target}.", "The {target} of the {drawing}."]
content = ""
columns = ["drawing", "target"]
"""


def test_a_family_declares_a_task_for_each_role_of_a_set(tmp_path: Path) -> None:
    (tmp_path / ROLES_FILE).write_text(ROLES, encoding="utf-8")
    task_file(tmp_path, FAMILY, "family")
    known = load_tasks([tmp_path])
    assert set(known) - set(SHIPPED) == {"sketch-to-photo", "ink-to-photo"}
    ink = known["ink-to-photo"]
    assert ink.roles == ("ink", "target")
    assert ink.summary == "A photo of its ink drawing."
    assert ink.sentence() == "From the ink drawing [IMAGE1] to the photo [IMAGE2]."
    assert ink.sentence(words=lambda said: said[-1]) == (
        "The photo [IMAGE2] of the ink drawing [IMAGE1]."
    )
    assert known["canny-to-image"] == SHIPPED["canny-to-image"]  # in its own words


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ('each = "drawing"', 'each = "drawin"', "no set of roles; did you mean drawing"),
        ('each = "drawing"', "each = 3", "each must be a text, not 3"),
        ('["drawing", "target"]', '["ink", "target"]', "with 'drawing' among them"),
        ("{drawing}-to-photo", "to-photo", "name must hold {drawing}"),
        ("{drawing}-to-photo", "{drawing} to photo", "small letters, digits and '-' only"),
        ("{target} of", "{tarjet} of", "'tarjet' is no column; did you mean target"),
        ('group = "own"', 'group = "own"\nwithout = ["inc"]', "without 'inc'; did you mean ink"),
        ('each = "drawing"\n', "", "name goes with 'each'"),
    ],
)
def test_a_broken_family_is_named_with_its_fault(
    tmp_path: Path, old: str, new: str, fault: str
) -> None:
    (tmp_path / ROLES_FILE).write_text(ROLES, encoding="utf-8")
    assert old in FAMILY
    path = task_file(tmp_path, FAMILY.replace(old, new), "family")
    with pytest.raises(UserError) as raised:
        load_tasks([tmp_path])
    assert str(raised.value).startswith(f"{path}: ")
    assert fault in str(raised.value)


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("[phrases]", "[phrase]", "unknown key 'phrase'; did you mean phrases"),
        ('ink = "ink drawing"', "ink = 3", "phrases.ink must be text, or a list of texts, not 3"),
        ('["sketch", "ink"]', "[]", "sets.drawing must be a list of roles"),
        ('"pencil"', '"Pencil!"', "sets.paint.sketch 'Pencil!': small letters"),
    ],
)
def test_a_broken_file_of_roles_is_named_with_its_fault(
    tmp_path: Path, old: str, new: str, fault: str
) -> None:
    path = tmp_path / ROLES_FILE
    assert old in ROLES
    path.write_text(ROLES.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(UserError) as raised:
        load_tasks([tmp_path])
    assert str(raised.value).startswith(f"{path}: ")
    assert fault in str(raised.value)


def test_a_task_is_read_again_from_the_file_that_a_run_keeps_of_it(tmp_path: Path) -> None:
    for task in SHIPPED.values():
        path = tmp_path / f"{task.name}.toml"
        path.write_text(tomli_w.dumps(task.as_file()), encoding="utf-8")
        (again,) = read_tasks(path)
        assert replace(again, path=task.path) == task


def test_tasks_of_one_group_stand_together() -> None:
    groups = [task.group for task in SHIPPED.values()]
    assert groups == sorted(groups)


def test_tasks_are_selected_by_name_by_group_and_all_at_once() -> None:
    assert select(SHIPPED, "all") == dict.fromkeys(SHIPPED, 1.0)
    assert list(select(SHIPPED, "novel-view")) == ["novel-view"]
    assert len(select(SHIPPED, "restoration")) == 32
    assert len(select(SHIPPED, "restoration*")) == 64
    assert set(select(SHIPPED, "all,-restoration/*,-*-with-*")) == {
        name
        for name, task in SHIPPED.items()
        if task.group != "restoration" and "-with-" not in task.group + name
    }
    assert select(SHIPPED, "insdet/object-*,object-mask=2.5,-*-insertion") == {
        "object-box": 1.0,
        "object-extraction": 1.0,
        "object-mask": 2.5,
    }
    assert select(SHIPPED, "subject-driven=0,novel-view")["subject-driven"] == 0
    assert list(select(SHIPPED, "style-transfer")) == ["style-transfer"]  # a name before a group
    assert list(select(SHIPPED, "style-transfer/*,novel-view, style-transfer ")) == [
        "style-transfer",
        "style-variation",
        "subject-in-style",
        "novel-view",
    ]


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("dept-to-image", "unknown task 'dept-to-image'; did you mean depth-to-image"),
        ("novel-view,restauration", "unknown task 'restauration'; did you mean restoration"),
        ("xyz", "unknown task 'xyz'; 'vcdeft tasks list' shows all; --task-folder DIR adds your"),
        ("day-to-night", "unknown task 'day-to-night'; 'vcdeft tasks list'"),
        ("all,-nothing", "unknown task 'nothing'"),
        ("novel-view,-insdet", "no task named in 'novel-view,-insdet'"),
        ("novel-view=x", "give a weight of 0 or more behind '='"),
        ("novel-view=-1", "give a weight of 0 or more"),
        ("novel-view=inf", "give a weight of 0 or more"),
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


def test_what_the_encoders_read_and_lose_of_a_text_is_shown(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = "a red striped cube and a blue spotted ball on a green checkered floor, grey wall, " * 2
    main(["tasks", "show", "depth-to-image", "--model", "tiny", "--content", f"{words} last word"])
    t5, clip, original = capsys.readouterr().out.split("tokens, reads ")[1:]
    assert "of at most 40" in t5
    assert "last word" in t5.split("lost:")[1]
    assert "of at most 77" in clip
    content = f"The last image of the last row depicts: {words.strip()}"
    assert content in clip.split("lost:")[0]
    assert "A grid layout" not in clip.split("CLIP, original")[0]
    assert "last word" in original.split("lost:")[1]


def test_a_task_is_shown_and_checked_and_listed_for_programs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], refused: Callable[..., str]
) -> None:
    main(["tasks", "show", "depth-to-image"])
    shown = capsys.readouterr().out
    assert SHIPPED["depth-to-image"].summary in shown
    assert "scenes, graph200k, folder" in shown
    main(["tasks", "list", "--json"])
    listed = json.loads(capsys.readouterr().out)
    assert [entry["name"] for entry in listed] == list(SHIPPED)
    assert listed[0]["columns"]
    path = task_file(tmp_path)
    main(["tasks", "check", str(path)])
    assert "painting: From the pencil sketch [IMAGE1]" in capsys.readouterr().out
    main(["tasks", "check"])
    assert f"{len(SHIPPED)} tasks, nothing wrong" in capsys.readouterr().out
    task_file(tmp_path, GOOD.replace("{sketch}", "{skech}"))
    assert "did you mean sketch" in refused("tasks", "check", path)
    assert "did you mean depth-to-image" in refused("tasks", "show", "dept-to-image")


def test_a_file_of_roles_that_leads_nowhere_is_not_passed_over(tmp_path: Path) -> None:
    (tmp_path / ROLES_FILE).symlink_to("gone")
    with pytest.raises(UserError, match=rf"{ROLES_FILE}: no such file"):
        load_tasks([tmp_path])
