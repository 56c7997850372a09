"""How long whole commands take, from the start of the process to its end:

    python scripts/bench_start.py [--tree FOLDER]... [--repeats 5]

The help, a list of tasks, one image and one training step, all on the built-in model. Each --tree
is a checkout. The trees take turns, and the medians are printed: seconds that pass, and seconds
of the processors.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
COMMANDS = {
    "--help": "--help",
    "tasks list": "tasks list",
    "infer, 1 step": "infer --examples grids --inference-steps 1 --output made-{k}",
    "train, 1 step": (
        "train --tasks depth-to-image --steps 1 --batch 1 --processes 1 --output run-{k} "
        "--set logging.trackers=[]"
    ),
}


def timed(tree: Path, words: str, folder: Path) -> tuple[float, float]:
    """Seconds, and seconds of the processors, that `vcdeft WORDS` of a tree takes in `folder`."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "visualcloze_deft", *words.split()],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(tree)},
        capture_output=True,
        text=True,
        check=False,
    )
    passed = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(f"{tree}: vcdeft {words}\n{done.stderr[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return passed, used


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tree", type=Path, action="append", default=[])
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    trees = [tree.resolve() for tree in options.tree or [ROOT]]
    print("| command | tree | seconds | of the processors |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        timed(trees[0], "tasks example depth-to-image --count 1 --output grids", folder)
        for command, words in COMMANDS.items():
            found: dict[Path, list[tuple[float, float]]] = {tree: [] for tree in trees}
            for repeat in range(options.repeats):
                for at, tree in enumerate(trees):
                    asked = words.format(k=f"{repeat}-{at}")
                    found[tree].append(timed(tree, asked, folder))
            for tree, times in found.items():
                wall, used = (statistics.median(each) for each in zip(*times, strict=True))
                print(f"| {command} | {tree.name} | {wall:.2f} | {used:.2f} |", flush=True)


if __name__ == "__main__":
    main()
