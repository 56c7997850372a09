"""The Python that the docs print, run as it stands but for the names of files and models."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from visualcloze_deft.adapters import export, files, injection
from visualcloze_deft.backbones.flux_fill.loading import load_models
from visualcloze_deft.config.run_settings import Adapter
from visualcloze_deft.data.sources.scenes import Scenes

DOCS = Path(__file__).parents[1] / "docs"


def snippet(page: str, heading: str) -> str:
    """The first block of Python below a heading of a page."""
    text = (DOCS / page).read_text(encoding="utf-8")
    below = text[text.index(f"# {heading}\n") :]
    found = re.search(r"```python\n(.*?)```", below, flags=re.DOTALL)
    assert found is not None
    return found[1]


def differences(one: Image.Image, other: Image.Image) -> np.ndarray:
    assert one.size == other.size
    return np.abs(np.asarray(one).astype(int) - np.asarray(other))


@pytest.fixture
def trained(micro_model: Path, tmp_path: Path) -> Path:
    """A run folder with a DEFT adapter that changes much, and its export beside it."""
    transformer = load_models(str(micro_model)).transformer
    injection.attach(transformer, Adapter(rank=3), seed=0)
    torch.manual_seed(1)
    for parameter in injection.trainable(transformer).values():
        parameter.data += 0.2 * torch.randn_like(parameter)
    folder = tmp_path / "runs" / "mine" / "adapter"
    folder.mkdir(parents=True)
    files.save(transformer, folder, base=str(micro_model))
    export.export(folder.parent, tmp_path / "my-lora.safetensors", "diffusers", verify=False)
    return tmp_path


def test_an_exported_lora_gives_the_same_picture_in_diffusers(
    micro_model: Path, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(trained)
    for number in (1, 2):
        item = Scenes(size=64, seed=5).item(number)
        item.image("depth").resize((64, 48)).save(f"mug{number}_depth.png")
        item.image("target").resize((64, 48)).save(f"mug{number}.png")
    code = snippet("adapters.md", "The same picture in diffusers")
    names: dict[str, Any] = {}
    exec(code.replace("black-forest-labs/FLUX.1-Fill-dev", str(micro_model)), names)
    assert differences(names["here"], names["there"]).max() <= 1
    names["ours"].unload_lora_weights()  # and the adapter counts
    without = names["ours"](
        rows=names["rows"], **names["told"], seed=0, known_latents="sample", num_inference_steps=30
    )[0]
    assert differences(names["there"], without).max() > 10
