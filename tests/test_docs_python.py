"""The Python that README, docs and notebook print, run as it stands on the embedded base.

Only the name of a model on the hub is replaced. The files that a block reads are made before it.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hub_server import hub_server, use
from PIL import Image
from processes import run

from visualcloze_deft import InContextPipeline
from visualcloze_deft.adapters import export, files, injection
from visualcloze_deft.backbones.flux_fill.loading import load_models
from visualcloze_deft.cli import main
from visualcloze_deft.config.run_settings import Adapter
from visualcloze_deft.data.sources.scenes import Scenes
from visualcloze_deft.paths import BASE

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^#+ (.*?)$|^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
NOTEBOOK = ROOT / "docs" / "notebooks" / "first-steps.ipynb"
ON_HUB = "black-forest-labs/FLUX.1-Fill-dev"
SHORT = "--batch 1 --processes 1 --set sample_grids=0 --set logging.trackers=[]"


def blocks() -> dict[str, str]:
    """Each block of Python, by its page, the heading above it and its number there."""
    found: dict[str, str] = {}
    for page in PAGES:
        heading = ""
        for title, code in BLOCK.findall(page.read_text(encoding="utf-8")):
            heading = title or heading
            if code:
                name = f"{page.stem}: {heading}"
                found[f"{name} ({sum(known.startswith(name) for known in found)})"] = code
    return found


def differences(one: Image.Image, other: Image.Image) -> np.ndarray:
    assert one.size == other.size
    return np.abs(np.asarray(one).astype(int) - np.asarray(other))


def write_adapter(folder: Path, *, seed: int, context: str = "full") -> None:
    """A run folder with a DEFT adapter that changes much."""
    transformer = load_models("tiny").transformer
    injection.attach(transformer, Adapter(rank=3), seed=0)
    draw = torch.Generator().manual_seed(seed)
    for parameter in injection.trainable(transformer).values():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=draw)
    (folder / "adapter").mkdir(parents=True)
    files.save(transformer, folder / "adapter", base="tiny", metadata={"context": context})


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the docs name: runs, a LoRA, pictures, a grid, a pipeline."""
    folder = tmp_path_factory.mktemp("desk")
    for seed, name in enumerate(("mine", "demo", "pairs", "a", "b", "c")):
        write_adapter(folder / "runs" / name, seed=seed)
    write_adapter(folder / "runs" / "relight", seed=6, context="causal")
    export.export(folder / "runs" / "mine", folder / "my-lora.safetensors", "diffusers")
    (folder / "loras").mkdir()
    shutil.copy(folder / "my-lora.safetensors", folder / "loras" / "cups.safetensors")
    for number in (1, 2):
        item = Scenes(size=64, seed=5).item(number)
        item.image("depth").resize((64, 48)).save(folder / f"mug{number}_depth.png")
        item.image("target").resize((64, 48)).save(folder / f"mug{number}.png")
    rows = [["mug1_depth.png", "mug1.png"], ["mug2_depth.png", None]]
    (folder / "grid.json").write_text(json.dumps({"task": "depth-to-image", "rows": rows}))
    InContextPipeline.from_pretrained("tiny").save_pretrained(folder / "saved")
    return folder


def given() -> dict[str, Any]:
    """What a block finds under the names that it does not define."""
    found: dict[str, Any] = {"InContextPipeline": InContextPipeline}
    for name in ("depth1", "photo1", "depth2"):
        found[name] = Image.effect_noise((64, 48), 90).convert("RGB")
    return found


@pytest.mark.parametrize("name", blocks())
def test_a_block_of_python_runs_as_it_is_printed(
    desk: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(desk)
    names = given()
    with hub_server() as hub:
        use(hub, monkeypatch)
        exec(blocks()[name].replace(ON_HUB, str(BASE)), names)
    if "there" in names:  # made by diffusers, and by us with the adapter
        check_equal(names)


def check_equal(names: dict[str, Any]) -> None:
    assert differences(names["here"], names["there"]).max() <= 1
    names["ours"].unload_lora_weights()  # and the adapter counts
    without = names["ours"](rows=names["rows"], **names["told"], known_latents="sample")[0]
    assert differences(names["there"], without).max() > 10


def test_the_pages_with_python_are_known() -> None:
    assert {name.partition(":")[0] for name in blocks()} == {
        "README",
        "adapters",
        "context-cache",
        "inference",
        "publish",
    }
    assert any(name.startswith("adapters: The same picture in diffusers") for name in blocks())


# ---- the notebook


def cells() -> list[str]:
    """The code of the notebook's cells."""
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    found = notebook["cells"]
    return ["".join(cell["source"]) for cell in found if cell["cell_type"] == "code"]


def command(line: str) -> None:
    """What IPython does with a line that begins with an exclamation mark."""
    program, *words = shlex.split(line)
    assert program == "vcdeft"
    if words[0] == "train":
        steps, output = words.index("--steps") + 1, words.index("--output") + 1
        words[steps] = "2"
        words[output] = str(Path(words[output]).absolute())  # the process starts elsewhere
        run([*words, *shlex.split(SHORT)], processes=1)
    else:
        main(words)


@pytest.mark.scripts
def test_the_notebook_runs_from_the_first_cell_to_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for the install, and with a shorter training."""
    monkeypatch.chdir(tmp_path)
    install, *others = cells()
    assert install == "%pip install --quiet visualcloze-deft"
    assert len(others) == 9
    names: dict[str, Any] = {"command": command}
    for code in others:
        exec(re.sub(r"^!(.*)$", r"command('\1')", code, flags=re.M), names)
    assert differences(names["here"], names["there"]).max() <= 1
    assert names["pipe"].get_active_adapters() == []


def test_the_notebook_is_small_and_names_no_machine() -> None:
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert len(text) < 50_000
    assert json.loads(text)["nbformat"] == 4
    assert not re.search(r"/(home|root|tmp|work|Users)/", text)
