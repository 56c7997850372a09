"""Training with real processes: agreement, resumption, survival."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from PIL import Image
from processes import Group, run, vcdeft
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from visualcloze_deft.adapters import files, injection
from visualcloze_deft.backbones.compiled import compile_blocks
from visualcloze_deft.backbones.embedding_cache import entries
from visualcloze_deft.backbones.flux_fill.loading import load_models
from visualcloze_deft.cli import main
from visualcloze_deft.config.run_settings import Run, load_run
from visualcloze_deft.errors import UserError
from visualcloze_deft.sampling.encoding import encode
from visualcloze_deft.storage.locks import only_writer
from visualcloze_deft.training import preparation, resume, run_data, run_folder
from visualcloze_deft.training.datasets import PixelDataset
from visualcloze_deft.training.objective import GridLoss
from visualcloze_deft.training.rate_schedules import learning_rate_factor

STEPS = 6
ZERO = "--set deepspeed.zero_optimization"
MEASURED = "--set logging.validate_every=3 --set logging.validation_examples=2"
SPLIT_ALL = f"{ZERO}.stage3_param_persistence_threshold=0 {ZERO}.stage3_max_live_parameters=0"


def arguments(model: Path, output: Path, *more: str) -> list[str]:
    base = ["train", "--model", str(model), "--tasks", "depth-to-image,novel-view", "--rank", "4"]
    base += ["--steps", str(STEPS), "--batch", "2", "--output", str(output), "--lr", "0.01"]
    sets = (
        "optimiser.warmup=2 save_every=2 context_weight=0.3 timestep_sampling=uniform "
        "timestep_shift=2 scheduled_sampling=0.5 ema=0.6 sample_grids=2"
    )
    return [*base, *(word for setting in sets.split() for word in ("--set", setting)), *more]


def losses(output: Path) -> list[float]:
    lines = (output / run_folder.METRICS).read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def adapter_of(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "adapter" / files.WEIGHTS)


@pytest.fixture(scope="module")
def two_processes(micro_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "zero2"
    done = vcdeft(*arguments(micro_model, output, "--zero", "2"))
    assert done.returncode == 0, done.stderr[-2000:]
    return output


def plain_training(folder: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and averaged adapter of the run in `folder`, in this process, without DeepSpeed."""
    run = load_run(str(folder / run_folder.SETTINGS))
    models = load_models(run.model)
    injection.attach(models.transformer, run.adapter, seed=run.seed)
    rates_of = injection.parameter_groups(models.transformer, run.adapter, lr=run.optimiser.lr)
    optimiser = torch.optim.AdamW(rates_of, betas=run.optimiser.betas, weight_decay=0.0)
    rates = [group["lr"] for group in optimiser.param_groups]
    loss_of = GridLoss(
        models.transformer, context_weight=0.3, guidance=1.0, scheduled_sampling=True
    )
    draws = PixelDataset(run_data.mixture_of(run))
    plain, trained = [], injection.trainable(models.transformer)
    average: dict[str, torch.Tensor] = {}
    for step in range(run.steps):
        factor = learning_rate_factor(step, run.steps, run.optimiser)
        for group, rate in zip(optimiser.param_groups, rates, strict=True):
            group["lr"] = rate * factor
        drawn = [draws[index] for index in range(step * 4, step * 4 + 4)]
        groups = encode(
            models,
            drawn,
            seed=0,
            times="uniform",
            timestep_shift=2,
            scheduled_sampling=0.5,
            context=run.context,
        )
        loss = loss_of(groups).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), 2.0)
        optimiser.step()
        optimiser.zero_grad()
        plain.append(loss.item())
        stays = min(run.ema, (2 + step) / (11 + step))
        now = {name: parameter.detach().clone() for name, parameter in trained.items()}
        average = {n: stays * average.get(n, now[n]) + (1 - stays) * now[n] for n in now}
    return plain, injection.state_of(models.transformer, average)


def test_zero2_on_two_processes_follows_plain_training(two_processes: Path) -> None:
    plain, adapter = plain_training(two_processes)
    assert losses(two_processes) == pytest.approx(plain, rel=1e-5)
    for name, tensor in adapter.items():
        torch.testing.assert_close(adapter_of(two_processes)[name], tensor, atol=2e-5, rtol=1e-4)


def test_the_loss_of_a_sample_does_not_depend_on_the_others(micro_model: Path) -> None:
    """Of those that are led, whose loss takes a step of the model's own, and those that are not."""
    models = load_models(str(micro_model))
    run = load_run(None, [f"model={micro_model}", "data.tasks=depth-to-image"])
    draws = PixelDataset(run_data.mixture_of(run))
    drawn = [draws[index] for index in range(12)]
    groups = encode(models, drawn, seed=0, scheduled_sampling=0.5)
    led = torch.cat([group.start > group.t for group in groups])
    assert 0 < led.sum() < len(led)
    loss_of = GridLoss(models.transformer, context_weight=1, guidance=1.0, scheduled_sampling=True)
    alone = [group.some(torch.tensor([k])) for group in groups for k in range(len(group.t))]
    with torch.no_grad():
        torch.testing.assert_close(loss_of(groups), loss_of(alone), atol=1e-5, rtol=1e-5)


def test_training_moves_p_and_r(micro_model: Path, two_processes: Path) -> None:
    models = load_models(str(micro_model))
    run = load_run(str(two_processes / run_folder.SETTINGS))
    injection.attach(models.transformer, run.adapter, seed=run.seed)
    start, end = injection.state(models.transformer), adapter_of(two_processes)
    moved = {n: (end[n] - start[n]).abs().max().item() for n in start}
    reached = [n for n in moved if "to_add_out" not in n and "ff_context" not in n]
    assert min(moved[n] for n in reached) > 0
    assert {n.rsplit("_", 1)[1] for n in reached} == {"P", "R"}


def test_a_run_folder_describes_itself(two_processes: Path) -> None:
    assert (two_processes / run_folder.SETTINGS).is_file()
    assert {p.stem for p in (two_processes / "tasks").iterdir()} == {"depth-to-image", "novel-view"}
    assert "torch" in json.loads((two_processes / run_folder.VERSIONS).read_text())
    assert list((two_processes / "sheets").glob("*.png"))
    assert list((two_processes / "tensorboard").iterdir())
    last = json.loads((two_processes / run_folder.METRICS).read_text().splitlines()[-1])
    assert set(last["tasks"]) <= {"depth-to-image", "novel-view"}


def test_a_checkpoint_holds_the_adapter_and_not_the_base(two_processes: Path) -> None:
    newest = sorted((two_processes / "checkpoints").iterdir())[-1]
    names = load_file(newest / files.WEIGHTS)
    adapter = sum(t.numel() for t in names.values())
    moments = sum(t.numel() for t in load_file(newest / "optimiser.safetensors").values())
    assert moments == 2 * adapter
    assert not list(newest.glob("*.pt"))


def test_another_run_is_not_overwritten(
    micro_model: Path, two_processes: Path, refused: Callable[..., str]
) -> None:
    before = adapter_of(two_processes)
    assert "holds another run" in refused(*arguments(micro_model, two_processes))
    assert all(torch.equal(before[n], t) for n, t in adapter_of(two_processes).items())


def test_a_killed_run_resumes_to_the_same_adapter(
    micro_model: Path, two_processes: Path, tmp_path: Path
) -> None:
    """Also where the loss on held-out grids is measured in between."""
    output = tmp_path / "killed"
    measuring = "--set logging.validate_every=2 --set logging.validation_examples=3".split()
    group = Group(arguments(micro_model, output, *measuring))
    while not list((output / "checkpoints").glob("step-*")) and group.ranks[0].is_alive():
        time.sleep(0.02)
    group.send(signal.SIGKILL)
    group.wait()
    assert list((output / "checkpoints").glob("step-*"))
    assert not (output / "adapter").exists()
    run(["train", "--output", output, "--resume"])
    assert losses(output) == losses(two_processes)
    expected = adapter_of(two_processes)
    assert all(torch.equal(expected[n], t) for n, t in adapter_of(output).items())
    measured = (output / run_folder.EVALUATION).read_text().splitlines()
    assert [json.loads(line)["step"] for line in measured] == [0, 2, 4, 6]
    board = EventAccumulator(str(output / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("loss")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.processes
@pytest.mark.parametrize(
    ("processes", "options"),
    [
        (1, "--zero 2 --method para --set precision=bfloat16 --set quantise=int8"),
        (2, "--zero 2 --set quantise=nf4"),
    ],
)
def test_quantised_bases_are_trained_on(
    micro_model: Path, tmp_path: Path, processes: int, options: str
) -> None:
    output = tmp_path / "run"
    words = [*arguments(micro_model, output), *options.split()]
    run(words, processes=processes)
    assert {t.dtype for t in adapter_of(output).values()} == {torch.float32}
    assert all(math.isfinite(loss) for loss in losses(output))


@pytest.mark.processes
@pytest.mark.parametrize(
    ("processes", "options"),
    [
        (2, f"--zero 3 --gradient-checkpointing all --set sample_every=4 {MEASURED}"),
        (2, f"--zero 3 --gradient-checkpointing 1 {SPLIT_ALL} --set offload=parameters {MEASURED}"),
        (2, "--zero 1 --gradient-checkpointing none --set offload=optimiser"),
        (2, "--zero 0"),
        (1, "--zero 0 --set accumulate=2"),
    ],
)
def test_other_ways_to_run_train_save_and_resume(
    micro_model: Path, two_processes: Path, tmp_path: Path, processes: int, options: str
) -> None:
    output = tmp_path / "run"
    run([*arguments(micro_model, output), *options.split()], processes=processes)
    trained, curve = adapter_of(output), losses(output)
    # the same examples in the same order: the same losses and adapter to rounding
    assert curve == pytest.approx(losses(two_processes), rel=1e-4)
    for name, tensor in adapter_of(two_processes).items():
        assert trained[name].dtype == torch.float32
        assert (trained[name] - tensor).norm() < 1e-3 * tensor.norm()
    shutil.rmtree(output / "adapter")
    shutil.rmtree(output / "checkpoints" / "step-000006")
    run(["train", "--output", output, "--resume"], processes=processes)
    assert losses(output) == pytest.approx(curve, rel=1e-6)
    for name, tensor in adapter_of(output).items():
        torch.testing.assert_close(tensor, trained[name], atol=1e-7, rtol=1e-5)


@pytest.mark.processes
def test_zero3_follows_plain_training_where_ranks_have_different_numbers_of_shapes(
    micro_model: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    words = arguments(micro_model, output, "--zero", "3", "--steps", "3")
    run([*words, "--tasks", "depth-to-image,object-insertion"])
    mixture = run_data.mixture_of(load_run(str(output / run_folder.SETTINGS)))
    wide = [len(mixture[i].rows[0]) > 2 for i in range(12)]  # a step: 2 of rank 0, 2 of rank 1
    mixed = [wide[k] != wide[k + 1] for k in range(0, 12, 2)]
    assert any(first != second for first, second in zip(mixed[::2], mixed[1::2], strict=True))
    assert losses(output) == pytest.approx(plain_training(output)[0], rel=1e-4)


def test_a_run_killed_after_its_last_checkpoint_still_gives_its_adapter(
    two_processes: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    shutil.copytree(two_processes, output)
    shutil.rmtree(output / "adapter")
    run(["train", "--output", output, "--resume"])
    expected = adapter_of(two_processes)
    assert all(torch.equal(expected[n], t) for n, t in adapter_of(output).items())


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


LAUNCHERS = {
    "torchrun": "torch.distributed.run --standalone --nproc-per-node=2 -m",
    "accelerate": "accelerate.commands.launch --cpu --num_processes=2 --num_machines=1 "
    "--mixed_precision=no --dynamo_backend=no --main_process_port={port} -m",
    "deepspeed": "deepspeed.launcher.runner --num_accelerators=2 --master_port={port} --module",
}


@pytest.mark.processes
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_it_runs_unchanged_under_other_launchers(
    micro_model: Path, two_processes: Path, tmp_path: Path, launcher: str
) -> None:
    output = tmp_path / "run"
    words = LAUNCHERS[launcher].format(port=free_port()).split()
    command = [sys.executable, "-m", *words, "visualcloze_deft"]
    command += arguments(micro_model, output, "--zero", "2")
    threads = {"OMP_NUM_THREADS": "1"}  # which torchrun alone sets by itself
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", **threads}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert losses(output) == losses(two_processes)


def on_two_nodes(logs: Path, *words: str) -> tuple[list[int], list[str]]:
    """Exit codes and output of two launchers of one process each, which find each other over a
    port of this machine."""
    launcher = "--nnodes 2 --nproc-per-node 1 --rdzv-backend c10d --rdzv-id two --rdzv-endpoint"
    command = [sys.executable, "-m", "torch.distributed.run", *launcher.split()]
    command += [f"localhost:{free_port()}", "--local-addr", "localhost", "-m", "visualcloze_deft"]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    paths = [logs / f"{node}.log" for node in range(2)]
    nodes = []
    for path in paths:
        with path.open("wb") as log:
            started = [*command, *words]
            nodes.append(subprocess.Popen(started, stdout=log, stderr=log, env=environment))
    ended = [node.wait(timeout=300) for node in nodes]
    return ended, [path.read_text() for path in paths]


@pytest.mark.processes
def test_two_nodes_train_what_two_processes_of_one_do(
    micro_model: Path, two_processes: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    ended, said = on_two_nodes(tmp_path, *arguments(micro_model, output, "--zero", "2"))
    assert ended == [0, 0], said[0][-2000:] + said[1][-2000:]
    assert losses(output) == losses(two_processes)
    assert all(torch.equal(adapter_of(two_processes)[n], t) for n, t in adapter_of(output).items())


@pytest.mark.processes
def test_what_the_first_node_refuses_every_node_says(
    micro_model: Path, two_processes: Path, tmp_path: Path
) -> None:
    ended, said = on_two_nodes(tmp_path, *arguments(micro_model, two_processes))
    assert 0 not in ended
    assert all("holds another run" in text and "RuntimeError" not in text for text in said)


def test_a_mistake_that_only_the_processes_find_is_one_line(
    micro_model: Path, tmp_path: Path
) -> None:
    group = Group(
        arguments(micro_model, tmp_path / "run", "--set", "adapter.target_modules=nothing")
    )
    assert group.wait() == 2
    assert "matches no linear layer" in group.said
    assert "Traceback" not in group.said


def with_damaged(micro_model: Path, folder: Path, damaged: int, *more: str) -> list[str]:
    """A run with reading processes on eight pairs of pictures, the first of them cut short."""
    for name in ("depth", "target"):
        (folder / "data" / name).mkdir(parents=True)
        for number in range(8):
            Image.new("RGB", (32, 32)).save(folder / "data" / name / f"{number}.png")
    for number in range(damaged):
        path = folder / "data" / "target" / f"{number}.png"
        path.write_bytes(path.read_bytes()[:-20])
    words = arguments(micro_model, folder / "run", "--set", "data.workers=1", *more)
    words += ["--data", f"folder={folder / 'data'}", "--tasks", "depth-to-image"]
    return words


@pytest.mark.processes
def test_what_cannot_be_read_is_replaced_and_listed(micro_model: Path, tmp_path: Path) -> None:
    said = run(with_damaged(micro_model, tmp_path, 1))
    listed = (tmp_path / "run" / run_folder.SKIPPED).read_text().splitlines()
    assert {json.loads(line)["item"] for line in listed} == {"0"}
    assert "0.png" in json.loads(listed[0])["why"]
    assert f"{len(listed)} items could not be read and were replaced" in said
    mixture = run_data.mixture_of(load_run(str(tmp_path / "run" / run_folder.SETTINGS)))
    skipped = [i for i in range(STEPS * 4) for _ in mixture[i].skipped]
    assert sorted(json.loads(line)["example"] for line in listed) == skipped


@pytest.mark.processes
@pytest.mark.parametrize(("damaged", "more"), [(1, ["--batch", "40"]), (8, [])])
def test_too_much_that_cannot_be_read_stops_the_run_with_one_line(
    micro_model: Path, tmp_path: Path, damaged: int, more: list[str]
) -> None:
    group = Group(with_damaged(micro_model, tmp_path, damaged, *more))
    assert group.wait() == 2
    (line,) = {line for line in group.said.splitlines() if line.startswith("vcdeft: ")}
    said = "cannot be read, the last" if damaged == 8 else "more than data.skip_at_most = 0.02"
    assert said in line
    assert ".png" in line
    assert "Traceback" not in group.said


@pytest.mark.processes
def test_batches_by_tokens_follow_one_process_and_go_on_after_a_stop(
    micro_model: Path, tmp_path: Path
) -> None:
    """Two processes of one part each, and one process of two parts stopped half way."""
    budget = ["--set", "batch_tokens=40", "--tasks", "depth-to-image,object-insertion"]
    one, two = tmp_path / "one", tmp_path / "two"
    words = arguments(micro_model, two, *budget)
    run(words)
    words = arguments(micro_model, one, *budget, "--set", "accumulate=2", "--set", "save_every=1")
    run(words, processes=1)
    assert losses(one) == pytest.approx(losses(two), rel=1e-5)
    seen = [json.loads(line) for line in (two / run_folder.METRICS).read_text().splitlines()]
    assert len({line["examples"] - before["examples"] for before, line in pairwise(seen)}) > 1
    assert all(0 < line["tokens"] <= 80 and 0 <= line["idle"] < 1 for line in seen)
    shutil.rmtree(one / "adapter")
    shutil.rmtree(max((one / "checkpoints").iterdir()))
    whole = losses(one)
    run(["train", "--output", one, "--resume"], processes=1)
    assert losses(one) == whole


@pytest.mark.processes
def test_a_run_that_finds_all_encodings_follows_one_that_encodes(
    micro_model: Path, two_processes: Path, tmp_path: Path
) -> None:
    kept = tmp_path / "kept"
    words = arguments(micro_model, kept, "--processes", "1")[1:]
    main(["data", "cache", *words, "--examples", str(STEPS * 4)])
    once = {path: path.stat().st_mtime_ns for path in entries(kept)}
    output = tmp_path / "run"
    more = ["--set", f"data.embedding_cache={kept}", "--set", "offload_encoders=true"]
    said = run(arguments(micro_model, output, *more))
    assert losses(output) == pytest.approx(losses(two_processes), rel=1e-5)
    found, made = re.search(r"(\d+) found, (\d+) made", said).groups()
    assert int(found) > STEPS * 4 * 3  # two texts and a strip of each example, and more
    sheet_alone = set(entries(kept)) - set(once)
    assert int(made) >= len(sheet_alone) > 0
    assert {path: path.stat().st_mtime_ns for path in once} == once


def test_a_run_that_saved_nothing_can_be_started_again(micro_model: Path, tmp_path: Path) -> None:
    run = load_run(None, [f"model={micro_model}", f"output={tmp_path / 'run'}"])
    preparation.prepare(run, processes=1, resume=False)
    preparation.prepare(run, processes=1, resume=False)
    (tmp_path / "run" / "checkpoints" / "step-000002").mkdir(parents=True)
    with pytest.raises(UserError, match="holds another run"):
        preparation.prepare(run, processes=1, resume=False)


def test_a_second_process_does_not_write_beside_the_first(tmp_path: Path) -> None:
    with (
        only_writer(tmp_path / "run"),
        pytest.raises(UserError, match="another process"),
        only_writer(tmp_path / "run", patience=0),
    ):
        pass
    with only_writer(tmp_path / "run"):
        pass


def test_resuming_with_changed_task_files_is_refused(
    two_processes: Path, refused: Callable[..., str]
) -> None:
    kept = two_processes / "tasks" / "novel-view.toml"
    before = kept.read_text()
    kept.write_text(before.replace("another side", "behind"))
    assert "task novel-view of" in refused("train", "--output", two_processes, "--resume")
    kept.write_text(before)
    extra = kept.with_name("extra.toml")
    extra.write_text(before)
    assert "extra is there only" in refused("train", "--output", two_processes, "--resume")
    extra.unlink()


def test_resuming_on_another_base_of_the_same_shape_is_refused(
    micro_model: Path, two_processes: Path, tmp_path: Path
) -> None:
    run = load_run(str(two_processes / run_folder.SETTINGS))
    shutil.copytree(two_processes, tmp_path / "run")
    other = tmp_path / "other"
    shutil.copytree(micro_model, other)
    path = other / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(path).items()}, path)
    changed = run.model_copy(update={"model": str(other), "output": str(tmp_path / "run")})
    kept = tmp_path / "run" / run_folder.SETTINGS
    kept.write_text(kept.read_text().replace(str(micro_model), str(other)))
    with pytest.raises(UserError, match="made for another base"):
        preparation.prepare(changed, processes=2, resume=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--rank", "8"], "adapter.rank was 4, now it is 8"),
        (["--method", "lora"], "adapter.method was 'deft'"),
        (["--tasks", "novel-view"], "data.tasks was 'depth-to-image,novel-view'"),
        (["--set", "data.weights={novel-view = 2}"], "data.weights.novel-view was None"),
    ],
)
def test_resuming_as_another_run_is_refused(
    two_processes: Path, refused: Callable[..., str], change: list[str], message: str
) -> None:
    assert message in refused("train", "--output", two_processes, "--resume", *change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--lr", "0.02", "--allow-change", "optimiser.lr"], None),
        (["--set", "data.weights={novel-view = 2}", "--allow-change", "data.weights"], None),
        (["--lr", "0.02"], "or say --allow-change optimiser.lr"),
        (["--rank", "8", "--allow-change", "adapter.rank"], "start another --output"),
        (["--allow-change", "optimiser.lrr"], "no such setting; did you mean optimiser.lr"),
    ],
)
def test_what_may_change_is_named(
    two_processes: Path,
    tmp_path: Path,
    refused: Callable[..., str],
    change: list[str],
    message: str | None,
) -> None:
    output = tmp_path / "run"
    shutil.copytree(two_processes, output)
    words = ["train", "--output", output, "--resume", *change]
    if message is None:
        run(words)  # which has no step left to take
    else:
        assert message in refused(*words)


def test_a_batch_is_divided_anew_among_other_processes(two_processes: Path) -> None:
    was = load_run(str(two_processes / run_folder.SETTINGS))
    assert [resume.divided(was, processes=count).batch for count in (1, 2, 4)] == [4, 2, 1]
    with pytest.raises(UserError, match="4 batch a step cannot be divided among 3 processes"):
        resume.divided(was, processes=3)


def test_a_dry_run_says_what_the_run_will_take_and_leaves_a_sheet(
    micro_model: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    said = run(arguments(micro_model, output, "--dry-run", "--steps", "500"))
    assert "step 1: 4 grids" in said
    assert "500 such steps" in said
    assert "checkpoint 0." in said
    assert [path.name for path in tmp_path.iterdir()] == ["run.dry-run.png"]
    assert Image.open(tmp_path / "run.dry-run.png").width > 100


@pytest.mark.processes
def test_compiled_blocks_give_the_same_loss_and_gradients(micro_model: Path) -> None:
    run = load_run(None, [f"model={micro_model}", "data.tasks=depth-to-image", "adapter.rank=4"])
    draws = PixelDataset(run_data.mixture_of(run))
    models = load_models(run.model)
    groups = encode(models, [draws[index] for index in range(2)], seed=0)
    injection.attach(models.transformer, run.adapter, seed=0)
    loss_of = GridLoss(models.transformer, context_weight=1, guidance=1.0)
    found = []
    for compiled in (False, True):
        if compiled:
            compile_blocks(models.transformer)
        loss = loss_of(groups).mean()
        loss.backward()
        trained = injection.trainable(models.transformer).values()
        found.append([loss.detach(), *(p.grad for p in trained if p.grad is not None)])
        models.transformer.zero_grad(set_to_none=True)
    for plain, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, plain, atol=1e-5, rtol=1e-4)


def test_resuming_with_another_global_batch_is_refused(
    two_processes: Path, refused: Callable[..., str]
) -> None:
    line = refused("train", "--output", two_processes, "--resume", "--batch", "3")
    assert "4 grids a step" in line


def test_an_adapter_says_of_itself_what_those_of_earlier_versions_say(tmp_path: Path) -> None:
    """Readers of files, ours and others', go by these names."""
    said = run_folder.adapter_metadata(Run(), 3, attention="native", base={"base_model": "tiny"})
    assert set(said) == set(
        "visualcloze_deft method rank alpha layers dropout quantise attention clip_text cells "
        "resolution base_model step tasks context".split()
    )
    assert set(run_folder.base_of(Run(model="tiny"))) == set(
        "base_model base_fingerprint base_lora base_lora_sha256".split()
    )
