"""The seam between families of models and all else: a second family, known to tests alone."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_unet import NAME, TINY_UNET, write_tiny_unet

from visualcloze_deft.adapters import files, injection
from visualcloze_deft.adapters.export import export
from visualcloze_deft.backbones.base import Models
from visualcloze_deft.backbones.peft_files import CONFIG, WEIGHTS
from visualcloze_deft.backbones.table import BACKBONES, backbone_of, blocks_of
from visualcloze_deft.config.run_settings import Adapter
from visualcloze_deft.grids import grid
from visualcloze_deft.grids.prompt import Prompt
from visualcloze_deft.sampling.denoising import generate
from visualcloze_deft.sampling.encoding import PixelExample, encode
from visualcloze_deft.training.objective import GridLoss

TASK = """
summary = "A picture of what the text says."
group = "text"
instruction = "A {target}."
content = "caption"
columns = { target = "picture" }
"""
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220)}


@pytest.fixture
def known() -> Iterator[None]:
    BACKBONES[NAME] = TINY_UNET
    yield
    del BACKBONES[NAME]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_unet(tmp_path_factory.mktemp("unet"))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, colour in COLOURS.items():
        Image.new("RGB", (40, 40), colour).save(folder / f"{name}_target.png")
        (folder / f"{name}.txt").write_text(f"all {name}", encoding="utf-8")
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "text-to-image.toml").write_text(TASK, encoding="utf-8")
    return folder


def example(index: int) -> PixelExample:
    colour = list(COLOURS.values())[index]
    built = grid.join([[Image.new("RGB", (32, 32), colour)]], hidden=[True])
    words = Prompt(rows=1, columns=1, content=list(COLOURS)[index])
    return PixelExample(index=index, task="text-to-image", grid=built, prompt=words)


def image(models: Models) -> Image.Image:
    blank = grid.join([[Image.new("RGB", (32, 32))]], hidden=[True])
    [[made]] = generate(models, [blank], ["all red"], seeds=[3], steps=4, guidance=1.0)
    return made


def test_a_family_is_known_by_its_denoiser(known: None, model: Path, micro_model: Path) -> None:
    assert backbone_of(str(model)) is TINY_UNET
    assert backbone_of(str(micro_model)).name == backbone_of("tiny").name == "flux-fill"


def test_without_its_row_a_model_is_no_flux(model: Path, refused: Any, tmp_path: Path) -> None:
    words = ["train", "--model", model, "--tasks", "depth-to-image"]
    line = refused(*words, "--output", tmp_path / "never")
    assert "no transformer" in line


def test_a_second_family_learns_exports_and_samples(
    known: None, model: Path, tmp_path: Path
) -> None:
    models = backbone_of(str(model)).networks().load(str(model))
    before = image(models)
    assert before.size == (32, 32)
    injection.attach(models.denoiser, Adapter(rank=2), seed=0)
    assert image(models).tobytes() == before.tobytes()  # DEFT starts as the base
    loss_of = GridLoss(models.denoiser, context_weight=1.0, guidance=1.0, process=models.process)
    loss_of.train()
    optimiser = torch.optim.AdamW(injection.trainable(models.denoiser).values(), lr=0.03)
    batches = encode(models, [example(k) for k in range(3)], seed=0)
    losses = []
    for _ in range(20):
        losses.append(loss_of(batches).mean())
        losses[-1].backward()
        optimiser.step()
        optimiser.zero_grad()
    assert losses[-1] < 0.98 * losses[0]
    after = image(models)
    assert after.tobytes() != before.tobytes()
    folder = tmp_path / "adapter"
    folder.mkdir()
    files.save(models.denoiser, folder, base=str(model))
    again = backbone_of(str(model)).networks().load(str(model))
    files.load(again.denoiser, folder)
    assert image(again).tobytes() == after.tobytes()
    for kind in ("peft", "merged"):
        report = export(folder, tmp_path / kind, kind, model=str(model))
        assert report.weights is not None
        assert report.weights < 1e-4
    assert (tmp_path / "peft" / WEIGHTS).is_file()


def test_what_a_family_lacks_is_refused(
    known: None, model: Path, pictures: Path, refused: Any
) -> None:
    words = ["train", "--model", model, "--data", f"folder={pictures}"]
    words += ["--output", pictures.parent / "never"]
    words += ["--set", f'data.task_folders=["{pictures.parent / "tasks"}"]']
    words += ["--tasks", "text-to-image"]
    assert "data.recipe.examples" in refused(*words)
    words += ["--set", "data.recipe.examples=[1]"]
    for setting in ("scheduled_sampling=0.5", "quantise=fp8"):
        line = refused(*words, "--set", setting)
        assert f"{setting.partition('=')[0]}: not for models of tiny-unet" in line


def test_flux_makes_nothing_of_words_alone(pictures: Path, refused: Any) -> None:
    words = ["train", "--model", "tiny", "--data", f"folder={pictures}"]
    words += ["--output", pictures.parent / "never"]
    words += ["--set", f'data.task_folders=["{pictures.parent / "tasks"}"]']
    words += ["--tasks", "text-to-image"]
    assert "every column is a target" in refused(*words)


def test_its_blocks_are_those_that_diffusers_recomputes(known: None, model: Path) -> None:
    models = backbone_of(str(model)).networks().load(str(model))
    again: list[object] = []

    def call(block: Any, *inputs: Any) -> Any:
        again.append(block)
        return block(*inputs)

    models.denoiser.train().enable_gradient_checkpointing(call)
    models.denoiser(**TINY_UNET.networks().probe(models.denoiser, torch.Generator()))
    assert set(again) == set(blocks_of(models.denoiser))
    assert len(again) == len(TINY_UNET.sizes(str(model)).blocks)


@pytest.mark.processes
@pytest.mark.parametrize("zero", [0, 2, 3])
def test_the_trainer_trains_and_resumes_it(
    model: Path, pictures: Path, tmp_path: Path, zero: int
) -> None:
    run = tmp_path / "run"
    words = ["train", "--model", model, "--data", f"folder={pictures}", "--output", run]
    words += ["--set", f'data.task_folders=["{pictures.parent / "tasks"}"]']
    words += ["--tasks", "text-to-image"]
    settings = {
        "data.recipe.examples": "[1]",
        "scheduled_sampling": 0,
        "save_every": 2,
        "logging.trackers": "[]",
        "gradient_checkpointing": 1,
    }
    for name, value in settings.items():
        words += ["--set", f"{name}={value}"]
    words += ["--steps", 4, "--rank", 2, "--batch", 2, "--zero", zero]
    vcdeft(*words)
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    whole = load_file(run / "adapter" / WEIGHTS)
    assert len(metrics) == 4
    assert json.loads((run / "adapter" / CONFIG).read_text("utf-8"))["peft_type"] == "DEFT"
    assert list((run / "sheets").glob("*.png"))
    shutil.rmtree(run / "adapter")
    shutil.rmtree(run / "checkpoints" / "step-000004")
    vcdeft(*words, "--resume")
    resumed = load_file(run / "adapter" / WEIGHTS)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
    vcdeft("export", run, "--format", "merged", "--output", tmp_path / "merged")
    assert list((tmp_path / "merged").glob("*.safetensors"))


def vcdeft(*words: object) -> None:
    """Run a command as one of one process, as torchrun would start it."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    group = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_PORT": port}
    if words[0] != "train":
        group = {}
    place = {"MASTER_ADDR": "localhost", **{name: str(value) for name, value in group.items()}}
    script = Path(__file__).with_name("tiny_unet_command.py")
    command = [sys.executable, str(script), *map(str, words)]
    environment = {**os.environ, **(place if group else {})}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
