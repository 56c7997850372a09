"""The walls between the sub-packages: who may import whom, and that a broken wall is found."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import visualcloze_deft

ROOT = Path(visualcloze_deft.__file__).parents[1]
PACKAGE = ROOT / "visualcloze_deft"
MODULES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))


def linted(where: Path) -> subprocess.CompletedProcess[str]:
    """The contracts of pyproject.toml, held against the package in the folder `where`."""
    script = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    words = [sys.executable, "-c", script, "--config", str(ROOT / "pyproject.toml"), "--no-cache"]
    return subprocess.run(
        words, cwd=where, env={"PYTHONPATH": str(where)}, capture_output=True, text=True
    )


def test_every_import_keeps_to_the_layers() -> None:
    done = linted(ROOT)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("module", "line", "contract"),
    [
        ("storage/hashing.py", "from visualcloze_deft.config import run_settings", "Layers"),
        ("inference/infer.py", "from visualcloze_deft.training import loop", "Layers"),
        ("data/sources/folder.py", "from visualcloze_deft.data.sources import insdet", "Sources"),
        ("data/base.py", "import peft", "peft"),
        (
            "training/loop.py",
            "from visualcloze_deft.backbones.flux_fill import model",
            "FLUX.1-Fill",
        ),
        ("inference/infer.py", "import deepspeed", "DeepSpeed"),
        ("evaluation/report_tables.py", "import matplotlib", "matplotlib"),
        ("training/loop.py", "import click", "click"),
        ("config/run_settings.py", "import torch", "torch"),
    ],
)
def test_a_broken_wall_is_found(tmp_path: Path, module: str, line: str, contract: str) -> None:
    for path in MODULES:
        (tmp_path / "visualcloze_deft" / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(PACKAGE / path, tmp_path / "visualcloze_deft" / path)
    with (tmp_path / "visualcloze_deft" / module).open("a", encoding="utf-8") as file:
        file.write(f"\n{line}\n")
    done = linted(tmp_path)
    assert done.returncode == 1
    broken = [text for text in done.stdout.splitlines() if " BROKEN" in text]
    assert [text for text in broken if contract in text], done.stdout


def test_a_class_of_a_family_has_no_place_elsewhere() -> None:
    line = "from diffusers import FluxTransformer2DModel\n"
    words = [sys.executable, "-m", "ruff", "check", "--select", "TID251", "--no-cache", "-"]
    words += ["--config", str(ROOT / "pyproject.toml"), "--stdin-filename"]
    for module, allowed in (("training/loop.py", False), ("backbones/flux_fill/model.py", True)):
        place = ROOT / "visualcloze_deft" / module
        done = subprocess.run([*words, str(place)], input=line, text=True, capture_output=True)
        assert (done.returncode == 0) == allowed, done.stdout + done.stderr


def test_no_module_is_called_utils() -> None:
    assert [path for path in MODULES if "util" in str(path) or "helper" in str(path)] == []


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["tasks", "list"]])
def test_help_and_listings_import_no_torch(words: list[str]) -> None:
    script = (
        "import sys; from visualcloze_deft.cli import main\n"
        f"try: main({words})\nexcept SystemExit: pass\n"
        "assert 'torch' not in sys.modules and 'diffusers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
