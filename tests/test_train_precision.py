"""Training as on GPUs, shown on CPUs: a bfloat16 base, shared weights, dropout after a resume."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import deepspeed
import pytest
import torch
import zero_memory
from processes import run
from safetensors.torch import load_file, save_file
from test_train import MEASURED, SPLIT_ALL, adapter_of, arguments, losses

from visualcloze_deft.adapters import injection
from visualcloze_deft.backbones.flux_fill.loading import load_transformer
from visualcloze_deft.training.engine import gather_adapter, start_engine

BFLOAT16 = ["--set", "precision=bfloat16"]


@pytest.mark.processes
@pytest.mark.parametrize("method", ["deft", "lora"])
def test_zero3_trains_a_float32_adapter_on_a_bfloat16_base_as_zero2_does(
    micro_model: Path, tmp_path: Path, method: str
) -> None:
    """Every weight split, gathered in its own precision; also for the held-out loss and sheets."""
    words = ["--method", method, *BFLOAT16, *MEASURED.split()]
    run([*arguments(micro_model, tmp_path / "two"), "--zero", "2", *words])
    run([*arguments(micro_model, tmp_path / "three"), "--zero", "3", *SPLIT_ALL.split(), *words])
    assert losses(tmp_path / "three") == pytest.approx(losses(tmp_path / "two"), rel=0.01)
    two, three = adapter_of(tmp_path / "two"), adapter_of(tmp_path / "three")
    for name, tensor in two.items():
        assert three[name].dtype == tensor.dtype == torch.float32
        assert (three[name] - tensor).norm() < 0.05 * tensor.norm().clamp(min=0.1)


def each_saves(output: str) -> None:
    """Under every stage: steps on grids of this rank's own, then its whole adapter in a file."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    rank = torch.distributed.get_rank()
    for stage in (0, 1, 2, 3):
        settings = zero_memory.run_under(stage)
        transformer = load_transformer("tiny", dtype=torch.bfloat16)
        injection.attach(transformer, settings.adapter, seed=0)
        engine = start_engine(transformer, settings)
        torch.manual_seed(rank)
        for _ in range(2):
            engine.backward(engine([zero_memory.group()]).sum())
            engine.step()
        tensors = gather_adapter(engine)
        save_file(tensors, Path(output) / f"{stage}-{rank}.safetensors")
        engine.destroy()
    torch.distributed.destroy_process_group()


@pytest.mark.processes
def test_every_process_would_save_the_same_adapter(tmp_path: Path) -> None:
    run([tmp_path], function=each_saves)
    for stage in (0, 1, 2, 3):
        first, second = (load_file(tmp_path / f"{stage}-{rank}.safetensors") for rank in (0, 1))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)
        assert {tensor.dtype for tensor in first.values()} == {torch.float32}


@pytest.mark.parametrize("bits", ["nf4", "int8", "fp8"])
def test_quantised_weights_that_would_be_split_are_refused(
    micro_model: Path, tmp_path: Path, refused: Callable[..., str], bits: str
) -> None:
    words = arguments(micro_model, tmp_path / "run", "--zero", "3", "--set", f"quantise={bits}")
    line = refused(*words)
    assert f"quantise '{bits}' with --zero 3: a quantised weight cannot be split" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.processes
@pytest.mark.parametrize("method", ["deft", "lora"])
def test_dropout_after_a_resume_is_that_of_an_unbroken_run(
    micro_model: Path, tmp_path: Path, method: str
) -> None:
    """Also where blocks are computed again in the backward pass."""
    output = tmp_path / "run"
    words = ["--method", method, "--gradient-checkpointing", "all", "--set", "adapter.dropout=0.3"]
    run([*arguments(micro_model, output), *words])
    unbroken, trained = losses(output), adapter_of(output)
    run([*arguments(micro_model, tmp_path / "without", "--method", method)])
    assert losses(tmp_path / "without")[1:] != unbroken[1:]
    shutil.rmtree(output / "adapter")
    shutil.rmtree(output / "checkpoints" / "step-000006")
    run(["train", "--output", output, "--resume"])
    assert losses(output) == unbroken
    assert all(torch.equal(trained[name], tensor) for name, tensor in adapter_of(output).items())
