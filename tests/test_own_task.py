"""A task of the user's own: written, trained without losing its balance, and carried along."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from visualcloze_deft.cli import main
from visualcloze_deft.config.run_settings import Run, load_run, parse_run
from visualcloze_deft.errors import UserError
from visualcloze_deft.storage.adapter_places import CONFIG, adapter_folder, task_folders_of
from visualcloze_deft.task_registry.files import is_same, load_tasks, read_tasks
from visualcloze_deft.task_registry.new_task import PLACEHOLDER, write_new_task
from visualcloze_deft.training.run_data import mixture_of
from visualcloze_deft.training.summary import draws_of, remarks_on_tasks, summary_of

Refused = Callable[..., str]


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Five pairs lit -> unlit, which no shipped task names."""
    return folder_of(tmp_path / "pairs", "lit unlit", 5)


def folder_of(folder: Path, roles: str, count: int) -> Path:
    rng = np.random.default_rng(0)
    for role in roles.split():
        (folder / role).mkdir(parents=True)
        for k in range(count):
            pixels = rng.integers(0, 255, (48, 48, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / role / f"{k}.png")
    return folder


def run_of(*sources: str, tasks: str = "all", **data: object) -> Run:
    fields = {"sources": sources, "tasks": tasks, **data}
    return parse_run({"data": fields, "gradient_checkpointing": "none"}, where="test")


# ---- writing it


@pytest.mark.parametrize(
    ("columns", "targets"),
    [("before,after", ""), ("a,b,c", "b,c"), ("one_two,style_image,target", "")],
)
def test_a_new_task_file_is_a_sound_task_with_these_columns(
    tmp_path: Path, columns: str, targets: str
) -> None:
    folder = tmp_path / "own"
    words = ["--columns", columns, "--task-folder", str(folder)]
    main(["tasks", "new", "mine", *words, *(["--targets", targets] if targets else [])])
    [task] = read_tasks(folder / "mine.toml")
    assert ",".join(task.roles) == columns
    assert ",".join(task.targets) == (targets or columns.rpartition(",")[2])
    assert "[IMAGE1]" in task.sentence()
    assert load_tasks([folder])["mine"] == task


def test_a_new_task_replaces_nothing(tmp_path: Path, refused: Refused) -> None:
    words = ["--columns", "a,b", "--task-folder", tmp_path]
    assert "task 'deraining' exists already" in refused("tasks", "new", "deraining", *words)
    main(["tasks", "new", "mine", *map(str, words)])
    before = (tmp_path / "mine.toml").read_bytes()
    assert "mine.toml: exists already" in refused("tasks", "new", "mine", *words)
    assert (tmp_path / "mine.toml").read_bytes() == before
    for columns, why in {"a": "give one column", "a,a": "named twice", "a,b c": "'b c'"}.items():
        line = refused("tasks", "new", "x", "--columns", columns, "--task-folder", tmp_path / "n")
        assert why in line
    assert not (tmp_path / "n").exists()


# ---- drawing it


def test_every_group_is_drawn_as_often_as_another_unless_it_is_weighed() -> None:
    def shares(**data: object) -> dict[str, float]:
        return {d.group: round(d.share, 6) for d in draws_of(mixture_of(run_of("scenes", **data)))}

    plain = shares()
    assert len(plain) > 5
    assert len({*plain.values()}) == 1
    weighed = shares(weights={"restoration": 3})
    assert weighed.pop("restoration") == pytest.approx(3 * next(iter(weighed.values())), abs=1e-5)
    single = mixture_of(run_of("scenes", tasks="deraining,deblurring=2,image-editing"))
    assert single.proportions.tolist() == pytest.approx([0.25, 0.5, 0.25])


def test_a_group_leaves_out_the_tasks_whose_roles_the_data_lacks(pairs: Path) -> None:
    folder = folder_of(pairs.parent / "more", "before target", 4)
    run = run_of(f"folder={folder}", tasks="image-editing,restoration,insdet")
    mixture = mixture_of(run)
    groups = {task.group for task in mixture.tasks.values()}
    assert groups == {"image-editing", "restoration"}
    said = "\n".join(summary_of(run, mixture, processes=2))
    assert "left out, for no data has their roles" in said
    with pytest.raises(UserError, match="task depth-to-image: no data source has all its roles"):
        mixture_of(run_of(f"folder={folder}", tasks="restoration,depth-to-image"))


def test_pairs_that_no_task_names_are_met_with_the_task_to_write(
    pairs: Path, refused: Refused, tmp_path: Path
) -> None:
    way = "vcdeft tasks new NAME --columns lit,unlit"
    data = ["--data", f"folder={pairs}"]
    assert way in refused("train", *data, "--output", tmp_path / "run")
    with_scenes = run_of(f"folder={pairs}", "scenes=9")
    said = "\n".join(summary_of(with_scenes, mixture_of(with_scenes), processes=1))
    assert way in said
    half = folder_of(tmp_path / "half", "lit target", 4)
    restored = run_of(f"folder={half}")
    said = "\n".join(summary_of(restored, mixture_of(restored), processes=1))
    assert "vcdeft tasks new NAME --columns lit,target" in said
    assert way in refused("tasks", "example", "all", *data, "--output", tmp_path / "g")


@pytest.mark.parametrize(("count", "every"), [(1, 0), (4, 4), (30, 10)])
def test_a_run_says_how_pairs_of_ones_own_are_held_out(
    tmp_path: Path, count: int, every: int
) -> None:
    folder = folder_of(tmp_path / "more", "before target", count)

    def said(*sources: str, **data: object) -> list[str]:
        run = run_of(*sources, tasks="image-editing", **data)
        lines = summary_of(run, mixture_of(run), processes=1)
        return [line.strip() for line in lines if "held out" in line]

    way = f"nothing is held out: --validation-every {every} keeps one item in {every} for samples"
    assert said(f"folder={folder}") == ([f"{way} and vcdeft eval"] if every else [])
    assert said("scenes=9") == []
    if every:
        mixture_of(run_of(f"folder={folder}", validation_every=every), held_out=True)
        assert said(f"folder={folder}", validation_every=every) == []


def test_no_query_is_asked_twice(pairs: Path, tmp_path: Path) -> None:
    folder = write_new_task("relight", ["lit", "unlit"], tmp_path / "own").parent
    words = ["--data", f"folder={pairs}", "--task-folder", str(folder), "--count", "9"]
    main(["tasks", "example", "relight", *words, "--output", str(tmp_path / "grids")])
    grids = json.loads((tmp_path / "grids" / "grid.json").read_text())
    asked = Counter((tmp_path / "grids" / grid["rows"][-1][0]).read_bytes() for grid in grids)
    assert sorted(asked.values()) == [1] * 5


@pytest.mark.parametrize("roles", ["before depth_edit target depth", "target"])
def test_the_advice_for_a_group_that_has_most_draws_it_less(tmp_path: Path, roles: str) -> None:
    place = folder_of(tmp_path / "mine", roles, 3)
    heavy = "image-editing/*" if "before" in roles else "restoration"
    run = run_of(f"folder={place}", weights={heavy: 9.0}, resolution=32)
    mixture = mixture_of(run)
    [line] = [line for line in remarks_on_tasks(run, mixture) if "has most of it" in line]
    words = shlex.split(line.partition(": ")[2])
    setting, without = words[1], words[words.index("--tasks") + 1]
    before, changed = draws_of(mixture)[0], load_run(None, [setting])
    lighter = mixture_of(run_of(f"folder={place}", weights=changed.data.weights, resolution=32))
    assert next(d for d in draws_of(lighter) if d.group == before.group).share < 0.2
    left = mixture_of(run_of(f"folder={place}", tasks=without, resolution=32))
    assert before.group not in {draws.group for draws in draws_of(left)}


# ---- carrying it


def carried(folder: Path, name: str = "relight", *, columns: str = "lit,unlit") -> Path:
    """An adapter folder, as far as its tasks are concerned."""
    folder.mkdir(parents=True)
    (folder / CONFIG).write_text("{}")
    write_new_task(name, columns.split(","), folder / "tasks")
    return folder


def test_an_adapters_tasks_are_known_and_a_users_own_come_first(tmp_path: Path) -> None:
    adapter = carried(tmp_path / "adapter")
    [folder] = task_folders_of([adapter])
    assert load_tasks([folder])["relight"].roles == ("lit", "unlit")
    own = write_new_task("relight", ["dark", "bright"], tmp_path / "own").parent
    assert load_tasks([own, folder])["relight"].roles == ("dark", "bright")


def test_an_adapters_task_replaces_the_shipped_one_of_its_name(tmp_path: Path) -> None:
    adapter = carried(tmp_path / "adapter", "of-its-time")
    (adapter / "tasks" / "of-its-time.toml").rename(adapter / "tasks" / "deraining.toml")
    assert load_tasks(task_folders_of([adapter]))["deraining"].roles == ("lit", "unlit")


def test_adapters_of_different_tasks_of_one_name_are_refused(tmp_path: Path) -> None:
    same = [carried(tmp_path / name) for name in "ab"]
    assert "relight" in load_tasks(task_folders_of(same))
    other = carried(tmp_path / "c", columns="lit,dark,unlit")
    with pytest.raises(UserError, match="another adapter was trained on another task 'relight'"):
        load_tasks(task_folders_of([*same, other]))


def test_tasks_whose_columns_stand_in_another_order_are_not_the_same(tmp_path: Path) -> None:
    folder = carried(tmp_path / "a", columns="lit,dark,unlit")
    [task] = read_tasks(folder / "tasks" / "relight.toml")
    swapped = replace(task, columns={role: task.columns[role] for role in ("dark", "lit", "unlit")})
    assert is_same(task, replace(task))
    assert not is_same(task, swapped)


def test_a_run_folder_stands_for_its_adapter_and_before_for_its_newest_checkpoint(
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    assert adapter_folder(run) == run
    for step in ("step-000200", "step-1000000"):
        carried(run / "checkpoints" / step)
    write_new_task("mine", ["a", "b"], run / "tasks")
    newest = adapter_folder(run)
    assert newest.name == "step-1000000"
    (newest / "tasks" / "relight.toml").unlink()
    (newest / "tasks").rmdir()
    assert "mine" in load_tasks(task_folders_of([newest]))
    assert adapter_folder(newest) == newest
    carried(run / "adapter")
    assert adapter_folder(run) == run / "adapter"


def test_a_template_that_nobody_edited_is_remarked_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    main(["tasks", "new", "relight", "--columns", "before,after"])
    path = Path("my_tasks/relight.toml")
    main(["tasks", "check", str(path)])
    assert "the summary is still the template's: relight\n" in capsys.readouterr().out
    path.write_text(path.read_text().replace(PLACEHOLDER, "Light from the left."))
    capsys.readouterr()
    main(["tasks", "check", str(path)])
    assert capsys.readouterr().out.startswith("nothing wrong\n  relight: From the")
