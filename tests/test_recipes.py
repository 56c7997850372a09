"""The recipes of the docs run as they are printed, at their smallest, on real photographs.

Each recipe is a block of commands in docs/recipes.md; what they find in the current folder is made
here of the photographs in VCDEFT_DATA. Options that make a command short stand behind it.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_memory import write_flux_settings

ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get("VCDEFT_DATA", "gone"))
BLOCK = re.compile(r"<!-- recipe: ([\w-]+) -->\n```bash\n(.*?)```", re.DOTALL)
SMALL = {
    "train": "--steps 2 --batch 1 --processes 1 --set logging.trackers=[]",
    "infer": "--inference-steps 1",
    "eval": "--inference-steps 1 --limit 1 --encoder none",
}
GOES_ON = {"share": ("pairs", "runs/pairs")}  # recipe -> whose folder it begins with
HUB = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": "hub"}


def recipes(page: str = "recipes") -> dict[str, list[str]]:
    """The commands of each recipe of a page, in its order."""
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    return {
        name: block.replace("\\\n", " ").strip().splitlines() for name, block in BLOCK.findall(text)
    }


def test_every_command_of_readmes_table_stands_in_a_recipe() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = text.partition("<!-- recipes:begin -->")[2].partition("<!-- recipes:end -->")[0]
    shown = re.findall(r"`(vcdeft [^`]+)`", table)
    known = {" ".join(line.split()) for lines in recipes().values() for line in lines}
    assert len(shown) > 8
    assert [line for line in shown if line not in known] == []


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what a user has: pairs, photos of a dog, depth maps, published data, a LoRA."""
    folder = tmp_path_factory.mktemp("desk")
    rows = map(json.loads, (DATA / "pairs" / "manifest.jsonl").read_text().splitlines())
    pairs = [row for row in rows if len(row["images"]) == 2][:10]
    for place, roles in {"pairs": ("before", "after"), "streets": ("day", "night")}.items():
        for k, row in enumerate(pairs):
            for role, image in zip(roles, row["images"], strict=True):
                (folder / place / role).mkdir(parents=True, exist_ok=True)
                shutil.copy(DATA / "pairs" / image, folder / place / role / f"{k:04}.jpg")
            (folder / place / f"{k:04}.txt").write_text(row["prompt"] or "a photo")
    shutil.copytree(DATA / "dreambooth" / "dataset" / "dog", folder / "dog")
    shutil.copytree(DATA / "dreambooth" / "dataset" / "cat", folder / "photos")
    for name in ("graph200k", "insdet"):
        (folder / name).symlink_to(DATA / name)
    for k, path in enumerate(sorted((DATA / "graph200k" / "depth").glob("*.*"))[:6]):
        for role in ("depth", "target"):
            (folder / "rooms" / role).mkdir(parents=True, exist_ok=True)
            shutil.copy(path, folder / "rooms" / role / f"{k:04}{path.suffix}")
    lora = "--tasks deblurring --method lora --rank 4 --output lora"
    vcdeft(folder, "train", *lora.split())
    vcdeft(folder, *"export lora --format diffusers --output my-lora.safetensors".split())
    snapshot = folder / "hub" / "models--black-forest-labs--FLUX.1-Fill-dev"
    (snapshot / "refs").mkdir(parents=True)
    (snapshot / "refs" / "main").write_text("0" * 40)
    write_flux_settings(snapshot / "snapshots" / ("0" * 40))
    return folder


def vcdeft(desk: Path, *words: str) -> None:
    """Run a command in the folder `desk`, at its smallest."""
    places = filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
    command = [*words, *shlex.split(SMALL.get(words[0], ""))]
    done = subprocess.run(
        [sys.executable, "-m", "visualcloze_deft", *command],
        cwd=desk,
        env=os.environ | HUB | {"PYTHONPATH": os.pathsep.join(places)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"


@pytest.mark.scripts
@pytest.mark.skipif(not DATA.is_dir(), reason="needs photographs: VCDEFT_DATA")
@pytest.mark.parametrize("name", recipes())
def test_a_recipe_runs_as_it_is_printed(desk: Path, name: str) -> None:
    before, made = GOES_ON.get(name, ("", "."))
    for line in [*([] if (desk / made).exists() else recipes()[before]), *recipes()[name]]:
        program, command, *words = shlex.split(line, comments=True)
        assert program == "vcdeft"
        vcdeft(desk, command, *words)
