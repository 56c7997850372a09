"""Where DeepSpeed and ninja are not installed, all but training works, and training says so."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[1]
WITHOUT = """
import importlib
import pkgutil
import sys


class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, *more):
        missing = name.partition(".")[0] in ("deepspeed", "ninja")
        return None if missing else self.finder.find_spec(name, *more)

    def __getattr__(self, name):
        return getattr(self.finder, name)


sys.meta_path[:] = map(Without, sys.meta_path)
"""
IMPORTS = """
import visualcloze_deft

for module in pkgutil.walk_packages(visualcloze_deft.__path__, "visualcloze_deft."):
    if module.name == "visualcloze_deft.__main__":
        continue
    try:
        importlib.import_module(module.name)
    except ModuleNotFoundError as error:
        print(module.name, error.name)
"""
COMMANDS = """
from visualcloze_deft.cli import main

for line in open("commands.txt"):
    try:
        main(line.split())
    except SystemExit as ended:
        print("status", ended.code, line, file=sys.stderr)
"""


def python(program: str, folder: Path) -> subprocess.CompletedProcess[str]:
    places = filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
    return subprocess.run(
        [sys.executable, "-c", WITHOUT + program],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(places)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_only_modules_of_training_need_deepspeed(tmp_path: Path) -> None:
    done = python(IMPORTS, tmp_path)
    assert done.returncode == 0, done.stderr
    need = [line.split() for line in done.stdout.splitlines()]
    assert {missing for _, missing in need} == {"deepspeed"}
    assert all(name.startswith("visualcloze_deft.training.") for name, _ in need)


def test_all_but_training_runs_without_deepspeed(tmp_path: Path) -> None:
    for role, colour in (("depth", "gray"), ("target", "red")):
        (tmp_path / "photos" / role).mkdir(parents=True)
        for k in range(2):
            Image.new("RGB", (32, 32), colour).save(tmp_path / "photos" / role / f"{k}.png")
    commands = (
        "tasks list",
        "data check folder=photos --workers 0",
        "tasks example depth-to-image --data folder=photos --resolution 32 --output grids",
        "infer --examples grids --model tiny --inference-steps 1 --output made",
        "train --data folder=photos --tasks depth-to-image --output run",
    )
    (tmp_path / "commands.txt").write_text("\n".join(commands))
    done = python(COMMANDS, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "depth-to-image" in done.stdout
    assert list((tmp_path / "made").glob("*.png"))
    said = [line for line in done.stderr.splitlines() if line.startswith(("vcdeft:", "status"))]
    assert said == [
        "vcdeft: training needs DeepSpeed, which is not installed; "
        "pip install 'deepspeed>=0.19.8,<0.20' ninja",
        f"status 2 {commands[-1]}",
    ]
    assert not (tmp_path / "run").exists()
