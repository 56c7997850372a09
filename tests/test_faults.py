"""Faults in real training processes: killed, stopped, asked to end, disks full, numbers not finite.

Whatever happens to a run, what it resumes to is what a run without the fault ends with.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from accelerate import PartialState
from PIL import Image
from processes import Group, forked, run
from safetensors.torch import load_file, save_file
from transformers import T5TokenizerFast

from visualcloze_deft.adapters import files
from visualcloze_deft.backbones.flux_fill.loading import load_models
from visualcloze_deft.config.run_settings import load_run
from visualcloze_deft.errors import UserError
from visualcloze_deft.runtime import signals
from visualcloze_deft.runtime.watchdog import STUCK
from visualcloze_deft.storage import jsonl
from visualcloze_deft.training import run_data, run_folder
from visualcloze_deft.training.checkpoint import Progress, newest, save
from visualcloze_deft.training.engine import ClippedAdamW
from visualcloze_deft.training.joining import check_same_data, latest
from visualcloze_deft.training.metrics_log import MetricsLog

pytestmark = pytest.mark.processes
KILLS = int(os.environ.get("VCDEFT_KILLS", "20"))  # runs killed at random times
STEPS = 6
RESUME = ["train", "--resume", "--output"]


def words(model: Path, output: Path, *more: object) -> list[object]:
    base = ["train", "--model", model, "--tasks", "depth-to-image,novel-view", "--rank", 4]
    base += ["--steps", STEPS, "--batch", 2, "--output", output, "--lr", 0.01]
    return [
        *base,
        "--set",
        "save_every=1",
        "--set",
        "keep_checkpoints=9",
        "--set",
        "sample_grids=2",
        *more,
    ]


def lines(output: Path) -> list[dict[str, object]]:
    path = output / run_folder.METRICS
    texts = path.read_text().splitlines() if path.exists() else []
    return [json.loads(text) for text in texts if text.endswith("}")]


def losses(output: Path) -> list[object]:
    return [line["loss"] for line in lines(output)]


def weights(folder: Path) -> str:
    """The hash of an adapter's tensors; the order of the file's metadata is not always the same."""
    tensors = sorted(load_file(folder / files.WEIGHTS).items())
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for _, tensor in tensors)).hexdigest()


def step_folder(output: Path, step: int) -> Path:
    return output / "checkpoints" / f"step-{step:06d}"


def until(happened: Callable[[], object], *, seconds: float = 120, every: float = 0.01) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "did not happen"
        time.sleep(every)


@pytest.fixture(scope="module")
def whole(micro_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without a fault."""
    output = tmp_path_factory.mktemp("runs") / "whole"
    run(words(micro_model, output))
    return output


def assert_as_whole(output: Path, whole: Path) -> None:
    assert weights(output / "adapter") == weights(whole / "adapter")
    assert losses(output) == losses(whole)


def finish(model: Path, output: Path) -> None:
    """Resume, or start again where nothing was saved, as a person would."""
    saved = list((output / "checkpoints").glob("step-*"))
    run([*RESUME, output] if saved else words(model, output))


@pytest.mark.parametrize("number", range(KILLS))
def test_a_run_killed_at_a_random_time_ends_as_one_that_was_not(
    micro_model: Path, whole: Path, tmp_path: Path, number: int
) -> None:
    chance = random.Random(number)
    output = tmp_path / "run"
    group = Group(words(micro_model, output))
    step, more = chance.randrange(STEPS), chance.random() * 0.5
    until(lambda: len(lines(output)) >= step)
    time.sleep(more)
    group.send(signal.SIGKILL)
    group.wait()
    finish(micro_model, output)
    assert_as_whole(output, whole)


@pytest.mark.parametrize("number", range(KILLS // 2))
def test_a_run_killed_between_its_first_evaluation_and_its_first_checkpoint_starts_again(
    micro_model: Path, tmp_path: Path, number: int
) -> None:
    output = tmp_path / "run"
    often = ("--set", "logging.validate_every=1", "--set", "logging.validation_examples=2")
    asked = [*words(micro_model, output, *often), "--steps", 2, "--set", "save_every=100"]
    group = Group(asked)
    until(lambda: jsonl.read_lines(output / run_folder.EVALUATION))
    group.send(signal.SIGKILL)
    group.wait()
    run(asked)
    assert [line["step"] for line in jsonl.read_lines(output / run_folder.EVALUATION)] == [0, 1, 2]


def decide_in_two(model: str, folder: str) -> None:
    """In each of two processes, on files that only the second one has."""
    process = PartialState(cpu=True)
    rank, world = process.process_index, process.num_processes
    own = Path(folder) / str(rank)
    photos = own / "photos"
    photos.mkdir(parents=True)
    for number in range(2 + rank):
        Image.new("RGB", (32, 32)).save(photos / f"{number}_target.png")
    if rank == 1:
        (own / "checkpoints").mkdir()
        run_folder.append_line(own / run_folder.EVALUATION, {"step": 0})
        progress = Progress(step=1, examples=1, seed=0, global_batch=1)
        save(own / "checkpoints", progress, {"a": torch.zeros(1)}, lambda at: None, keep=2)
    said = [f"model={model}", f"output={own}", "logging.trackers=[]", "data.tasks=deblurring"]
    asked = load_run(None, [*said, f'data.sources=["folder={photos}"]'])
    watched = MetricsLog(asked, load_models(model), rank=rank, world=world, start=0)
    print(f"evaluated {watched.has_evaluated(0)}")
    with pytest.raises(UserError, match="no checkpoint in"):
        latest(own, process)
    with pytest.raises(UserError, match=r"process 0 finds 2 items, process 1 3"):
        check_same_data(run_data.mixture_of(asked), process)
    process.wait_for_everyone()
    process.destroy_process_group()


def test_the_first_process_decides_by_files_for_all(micro_model: Path, tmp_path: Path) -> None:
    said = run([micro_model, tmp_path], function=decide_in_two)
    assert said.count("evaluated False") == 2


def test_a_process_killed_within_saves_leaves_a_good_checkpoint(tmp_path: Path) -> None:
    """Saves of 20 MB, one after the other, so that most kills meet one."""
    cut, chance, last = 0, random.Random(0), 0
    for _ in range(12):
        saving = forked(keep_saving, tmp_path, last + 1)
        until(lambda: list(tmp_path.glob(f"step-{last + 1:06d}")))  # noqa: B023
        time.sleep(chance.random() * 0.3)
        saving.kill()
        saving.join()
        cut += len(list(tmp_path.glob(".*.part")))
        found, warnings = newest(tmp_path)
        assert warnings == []
        assert found.progress.step > last
        last = found.progress.step
        assert all((t == last).all() for t in found.moments().values())
    assert cut > 0


def keep_saving(folder: Path, first: int) -> None:
    for step in itertools.count(first):
        tensors = {"a": torch.full((5_000_000,), float(step))}
        progress = Progress(step=step, examples=step, seed=0, global_batch=1)
        save(folder, progress, tensors, lambda at: None, keep=2)


def test_asked_to_end_a_run_saves_and_leaves(
    micro_model: Path, whole: Path, tmp_path: Path
) -> None:
    """Started by a person: our own launcher is asked, and asks the processes."""
    output = tmp_path / "run"
    command = [sys.executable, "-m", "visualcloze_deft", *map(str, words(micro_model, output))]
    started = subprocess.Popen(
        [*command, "--set", "save_every=100"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    until(lambda: len(lines(output)) >= 2)
    started.send_signal(signal.SIGINT)
    said, _ = started.communicate(timeout=120)
    assert started.returncode == 128 + signal.SIGINT, said[-2000:]
    assert "Traceback" not in said
    step = len(lines(output))
    assert f"stopped at step {step} of {STEPS}, saved" in said
    assert newest(output / "checkpoints")[0].progress.step == step < STEPS
    run([*RESUME, output])
    assert_as_whole(output, whole)


def test_asked_twice_a_run_leaves_at_once(micro_model: Path, tmp_path: Path) -> None:
    """Also where its step cannot end, because another process hangs."""
    output = tmp_path / "run"
    command = [sys.executable, "-m", "visualcloze_deft", *map(str, words(micro_model, output))]
    started = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    until(lambda: lines(output))
    rank(started.pid, 1).suspend()
    started.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        started.wait(signals.ONE_REQUEST + 1)
    started.send_signal(signal.SIGINT)
    said, _ = started.communicate(timeout=20)
    assert started.returncode == 128 + signal.SIGINT
    assert "Traceback" not in said


def rank(launcher: int, number: int) -> psutil.Process:
    """A training process of our own launcher."""
    children = psutil.Process(launcher).children()
    return next(one for one in children if one.environ().get("RANK") == str(number))


def test_a_signal_to_all_processes_leaves_the_reading_ones_at_work(
    micro_model: Path, whole: Path, tmp_path: Path
) -> None:
    """As torchrun and SLURM send it: to every process of a group, not to the ranks alone."""
    output = tmp_path / "run"
    more = ("--set", "data.workers=1", "--set", "save_every=100")
    group = Group(words(micro_model, output, *more))
    until(lambda: len(lines(output)) >= 2)
    ranks = [psutil.Process(one.pid) for one in group.ranks]
    for process in [child for one in ranks for child in one.children()] + ranks:
        process.send_signal(signal.SIGTERM)
    assert group.wait() == 128 + signal.SIGTERM
    assert "saved; go on with" in group.said
    run([*RESUME, output])
    assert_as_whole(output, whole)


def test_a_process_that_dies_ends_the_run_with_its_reason(
    micro_model: Path, whole: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    command = [sys.executable, "-m", "visualcloze_deft", *map(str, words(micro_model, output))]
    started = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    until(lambda: list((output / "checkpoints").glob("step-*")))
    rank(started.pid, 1).kill()
    said, _ = started.communicate(timeout=120)
    assert started.returncode == 128 + signal.SIGKILL
    assert "process 1 was ended by SIGKILL" in said
    assert "Traceback" not in said
    run([*RESUME, output])
    assert_as_whole(output, whole)


def test_a_process_that_hangs_ends_the_run_with_its_reason(
    micro_model: Path, whole: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    group = Group(words(micro_model, output, "--set", "timeout=10"))
    until(lambda: list((output / "checkpoints").glob("step-*")))
    group.send(signal.SIGSTOP, 1)
    assert group.wait() == STUCK
    assert "process 0 got no further for 1" in group.said
    # where it was a second before at most: steps may be shorter
    assert re.search(r"\(process 1 was at (starting|.*step \d|\w+ing .+) \d+ s ago\)", group.said)
    run([*RESUME, output])
    assert_as_whole(output, whole)


def test_a_folder_that_vanishes_ends_the_run_with_its_reason(
    micro_model: Path, whole: Path, tmp_path: Path
) -> None:
    output, away = tmp_path / "run", tmp_path / "away"
    group = Group(words(micro_model, output))
    until(lambda: list((output / "checkpoints").glob("step-*")))
    output.rename(away)
    assert group.wait() == 2
    said = [line for line in group.said.splitlines() if line.startswith("vcdeft: ")]
    assert len(set(said)) == 1
    assert "No such file or directory" in said[0]  # of the next checkpoint, or line of metrics
    assert not output.exists()
    away.rename(output)
    run([*RESUME, output])
    assert_as_whole(output, whole)


FULL_DISK = """
set -e
mount -t tmpfs -o size=600k none {place}
python={python}
$python - {place} <<'END'
import sys, pathlib, torch, subprocess
from visualcloze_deft.training.checkpoint import Progress, newest, save, short_of_room
from visualcloze_deft.errors import UserError
place = pathlib.Path(sys.argv[1]) / "checkpoints"
tensors = {{"a": torch.zeros(55_000)}}  # 220 kB: two fit
def take(step):
    progress = Progress(step=step, examples=step, seed=0, global_batch=1)
    save(place, progress, tensors, lambda folder: None, keep=9)
def refused(step, why):
    try:
        take(step)
    except UserError as error:
        assert why in str(error), error
    else:
        raise AssertionError("was saved")
    assert newest(place)[0].progress.step == 2
    assert not list(place.glob(".*")), list(place.iterdir())
take(1); take(2)
assert "the next checkpoint takes" in short_of_room(place, 300_000)
assert short_of_room(place, 100_000) is None
refused(3, "No space left")
subprocess.run(["mount", "-o", "remount,ro", str(place.parent)], check=True)
refused(3, "Read-only file system")
subprocess.run(["mount", "-o", "remount,rw,size=2m", str(place.parent)], check=True)
take(3)
assert newest(place)[0].progress.step == 3
END
"""


def test_a_full_or_read_only_disk_costs_no_checkpoint(tmp_path: Path) -> None:
    """On a small file system of its own, where the system allows mounting one."""
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs user namespaces")
    script = FULL_DISK.format(place=tmp_path, python=sys.executable)
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", [files.WEIGHTS, "optimiser.safetensors", "progress.json"])
def test_a_flipped_bit_in_the_newest_checkpoint_is_found(
    whole: Path, tmp_path: Path, name: str
) -> None:
    output = tmp_path / "run"
    shutil.copytree(whole, output)
    shutil.rmtree(output / "adapter")
    path = step_folder(output, STEPS) / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    said = run([*RESUME, output])
    assert "is damaged" in said
    assert_as_whole(output, whole)


@pytest.mark.parametrize("zero", [2, 3])
def test_one_process_then_two_then_one_follow_the_same_loss(
    micro_model: Path, whole: Path, tmp_path: Path, zero: int
) -> None:
    output = tmp_path / "run"
    run(words(micro_model, output, "--zero", zero, "--batch", 4), processes=1)
    for step, processes in ((2, 2), (4, 1)):  # as if it had ended after that step
        shutil.rmtree(output / "adapter")
        for later in range(step + 1, STEPS + 1):
            shutil.rmtree(step_folder(output, later))
        run([*RESUME, output], processes=processes)
    assert losses(output) == pytest.approx(losses(whole), rel=1e-4)
    assert [line["examples"] for line in lines(output)] == [4 * k for k in range(1, STEPS + 1)]
    found = load_file(output / "adapter" / files.WEIGHTS)
    for name, tensor in load_file(whole / "adapter" / files.WEIGHTS).items():
        assert (found[name] - tensor).norm() < 1e-3 * tensor.norm()


@pytest.fixture(scope="module")
def poisoned(micro_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """Words of a run in which one of six items has a sentence that makes the loss not finite: T5's
    embedding of one of its words is damaged."""
    folder = tmp_path_factory.mktemp("poisoned")
    shutil.copytree(micro_model, folder / "model")
    tokenizer = T5TokenizerFast.from_pretrained(micro_model, subfolder="tokenizer_2")
    sentences = ["a wall of grey stone"] * 5 + ["a green lamp"]
    usual = {t for text in sentences[:5] for t in tokenizer(text).input_ids}
    rows = ["depth", "target"]
    odd = next(t for t in tokenizer(sentences[-1]).input_ids if t not in usual)
    path = folder / "model" / "text_encoder_2" / "model.safetensors"
    tensors = load_file(path)
    tensors["shared.weight"][odd] = float("nan")
    save_file(tensors, path, {"format": "pt"})
    for number, sentence in enumerate(sentences):
        for role in rows:
            Image.new("RGB", (32, 32), (40 * number, 99, 9)).save(folder / f"{number}_{role}.png")
        row = {role: f"{number}_{role}.png" for role in rows} | {"caption": sentence}
        with (folder / "rows.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
    return [
        *words(folder / "model", folder / "run"),
        *("--data", f"folder={folder / 'rows.jsonl'}", "--tasks", "depth-to-image"),
        *("--set", "data.recipe.keep_content=1", "--set", "data.recipe.caption_dropout=0"),
        *("--batch", 1, "--steps", 8, "--set", "data.recipe.examples=[1]"),
    ]


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_steps_that_are_not_finite_change_nothing_in_any_process(
    poisoned: list[object], tmp_path: Path, zero: int
) -> None:
    output = tmp_path / "run"
    said = run([*poisoned, "--output", output, "--zero", zero])
    skipped = [step for step, line in enumerate(lines(output), 1) if line["loss"] is None]
    assert 0 < len(skipped) < 8
    assert said.count("skipped, its gradient is not finite: examples") == len(skipped)
    names = (files.WEIGHTS, "optimiser.safetensors")
    for step in range(2, 9):
        before, after = step_folder(output, step - 1), step_folder(output, step)
        for name in names:
            same = (before / name).read_bytes() == (after / name).read_bytes()
            assert same == (step in skipped) or name == files.WEIGHTS
        states = [load_file(folder / files.WEIGHTS) for folder in (before, after)]
        same = all(torch.equal(states[0][key], states[1][key]) for key in states[0])
        assert same == (step in skipped)
    progress = newest(output / "checkpoints")[0].progress
    assert progress.not_finite == len(skipped)


def test_skipped_steps_are_counted_over_a_resume(poisoned: list[object], tmp_path: Path) -> None:
    output = tmp_path / "run"
    run([*poisoned, "--output", output])
    expected, curve = weights(output / "adapter"), losses(output)
    shutil.rmtree(output / "adapter")
    first = 1 + next(k for k, loss in enumerate(curve) if loss is None)
    for later in range(first + 1, 9):
        shutil.rmtree(step_folder(output, later))
    run([*RESUME, output])
    assert (losses(output), weights(output / "adapter")) == (curve, expected)


def test_too_many_steps_that_are_not_finite_end_the_run(
    poisoned: list[object], tmp_path: Path
) -> None:
    data = next(word for word in poisoned if str(word).startswith("folder="))
    rows = Path(str(data).removeprefix("folder="))
    odd = rows.with_name("odd.jsonl")
    odd.write_text(2 * (rows.read_text().splitlines()[-1] + "\n"))
    alone = [f"folder={odd}" if word == data else word for word in poisoned]
    group = Group([*alone, "--output", tmp_path / "run", "--set", "not_finite_at_most=2"])
    assert group.wait() == 2
    (line,) = {line for line in group.said.splitlines() if line.startswith("vcdeft: ")}
    assert "not finite 3 times in a row" in line
    assert "examples " in line
    assert "Traceback" not in group.said


def test_adamw_leaves_everything_as_it_is_where_a_gradient_is_not_finite() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    optimiser = ClippedAdamW([parameter], lr=0.1)
    for value, moved in ((1.0, True), (float("inf"), False), (float("nan"), False)):
        before = parameter.detach().clone()
        parameter.grad = torch.tensor([1.0, value, 1.0])
        optimiser.step()
        assert (not torch.equal(parameter, before)) == moved == (not optimiser.overflow)


def test_adamw_of_stage_0_clips_as_torch_does() -> None:
    both = [[torch.nn.Parameter(torch.ones(k)) for k in (3, 5)] for _ in range(2)]
    ours, theirs = ClippedAdamW(both[0], lr=0.1), torch.optim.AdamW(both[1], lr=0.1)
    ours.clip = 0.5
    for number in range(3):
        draw = torch.Generator().manual_seed(number)
        for mine, other in zip(*both, strict=True):
            mine.grad = torch.randn(mine.shape, generator=draw)
            other.grad = mine.grad.clone()
        norm = torch.nn.utils.clip_grad_norm_(both[1], 0.5)
        ours.step()
        theirs.step()
        torch.testing.assert_close(ours._global_grad_norm, norm)
        torch.testing.assert_close(both[0], both[1])
