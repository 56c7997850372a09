"""How fast grids are drawn: python scripts/bench_data.py --data folder=PATH [--data ...]

One process: grids of 3 x 3 cells drawn by the mixture and built to strips, against the floor, a
loop that only decodes the same pictures and resizes them to cells. Both take turns; medians of
rounds. Then where the time goes.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import statistics
import time
from collections.abc import Callable

import torch

from visualcloze_deft import grid
from visualcloze_deft.data.mixture import Mixture
from visualcloze_deft.data.sources import open_source
from visualcloze_deft.registry import load_tasks, select
from visualcloze_deft.settings import Recipe


def seconds(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", action="append", required=True, metavar="NAME=PATH")
    parser.add_argument("--tasks", default="restoration-with-reference")
    parser.add_argument("--resolution", type=int, default=384)
    parser.add_argument("--grids", type=int, default=24, help="a round")
    parser.add_argument("--rounds", type=int, default=5, help="after one to warm up")
    options = parser.parse_args()
    torch.set_num_threads(1)
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
            grid.build(example.rows, resolution=options.resolution, hidden=example.hidden)

    def floor() -> None:
        for index in range(first, first + options.grids):
            keys, task = wanted[index]
            for key in keys:
                for role in tasks[task].roles:
                    if role in items[key].images:
                        image = items[key].image(role)
                        grid.fitted(image, grid.cell_size(image.size, options.resolution))

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
    cells = len(next(iter(tasks.values())).roles)
    print(f"{cells} columns, 3 rows, {options.resolution} px, one core: {1 / drawn_s:.1f} grids/s")
    print(f"decoding and resizing the same pictures: {1 / floor_s:.1f} grids/s")
    print(f"drawn / floor: {drawn_s / floor_s:.2f}")
    profile = cProfile.Profile()
    profile.runcall(drawn)
    pstats.Stats(profile).sort_stats("tottime").print_stats(12)


if __name__ == "__main__":
    main()
