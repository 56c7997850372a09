"""Who starts processes, and when they end: what the environment tells of a group, and that nothing
goes on working for a launcher that is gone."""

from __future__ import annotations

import json
import os
import resource
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
import pytest
from PIL import Image

import visualcloze_deft
from visualcloze_deft.backbones.embedding_cache import entries
from visualcloze_deft.config.run_settings import parse_run
from visualcloze_deft.errors import UserError
from visualcloze_deft.runtime.launch import GROUP, already_launched, check_processes, forget_group
from visualcloze_deft.runtime.open_files import ENOUGH, check_handles, raise_limit
from visualcloze_deft.runtime.signals import exit_status
from visualcloze_deft.runtime.watchdog import SIGNS
from visualcloze_deft.storage import jsonl
from visualcloze_deft.storage.locks import CLAIMS
from visualcloze_deft.training import run_folder
from visualcloze_deft.training.files_needed import received

Refused = Callable[..., str]
WHOLE = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in GROUP:
        monkeypatch.delenv(name, raising=False)


def put(patch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        patch.setenv(name, value)


# ---- the environment


@pytest.mark.parametrize(
    "left_over",
    [
        {"RANK": "0", "WORLD_SIZE": "1"},
        {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"},
        {"RANK": ""},
        {"RANK": "", "WORLD_SIZE": ""},
        {**WHOLE, "RANK": "", "WORLD_SIZE": "1"},
        {"LOCAL_RANK": "0"},
        {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"},
    ],
)
def test_a_group_of_nobody_else_is_as_unset(
    monkeypatch: pytest.MonkeyPatch, left_over: dict[str, str]
) -> None:
    put(monkeypatch, left_over)
    assert not already_launched()
    forget_group()
    assert not {*GROUP} & {*os.environ}


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 is set in the environment, but not RANK, LOCAL_RANK"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "but not LOCAL_RANK, MASTER_ADDR, MASTER_PORT: unset"),
        ({"RANK": "3"}, "RANK=3 is set in the environment, but not WORLD_SIZE"),
        ({**WHOLE, "MASTER_PORT": ""}, "but not MASTER_PORT"),
        ({**WHOLE, "RANK": "2"}, "RANK=2 with WORLD_SIZE=2"),
        ({**WHOLE, "MASTER_PORT": "tcp://1"}, "MASTER_PORT='tcp://1' in the environment is no num"),
        ({"RANK": "-1"}, "RANK='-1' in the environment is no number"),
        ({"RANK": "\u0663"}, "is no number"),
        ({"WORLD_SIZE": "9" * 5000}, "is no number"),
    ],
)
@pytest.mark.parametrize("command", ["train", "encode"])
def test_what_is_left_of_a_larger_group_is_one_line(
    monkeypatch: pytest.MonkeyPatch,
    micro_model: Path,
    tmp_path: Path,
    refused: Refused,
    command: str,
    variables: dict[str, str],
    said: str,
) -> None:
    words = {"train": ["train"], "encode": ["data", "cache", "--processes", "1"]}[command]
    put(monkeypatch, variables)
    monkeypatch.setattr(time, "sleep", lambda _: None)  # that the first process says it first
    line = refused(*words, "--model", micro_model, "--output", tmp_path / "out")
    assert said in line
    assert len(line) <= 400
    assert not (tmp_path / "out").exists()


def test_a_whole_group_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, WHOLE)
    assert already_launched()


def vcdeft(*words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "visualcloze_deft", *map(str, words)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def words_of(model: Path) -> list[object]:
    base = ["--model", model, "--tasks", "depth-to-image", "--rank", 2, "--batch", 1]
    return [*base, "--processes", 1]


@pytest.mark.processes
@pytest.mark.parametrize("left_over", [{"RANK": "0", "WORLD_SIZE": "1"}, {"RANK": ""}])
def test_a_run_starts_where_a_shell_has_a_group_of_one(
    micro_model: Path, tmp_path: Path, left_over: dict[str, str]
) -> None:
    words = ["train", *words_of(micro_model), "--zero", 0, "--steps", 1]
    done = vcdeft(*words, "--output", tmp_path / "run", **left_over)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "mpi4py" not in done.stdout + done.stderr
    assert (tmp_path / "run" / "adapter" / "adapter_config.json").is_file()


@pytest.mark.processes
def test_encoding_starts_where_a_shell_has_a_group_of_one(
    micro_model: Path, tmp_path: Path
) -> None:
    words = ["data", "cache", *words_of(micro_model), "--examples", 2]
    left_over = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": ""}
    done = vcdeft(*words, "--output", tmp_path / "kept", **left_over)
    assert done.returncode == 0, done.stderr[-2000:]
    assert list(entries(tmp_path / "kept"))


# ---- how many


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", "--processes", 1000], "--processes 1000: this machine has"),
        (["plan", "--processes", -1], "processes = -1"),
        (["infer", "--processes", 1000], "--processes 1000: this machine has"),
        (["data", "cache", "--processes", 1000], "--processes 1000: this machine has"),
        (["train", "--set", "data.workers=100000"], "data.workers = 100000"),
        (["data", "check", "scenes=9", "--workers", 100000], "100000 is not in the range"),
    ],
)
def test_a_number_of_processes_that_no_machine_has_is_refused(
    grid_file: Callable[..., Path],
    micro_model: Path,
    tmp_path: Path,
    refused: Refused,
    words: list[object],
    said: str,
) -> None:
    output = tmp_path / "out"
    if words[1] != "check":
        words = [*words, "--model", micro_model]
    if words[0] in ("train", "infer") or words[1] == "cache":
        words = [*words, "--output", output]
    if words[0] == "infer":
        words = [*words, "--examples", grid_file()]
    assert said in refused(*words)
    assert not output.exists()


def test_some_more_processes_than_cores_are_allowed() -> None:
    check_processes(8)


# ---- how many files


def limited(files: int, *words: object) -> subprocess.CompletedProcess[str]:
    """`vcdeft WORDS` where a process may open so many files."""
    command = shlex.join([sys.executable, "-m", "visualcloze_deft", *map(str, words)])
    return subprocess.run(
        ["sh", "-c", f"ulimit -n {files} && exec {command}"],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["data", "check", "scenes=2", "--workers", 3], "and 268 may be needed"),
        (["data", "check", "scenes=2", "--workers", 0], "and 256 may be needed"),
        (["infer", "--examples", "grid.json"], "a shell that allows 'ulimit -n 256'"),
        (["eval", "none", "--suite", "scenes", "--output", "out"], "may open 64 files here"),
        pytest.param(
            ["train", "--batch", 2, "--set", "data.workers=4", "--output", "out"],
            "and 416 may be needed; start in a shell that allows 'ulimit -n 416', or lower data.wo",
            marks=pytest.mark.processes,
        ),
        pytest.param(
            ["data", "cache", "--output", "out"], "may be needed", marks=pytest.mark.processes
        ),
        pytest.param(
            ["compare", "compare-scenes", "--output", "out", "--dry-run"],
            "may be needed",
            marks=pytest.mark.processes,
        ),
    ],
)
def test_too_few_files_are_one_line_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[object], said: str
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(visualcloze_deft.__file__).parents[1]))
    monkeypatch.chdir(tmp_path)
    done = limited(64, *words)
    assert done.returncode == 2, done.stderr[-2000:]
    assert done.stderr.startswith("vcdeft: ")
    assert done.stderr.count("\n") == 1
    assert said in done.stderr
    assert len(done.stderr) <= 400
    assert not list(tmp_path.iterdir())


def test_a_process_takes_the_files_that_the_system_lets_it_have() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
        with pytest.raises(UserError, match="may open 200 files"):
            check_handles()
        raise_limit()
        check_handles()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (
            hard if 0 <= hard < ENOUGH else ENOUGH,
            hard,
        )
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize(
    "batch", [{"batch": 5}, {"batch_tokens": 5 * 8 * 16, "data": {"workers": 3, "resolution": 64}}]
)
def test_files_grow_with_what_reading_processes_hold(batch: dict[str, object]) -> None:
    fields = {"data": {"workers": 3}, "accumulate": 2} | batch
    assert received(parse_run(fields, where="here")) == 8 * 5 * (2 * 3 + 2)
    assert received(parse_run(fields | {"data": {"workers": 0}}, where="here")) == 0


@pytest.mark.processes
def test_a_run_needs_no_more_files_than_is_said(micro_model: Path, tmp_path: Path) -> None:
    words = ["train", *words_of(micro_model), "--zero", 0, "--steps", 4, "--output", tmp_path / "a"]
    done = limited(848, *words, "--batch", 8, "--set", "data.workers=4")
    assert done.returncode == 0, done.stderr[-2000:]


# ---- ends


def started(words: Sequence[object]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "visualcloze_deft", *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def until(happened: Callable[[], object], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "did not happen"
        time.sleep(0.02)


def alive(processes: Sequence[psutil.Process]) -> Iterator[psutil.Process]:
    for one in processes:
        try:
            if one.status() != psutil.STATUS_ZOMBIE:
                yield one
        except psutil.NoSuchProcess:
            pass


def killed(launcher: subprocess.Popen[str], *, least: int) -> None:
    """Kill a launcher; all that it has started must be gone after ten seconds."""
    children = psutil.Process(launcher.pid).children(recursive=True)
    assert len(children) >= least
    launcher.send_signal(signal.SIGKILL)
    until(lambda: not [*alive(children)], 10)
    launcher.communicate()


@pytest.mark.processes
def test_training_ends_with_its_launcher(micro_model: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    words = ["train", *words_of(micro_model), "--steps", 10_000, "--output", output]
    launcher = started([*words, "--processes", 2, "--set", "data.workers=1"])
    until(lambda: jsonl.read_lines(output / run_folder.METRICS))
    killed(launcher, least=4)


@pytest.mark.processes
@pytest.mark.parametrize("moment", [run_folder.SETTINGS, f"{SIGNS}/0"])
def test_a_run_that_has_not_begun_ends_as_soon_as_it_is_asked(
    micro_model: Path, tmp_path: Path, moment: str
) -> None:
    """Its evaluation before the first step would take hours."""
    output = tmp_path / "run"
    slow = ["--set", "logging.validate_every=1", "--set", "logging.validation_examples=1000000"]
    launcher = started(["train", *words_of(micro_model), *slow, "--output", output])
    until(lambda: (output / moment).exists())
    children = psutil.Process(launcher.pid).children(recursive=True)
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(20) in (exit_status(signal.SIGTERM), -signal.SIGTERM)
    until(lambda: not [*alive(children)], 5)


@pytest.mark.processes
def test_encoding_ends_with_its_launcher(micro_model: Path, tmp_path: Path) -> None:
    words = ["data", "cache", *words_of(micro_model), "--examples", 100_000]
    launcher = started([*words, "--processes", 2, "--output", tmp_path / "kept"])
    until(lambda: list(entries(tmp_path / "kept")))
    killed(launcher, least=2)


def grids_in(folder: Path, count: int) -> Path:
    for name in ("a", "b"):
        Image.new("RGB", (32, 32)).save(folder / f"{name}.png")
    rows = [["a.png", "b.png"], ["a.png", None]]
    grids = [{"task": "depth-to-image", "rows": rows, "seed": seed} for seed in range(count)]
    path = folder / "grids.json"
    path.write_text(json.dumps(grids))
    return path


@pytest.mark.processes
def test_generating_ends_with_its_launcher(micro_model: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    words = ["infer", "--examples", grids_in(tmp_path, 4), "--model", micro_model]
    launcher = started([*words, "--steps", 1000, "--processes", 2, "--output", output])
    until(lambda: (output / CLAIMS).is_file())
    killed(launcher, least=2)
    assert not list(output.glob("*.png"))


@pytest.mark.processes
def test_what_a_killed_process_of_a_shared_list_leaves_is_made_by_the_other(
    micro_model: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    words = ["infer", "--examples", grids_in(tmp_path, 2), "--model", micro_model]
    words += ["--inference-steps", 500, "--output", output]
    first = started(words)
    until(lambda: (output / CLAIMS).is_file())
    time.sleep(0.2)
    first.send_signal(signal.SIGSTOP)  # within its first grid
    assert not (output / "001.json").exists()
    other = started(words)
    until(lambda: (output / "002.json").is_file())
    time.sleep(1)
    assert other.poll() is None
    first.kill()
    said, _ = other.communicate(timeout=120)
    assert other.returncode == 0, said[-2000:]
    assert "waiting for what other processes make, 1 grids" in said
    assert (output / "001.json").is_file()
    first.communicate()
