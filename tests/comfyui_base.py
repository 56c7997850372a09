"""A base directory of ComfyUI with a model, adapters, a task and the pictures of the workflows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from comfyui_host import PACK
from PIL import Image

from visualcloze_deft.adapters import files, injection
from visualcloze_deft.backbones.flux_fill.loading import load_models
from visualcloze_deft.backbones.peft_files import WEIGHTS
from visualcloze_deft.config.run_settings import Adapter

WORKFLOWS = {path.stem: path for path in PACK.glob("api_workflows/*.json")}
WIDE = "wide.png"
TASK = """summary = "Night."
group = "light"
content = ""
instruction = "From the {day} to the {target}."
[columns]
day = "street by day"
target = "street by night"
"""


def workflow(name: str) -> dict[str, Any]:
    """A shipped workflow in API format."""
    found: dict[str, Any] = json.loads(WORKFLOWS[name].read_text())
    return found


def write_base(folder: Path, model: Path) -> Path:
    models = folder / "models"
    for number, name in enumerate(("mine", "other")):
        random_adapter(model, models / "vcdeft_adapters" / name, Adapter(rank=2), seed=number)
    for name in ("diffusers", "loras", "vcdeft_tasks"):
        (models / name).mkdir()
    random_adapter(model, folder / "third", Adapter(method="lora", rank=2), seed=2)
    (folder / "third" / WEIGHTS).rename(models / "loras" / "third.safetensors")
    (models / "diffusers" / "micro").symlink_to(model)
    (models / "vcdeft_tasks" / "day-to-night.toml").write_text(TASK)
    write_pictures(folder / "input")
    return folder


def random_adapter(model: Path, folder: Path, how: Adapter, *, seed: int) -> None:
    transformer = load_models(str(model)).transformer
    injection.attach(transformer, how, seed=seed)
    random = torch.Generator().manual_seed(seed)
    for parameter in injection.trainable(transformer).values():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=random)
    folder.mkdir(parents=True)
    files.save(transformer, folder, base="micro")


def write_pictures(folder: Path) -> None:
    folder.mkdir()
    random = np.random.default_rng(0)
    graphs = [workflow(name).values() for name in WORKFLOWS]
    kinds = [node for nodes in graphs for node in nodes if node["class_type"] == "LoadImage"]
    for name in [*(node["inputs"]["image"] for node in kinds), WIDE]:
        pixels = random.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((64, 32) if name == WIDE else (48, 48)).save(folder / name)
