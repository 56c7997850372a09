"""How fast grids are drawn, sources opened, and how evenly tokens are dealt:

    python scripts/bench_data.py --data folder=PATH [--data ...]

1. One process: grids of 3 x 3 cells drawn by the mixture and joined to strips, against the floor, a
   loop that only decodes the same pictures and resizes them to cells. Both take turns; medians of
   rounds. Then where the time goes.
2. Tables of 20,000 and 200,000 made rows, each opened twice in a process of its own: seconds and
   memory, at its peak (mapped pages of files included) and what is held in the end.
3. How long eight processes wait for the one with most tokens, all tasks mixed.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import pstats
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import datasets
import torch
from PIL import Image

from visualcloze_deft.config.run_settings import Recipe
from visualcloze_deft.data.mixture import Mixture
from visualcloze_deft.data.sources import open_source
from visualcloze_deft.grids import grid
from visualcloze_deft.grids.cell_sizes import cell_size
from visualcloze_deft.task_registry.files import load_tasks
from visualcloze_deft.task_registry.select import select
from visualcloze_deft.training.batch_schedule import BatchSchedule


def seconds(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def time_grids(options: argparse.Namespace) -> None:
    sources = [open_source(spec, size=options.resolution, seed=0) for spec in options.data]
    known = load_tasks()
    tasks = {name: known[name] for name in select(known, options.tasks)}
    recipe = Recipe(examples=(0, 0, 1))  # three rows
    mixture = Mixture(tasks, sources, seed=0, resolution=options.resolution, recipe=recipe)
    items = {item.key: item for s in sources for item in map(s.item, range(len(s)))}
    first = 0

    def drawn() -> None:
        for index in range(first, first + options.grids):
            example = mixture[index]
            grid.join(example.complete, hidden=example.hidden)

    def floor() -> None:
        for index in range(first, first + options.grids):
            keys, task = wanted[index]
            for key in keys:
                for role in tasks[task].roles:
                    if role in items[key].images:
                        image = items[key].image(role)
                        grid.fitted(image, cell_size(image.size, options.resolution))

    spent: dict[str, list[float]] = {"drawn": [], "floor": []}
    for number in range(options.rounds + 1):
        first = number * options.grids
        span = range(first, first + options.grids)
        wanted = {k: (e.keys, e.task) for k, e in ((k, mixture[k]) for k in span)}
        for name, work in (("drawn", drawn), ("floor", floor)):
            took = seconds(work)
            if number:
                spent[name].append(took)
    drawn_s, floor_s = (statistics.median(spent[name]) / options.grids for name in spent)
    ratio = statistics.median(d / f for d, f in zip(*spent.values(), strict=True))
    cells = len(next(iter(tasks.values())).roles)
    print(f"{cells} columns, 3 rows, {options.resolution} px, one core: {1 / drawn_s:.1f} grids/s")
    print(f"decoding and resizing the same pictures: {1 / floor_s:.1f} grids/s")
    print(f"drawn / floor: {ratio:.2f}, median of {options.rounds} rounds")
    profile = cProfile.Profile()
    profile.runcall(drawn)
    pstats.Stats(profile).sort_stats("tottime").print_stats(12)


OPEN = r"""
import re, sys, time
from pathlib import Path
from visualcloze_deft.data.sources import folder, graph200k, graph200k_hub  # noqa: F401
from visualcloze_deft.data.sources import open_source
def now(what):
    found = re.search(what + r":\s+(\d+)", Path("/proc/self/status").read_text())
    return int(found[1]) / 1024
peak, held = now("VmHWM"), now("RssAnon")
start = time.perf_counter()
source = open_source(sys.argv[1], size=384, seed=0, cache=Path(sys.argv[2]))
source.kinds, source.item(len(source) - 1).image("target")
took = time.perf_counter() - start
peak, held = now("VmHWM") - peak, now("RssAnon") - held
print(f"{len(source):9,} items {took:6.2f} s, {peak:4.0f} MiB at most, {held:4.0f} MiB kept")
"""


KINDS = (("folder", "{}.jsonl"), ("graph200k", "data{}.json"), ("graph200k", "table{}"))


def time_opening(folder: Path, counts: tuple[int, ...]) -> None:
    Image.new("RGB", (64, 64), "teal").save(folder / "a.png")
    names = {"target": "a.png", "depth": "a.png", "canny": "a.png"}
    for count in counts:
        caption = "a teal square on nothing, number"
        with (folder / f"{count}.jsonl").open("w") as file:
            file.writelines(
                json.dumps({**names, "caption": f"{caption} {k}"}) + "\n" for k in range(count)
            )
        rows = [
            {
                "quality_assessment": {"objectConsistency": 4},
                "description": {"item": "a square", "description_0": f"{caption} {k}"},
                "condition": names,
            }
            for k in range(count)
        ]
        (folder / f"data{count}.json").write_text(json.dumps(rows))
        del rows
        write_parquet(folder / f"table{count}", (folder / "a.png").read_bytes(), count)
    for kind, name in KINDS:
        for time_of in ("first", "again"):
            for count in counts:
                spec = f"{kind}={folder / name.format(count)}"
                command = [sys.executable, "-c", OPEN, spec, str(folder / "index")]
                places = {**os.environ, "HF_DATASETS_CACHE": str(folder / "datasets")}
                done = subprocess.run(
                    command, capture_output=True, text=True, check=True, env=places
                )
                print(f"{kind + ' ' + name.format('N'):22} {time_of}: {done.stdout.strip()}")


def write_parquet(folder: Path, picture: bytes, count: int) -> None:
    folder.mkdir()
    cells = [{"bytes": picture, "path": None}] * count
    table = datasets.Dataset.from_dict(
        {
            "target": cells,
            "depth": cells,
            "reference": cells,
            "description": [
                {"item": "A square.", "description_0": f"Teal, {k}."} for k in range(count)
            ],
            "quality_assessment": [{"objectConsistency": k % 6} for k in range(count)],
        }
    )
    datasets.disable_progress_bars()
    table.to_parquet(folder / "train-00000-of-00001.parquet")


def deal(resolution: int, budget: int, steps: int) -> None:
    tasks = load_tasks()
    widest = max(len(task.roles) for task in tasks.values())
    scenes = open_source("scenes", size=64, seed=0)
    mixture = Mixture(
        {name: t for name, t in tasks.items() if set(t.roles) <= scenes.roles},
        [scenes],
        seed=0,
        resolution=resolution,
    )
    plan = BatchSchedule(world=8, accumulate=1, batch=1, budget=budget, tokens_of=mixture.tokens)
    found = list(islice(plan.steps(0), steps))
    counted = BatchSchedule(world=8, accumulate=1, batch=1, budget=0, tokens_of=mixture.tokens)
    waits = []
    for step in islice(counted.steps(0), steps):
        sizes = [sum(map(mixture.tokens, part)) for part in step.parts]
        waits.append(1 - sum(sizes) / (len(sizes) * max(sizes)))
    grids = [step.examples / len(step.parts) for step in found]
    print(f"{len(mixture.tasks)} tasks of up to {widest} columns at {resolution} px, 8 processes")
    print(f"one grid each: {statistics.mean(waits):.1%} of the time is waiting")
    print(
        f"up to {budget} tokens each ({min(grids):.1f} to {max(grids):.1f} grids): "
        f"{statistics.mean(step.idle for step in found):.1%}; padding: none, grids of one shape "
        "share a call"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", action="append", required=True, metavar="NAME=PATH")
    parser.add_argument("--tasks", default="restoration-with-reference")
    parser.add_argument("--resolution", type=int, default=384)
    parser.add_argument("--grids", type=int, default=24, help="a round")
    parser.add_argument("--rounds", type=int, default=5, help="after one to warm up")
    parser.add_argument("--rows", type=int, default=200_000, help="of the larger made table")
    parser.add_argument("--tokens", type=int, default=20_000, help="a process and step")
    options = parser.parse_args()
    torch.set_num_threads(1)
    time_grids(options)
    with tempfile.TemporaryDirectory() as folder:
        time_opening(Path(folder), (options.rows // 10, options.rows))
    deal(options.resolution, options.tokens, steps=100)


if __name__ == "__main__":
    main()
