"""The wheel holds tasks, configs and the base, and finds them from anywhere."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

from visualcloze_deft.task_registry.files import load_tasks

ROOT = Path(__file__).parents[1]


def test_images_are_built_from_all_that_the_wheel_holds() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    about = project["project"]
    needed = {*wheel["packages"], *wheel["force-include"], about["readme"], *about["license-files"]}
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    kept = {line[1:] for line in lines if line.startswith("!")}
    assert kept == needed | {"pyproject.toml"}


def test_a_wheel_used_from_another_folder_finds_what_it_ships(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "-w", str(tmp_path), str(ROOT)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    place = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(place)]
    subprocess.run([*install, str(wheel)], check=True, capture_output=True)
    script = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import visualcloze_deft; assert visualcloze_deft.__file__.startswith(sys.argv[1])\n"
        "from visualcloze_deft.task_registry.files import load_tasks\n"
        "from visualcloze_deft.config.run_settings import load_run\n"
        "from visualcloze_deft.backbones.flux_fill.files import check_folder, resolution_of\n"
        "from PIL import Image\n"
        "check_folder('tiny')\n"
        "pipe = visualcloze_deft.InContextPipeline.from_pretrained('tiny')\n"
        "rows = [[Image.new('RGB', (64, 64)), None]]\n"
        "images = pipe(rows=rows, task='novel-view', num_inference_steps=1)\n"
        "assert images[0].size == (128, 128)\n"
        "print(len(load_tasks()), load_run('flux-8gpu').processes, resolution_of('tiny'))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(place)],
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
    )
    tasks, processes, resolution = done.stdout.split()
    assert int(tasks) == len(load_tasks())
    assert (processes, resolution) == ("8", "128")
