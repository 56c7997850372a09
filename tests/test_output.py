"""Folders that results go into: what is not ours stays as it is, and one writer has one folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from PIL import Image
from processes import Group, forked, run

from visualcloze_deft.config.run_settings import load_run
from visualcloze_deft.errors import UserError
from visualcloze_deft.storage.locks import LOCK, WorkLocks, only_writer
from visualcloze_deft.training import preparation, run_folder

Refused = Callable[..., str]
LINE = "vcdeft: output"


def words(model: Path, output: Path, *more: object) -> list[object]:
    base = ["train", "--model", model, "--tasks", "depth-to-image", "--rank", 2, "--batch", 1]
    return [*base, "--steps", 2, "--set", "sample_grids=2", "--output", output, *more]


def content(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder of somebody's own, with names that a run has, too."""
    folder = tmp_path / "project"
    (folder / ".git").mkdir(parents=True)
    (folder / "tasks").mkdir()
    (folder / ".git" / "HEAD").write_text("ref: refs/heads/main\n")
    (folder / "tasks" / "mine.toml").write_text('summary = "mine"\n')
    (folder / "settings.toml").write_text("steps = 3\n")
    (folder / "versions.json").write_text('{"python": "3.11"}')
    (folder / "report.html").write_text("<p>mine</p>")
    (folder / "grid.json").write_text(json.dumps({"rows": [["a.png", None]]}))
    return folder


@pytest.fixture
def commands(
    micro_model: Path, grid_file: Callable[..., Path], tmp_path: Path
) -> list[list[object]]:
    """Every command that fills a folder, up to its --output."""
    grid = grid_file()
    comparison = tmp_path / "comparison.toml"
    new, old = '{tasks = "depth-to-image"}', '{tasks = "deblurring"}'
    comparison.write_text(
        f'output = "nowhere"\nbase = "compare-scenes"\nnew = {new}\nold = {old}\n'
    )
    images = tmp_path / "images"
    images.mkdir()
    Image.new("RGB", (32, 32)).save(images / "1.png")
    measure = ["--images", images, "--against", images, "--encoder", "none"]
    train = words(micro_model, tmp_path)[:-2]
    return [
        train,
        [*train, "--dry-run"],
        ["infer", "--examples", grid, "--model", micro_model, "--inference-steps", 1],
        ["eval", *measure],
        ["compare", comparison],
        ["data", "cache", *train[1:], "--processes", 1],
        ["tasks", "example", "depth-to-image"],
    ]


def test_no_command_writes_into_a_folder_of_somebody_else(
    commands: list[list[object]], project: Path, refused: Refused
) -> None:
    before = content(project)
    beside = sorted(path.name for path in project.parent.iterdir())
    for command in commands:
        said = refused(*command, "--output", project)
        assert str(project) in said, command
        assert len(said) <= 400
        assert content(project) == before, command
    assert sorted(path.name for path in project.parent.iterdir()) == beside


def test_a_clone_is_no_output(
    commands: list[list[object]],
    project: Path,
    refused: Refused,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(project)
    before = content(project)
    for command in commands:
        refused(*command, "--output", ".")
        assert content(project) == before, command


@pytest.mark.parametrize("name", ["tasks", "settings.toml", "versions.json", "report.html"])
def test_each_name_of_a_run_alone_makes_no_run(
    project: Path, micro_model: Path, refused: Refused, tmp_path: Path, name: str
) -> None:
    alone = tmp_path / "alone"
    alone.mkdir()
    (project / name).rename(alone / name)
    before = content(alone)
    said = refused(*words(micro_model, alone))
    assert f"output {alone}: holds '{name}' and no run of vcdeft" in said
    assert content(alone) == before


def test_a_name_in_the_run_folder_of_a_comparison_is_no_training(
    commands: list[list[object]], tmp_path: Path, refused: Refused
) -> None:
    output = tmp_path / "out"
    (output / "runs" / "mine" / "tasks").mkdir(parents=True)
    compare = next(command for command in commands if command[0] == "compare")
    assert "holds 'tasks' and no run" in refused(*compare, "--output", output)
    assert os.listdir(output) == ["runs"]


def test_a_run_that_was_ended_early_is_still_a_run(micro_model: Path, tmp_path: Path) -> None:
    asked = load_run(None, [f"model={micro_model}", f"output={tmp_path / 'run'}"])
    output = Path(asked.output)
    with run_folder.run_lock(output):
        pass  # ended before anything but its lock was there
    with run_folder.run_lock(output):
        preparation.prepare(asked, processes=1, resume=False)
    (output / "notes.txt").write_text("mine")
    shutil.rmtree(output / run_folder.TASKS)
    with run_folder.run_lock(output):
        preparation.prepare(asked, processes=1, resume=False)
    assert (output / "notes.txt").read_text() == "mine"


def test_a_run_that_is_refused_leaves_no_folder(
    micro_model: Path, refused: Refused, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    refused(*words(micro_model, output, "--data", f"folder={tmp_path / 'nowhere'}"))
    assert not output.exists()
    output.mkdir()
    refused(*words(micro_model, output, "--data", f"folder={tmp_path / 'nowhere'}"))
    assert output.exists()


def test_a_dry_run_leaves_a_folder_of_its_old_name_alone(micro_model: Path, tmp_path: Path) -> None:
    mine = tmp_path / "run.dry-run" / "thesis.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    run(words(micro_model, tmp_path / "run", "--dry-run"), processes=1)
    assert mine.read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.dry-run", "run.dry-run.png"]


def test_a_dry_run_draws_its_sheet_over_no_other_picture(
    micro_model: Path, tmp_path: Path, refused: Refused
) -> None:
    sheet = tmp_path / "run.dry-run.png"
    sheet.write_bytes(b"mine")
    line = refused(*words(micro_model, tmp_path / "run", "--dry-run"))
    assert "run.dry-run.png: already there, and no preview of vcdeft; move it" in line
    assert sheet.read_bytes() == b"mine"


def test_a_dry_run_into_a_folder_that_cannot_be_made_is_refused(
    micro_model: Path, refused: Refused, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    said = refused(*words(micro_model, tmp_path / "file" / "run", "--dry-run"))
    assert f"output {tmp_path / 'file'}: not writable" in said


# ---- the lock


@pytest.mark.parametrize("link", [Path.symlink_to, Path.hardlink_to])
def test_a_lock_that_is_a_link_costs_no_file(
    link: Callable[[Path, Path], None], tmp_path: Path
) -> None:
    mine, output = tmp_path / "mine.txt", tmp_path / "out"
    mine.write_text("mine")
    output.mkdir()
    link(output / LOCK, mine)
    if (output / LOCK).is_symlink():
        with pytest.raises(UserError, match="cannot be opened as a lock"), only_writer(output):
            pass
    else:
        with only_writer(output):
            pass
    assert mine.read_text() == "mine"


def test_claims_are_not_made_through_a_dangling_link(tmp_path: Path) -> None:
    (tmp_path / ".claims").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"\.claims: cannot be opened as a lock"):
        WorkLocks(tmp_path)
    assert not (tmp_path / "elsewhere").exists()


def test_a_folder_that_is_removed_while_one_waits_is_locked_anew(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with only_writer(output):
        waiting = forked(hold, output, tmp_path / "held")
        time.sleep(0.5)
        shutil.rmtree(output)
    waiting.join(20)
    assert waiting.exitcode == 0
    assert (tmp_path / "held").exists()
    assert (output / LOCK).exists()


def hold(output: Path, told: Path) -> None:
    with only_writer(output):
        assert (output / LOCK).exists()
        told.touch()


def started(words: Sequence[object]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "visualcloze_deft", *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.processes
@pytest.mark.parametrize("number", range(int(os.environ.get("VCDEFT_KILLS", "20"))))
def test_of_two_starts_into_one_folder_one_wins_and_its_settings_are_its_own(
    micro_model: Path, tmp_path: Path, number: int
) -> None:
    output = tmp_path / "run"
    groups = []
    for seed in (11, 12):
        groups.append(Group(words(micro_model, output, "--seed", seed), processes=1))
        time.sleep(0.05 * (number % 5))
    ends = [group.wait() for group in groups]
    assert sorted(ends) == [0, 2], [group.said for group in groups]
    winner, loser = groups if ends[0] == 0 else groups[::-1]
    assert "Traceback" not in loser.said
    assert "another process is writing" in loser.said or "holds another run" in loser.said
    assert load_run(str(output / run_folder.SETTINGS)).seed == (11 if winner is groups[0] else 12)


@pytest.mark.processes
def test_between_the_launcher_and_its_processes_no_other_run_comes_in(
    micro_model: Path, tmp_path: Path
) -> None:
    """The other comes when the launcher has prepared its run and waits for its processes."""
    output = tmp_path / "run"
    first = started(words(micro_model, output, "--seed", 11, "--processes", 1))
    while not (output / run_folder.SETTINGS).exists():
        time.sleep(0.01)
        assert first.poll() is None, first.communicate()
    other = Group(words(micro_model, output, "--seed", 12), processes=1)
    said, _ = first.communicate(timeout=120)
    assert first.returncode == 0, said[-2000:]
    assert other.wait() == 2
    assert load_run(str(output / run_folder.SETTINGS)).seed == 11
    adapter = json.loads((output / "checkpoints" / "step-000002" / "progress.json").read_text())
    assert adapter["seed"] == 11
