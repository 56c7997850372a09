"""Rules about GPUs, on facts that need no GPU; and where they are applied."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from visualcloze_deft.backbones.base import Load
from visualcloze_deft.backbones.precision import dtype_of
from visualcloze_deft.config.run_settings import OFFLOADED, load_run
from visualcloze_deft.errors import UserError
from visualcloze_deft.planning.machine import memory_here
from visualcloze_deft.planning.memory import plan_here
from visualcloze_deft.runtime.gpus import Gpu, check_alike, gpus_here, precision_on, why_float32
from visualcloze_deft.runtime.launch import device_environment, say_once

H100 = Gpu(name="NVIDIA H100 80GB HBM3", memory=85_029_158_912, bfloat16=True, rocm=False)
V100 = Gpu(name="Tesla V100-SXM2-16GB", memory=16_935_682_048, bfloat16=False, rocm=False)
MI300 = Gpu(name="AMD Instinct MI300X", memory=206_141_652_992, bfloat16=True, rocm=True)


@pytest.fixture
def visible(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Lets torch report these GPUs."""

    def show(*gpus: Gpu) -> None:
        facts = [
            SimpleNamespace(name=g.name, total_memory=g.memory, major=9 if g.bfloat16 else 7)
            for g in gpus
        ]
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(gpus))
        monkeypatch.setattr(torch.cuda, "get_device_properties", facts.__getitem__)
        monkeypatch.setattr(torch.version, "hip", "6.4" if any(g.rocm for g in gpus) else None)

    return show


def test_auto_is_bfloat16_only_where_it_was_tried() -> None:
    assert precision_on("auto", H100) == "bfloat16"
    assert precision_on("auto", V100) == precision_on("auto", MI300) == "float32"
    assert precision_on("auto", None) == "float32"
    assert precision_on("bfloat16", None) == precision_on("bfloat16", MI300) == "bfloat16"
    assert precision_on("float32", H100) == "float32"
    with pytest.raises(UserError, match=r"V100.* does not compute in it"):
        precision_on("bfloat16", V100)


def test_why_auto_is_float32_is_one_line_that_names_the_gpu() -> None:
    assert why_float32(H100) is None
    for gpu in (V100, MI300):
        line = why_float32(gpu)
        assert line is not None
        assert gpu.name in line
        assert "\n" not in line


def test_loading_in_float32_on_a_gpu_is_said_once(
    visible: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    visible(V100)
    say_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert dtype_of("auto", "cuda") == dtype_of("auto", "cuda:0") == torch.float32
    (said,) = (record.getMessage() for record in caplog.records)
    assert said == why_float32(V100)
    assert dtype_of("auto", "cpu") == torch.float32


def test_gpus_are_what_torch_reports(visible: Callable[..., None]) -> None:
    assert gpus_here() == []
    visible(H100, V100)
    assert gpus_here() == [H100, V100]


def test_a_plan_counts_the_precision_that_will_be_used(visible: Callable[..., None]) -> None:
    load, run = Load(grids=1, image=64, text=40), load_run(None, [])
    for gpu, size in ((H100, 2), (V100, 4), (MI300, 4)):
        visible(gpu)
        assert plan_here(run, load, processes=1).size == size


def test_gpus_of_different_memory_are_refused_and_named() -> None:
    check_alike([])
    check_alike([V100])
    other = Gpu(name="a", memory=100, bfloat16=True, rocm=False)
    check_alike([other, Gpu(name="b", memory=96, bfloat16=True, rocm=False)])
    with pytest.raises(UserError) as found:
        check_alike([V100, H100, H100])
    assert "0: Tesla V100-SXM2-16GB with 16.9 GB, 1: NVIDIA H100" in str(found.value)
    assert "CUDA_VISIBLE_DEVICES=1,2 or --processes 1" in str(found.value)


def test_a_run_on_gpus_of_different_memory_ends_before_it_starts(
    visible: Callable[..., None], refused: Callable[..., str], tmp_path: Path
) -> None:
    visible(H100, V100)
    line = refused("train", "--output", tmp_path / "run")
    assert "GPUs of different memory" in line
    assert memory_here(1) == H100.memory
    assert memory_here(2) == V100.memory
    assert not (tmp_path / "run").exists()


def test_a_run_in_bfloat16_on_a_gpu_without_it_ends_before_it_loads(
    visible: Callable[..., None], refused: Callable[..., str], tmp_path: Path, hollow_model: Path
) -> None:
    visible(V100)
    words = ["train", "--output", tmp_path / "run", "--model", hollow_model]
    line = refused(*words, "--set", "precision=bfloat16")
    assert "precision bfloat16: Tesla V100" in line
    assert not (tmp_path / "run").exists()


def test_on_gpus_memory_grows_in_segments_unless_the_user_says_otherwise(
    visible: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert device_environment() == {"DS_ACCELERATOR": "cpu"}
    visible(H100)
    assert device_environment() == {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:128")
    assert device_environment() == {}


def test_what_is_offloaded_is_not_pinned() -> None:
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )

    ours = OFFLOADED["parameters"]
    assert not DeepSpeedZeroOffloadParamConfig(**ours["offload_param"]).pin_memory
    assert not DeepSpeedZeroOffloadOptimizerConfig(**ours["offload_optimizer"]).pin_memory
