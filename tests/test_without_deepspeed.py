"""Where DeepSpeed and ninja are not installed, all but training works, and training says so."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from visualcloze_deft.training.deepspeed_settings import REQUIREMENT

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
        print("needs", module.name, error.name)
"""
COMMANDS = """
from visualcloze_deft.cli import main

for line in open("commands.txt"):
    try:
        main(line.split())
    except SystemExit as ended:
        print("status", ended.code, line, file=sys.stderr)
"""
RUN = (
    "tasks list",
    "data check folder=photos --workers 0",
    "tasks example depth-to-image --data folder=photos --resolution 32 --output grids",
    "infer --examples grids --model tiny --inference-steps 1 --output made",
)
TRAIN = "train --data folder=photos --tasks depth-to-image --output run"


@dataclass(frozen=True, kw_only=True)
class Done:
    folder: Path
    out: list[str]
    err: list[str]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    """A process without these packages, to its good end."""
    folder = tmp_path_factory.mktemp("without")
    for role, colour in (("depth", "gray"), ("target", "red")):
        (folder / "photos" / role).mkdir(parents=True)
        for k in range(2):
            Image.new("RGB", (32, 32), colour).save(folder / "photos" / role / f"{k}.png")
    (folder / "commands.txt").write_text("\n".join((*RUN, TRAIN)))
    places = filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
    ended = subprocess.run(
        [sys.executable, "-c", WITHOUT + COMMANDS + IMPORTS],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(places)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return Done(folder=folder, out=ended.stdout.splitlines(), err=ended.stderr.splitlines())


def test_the_line_that_is_told_names_what_the_package_asks_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = f"{REQUIREMENT}; sys_platform == 'linux'"
    assert asked in project["dependencies"]


def test_only_modules_of_training_need_deepspeed(done: Done) -> None:
    need = [line.split()[1:] for line in done.out if line.startswith("needs ")]
    assert {missing for _, missing in need} == {"deepspeed"}
    assert all(name.startswith("visualcloze_deft.training.") for name, _ in need)


def test_all_but_training_runs_without_deepspeed(done: Done) -> None:
    assert any(line.split()[:1] == ["depth-to-image"] for line in done.out)
    assert list((done.folder / "made").glob("*.png"))
    said = [line for line in done.err if line.startswith(("vcdeft:", "status"))]
    assert len(said) == 2
    assert said[0].startswith("vcdeft: training needs DeepSpeed, which is not installed; pip inst")
    assert said[1] == f"status 2 {TRAIN}"
    assert not (done.folder / "run").exists()
