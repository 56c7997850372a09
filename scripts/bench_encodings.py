"""When kept encodings pay:

    OMP_NUM_THREADS=1 python scripts/bench_encodings.py --data graph200k=PATH

1. What one entry takes on disk and to look up at FLUX.1-Fill's sizes in bfloat16.
2. A training step of the embedded base at its own resolution, in this process: encoding always,
   into an empty folder, out of a full one. The three take turns.
3. Which share of what training asks for has been asked for before, epoch by epoch (an epoch: as
   many examples as there are items), by how grids are drawn.

Times are medians of rounds, in seconds of the processor, which others on the machine change less
than those of the clock; they leave out waiting for a disk.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch

from visualcloze_deft.adapters import injection
from visualcloze_deft.backbones.embedding_cache import Encodings, digest, entries
from visualcloze_deft.backbones.flux_fill.loading import load_models
from visualcloze_deft.backbones.flux_fill.model import Models
from visualcloze_deft.config.run_settings import Run, load_run
from visualcloze_deft.sampling.encoding import PixelExample, encode
from visualcloze_deft.training import run_data
from visualcloze_deft.training.datasets import PixelDataset
from visualcloze_deft.training.objective import GridLoss

DRAWN = {
    "depth-to-image": ["data.tasks=depth-to-image"],
    "depth-to-image, its usual words": [
        "data.tasks=depth-to-image",
        "data.recipe.paraphrase=0",
    ],
    "all tasks": ["data.tasks=all"],
    "all tasks, their usual words": ["data.tasks=all", "data.recipe.paraphrase=0"],
}
ENDS = (1, 2, 5, 10, 20)  # of spans of epochs
AT_FLUX = {
    "a strip of three 384 px cells": (torch.zeros(3, 384, 1152), torch.zeros(16, 48, 144)),
    "a text by T5": (torch.zeros(512).long(), torch.zeros(512, 4096)),
    "a text by CLIP": (torch.zeros(77).long(), torch.zeros(768)),
}


def examples(run: Run, count: int) -> list[PixelExample]:
    draws = PixelDataset(run_data.mixture_of(run))
    return [one for one in map(draws.__getitem__, range(count)) if isinstance(one, PixelExample)]


def strips_of(drawn: PixelExample) -> Iterator[bytes]:
    """What the VAE is given of an example, see `encoding.encode_grids`."""
    for strip, shown, hidden in zip(
        drawn.grid.strips, drawn.grid.seen, drawn.grid.hidden, strict=True
    ):
        yield digest("", shown)
        if hidden.any():
            yield digest("", strip)


def show_hits(run_of: Callable[[list[str]], Run]) -> None:
    print("\n| drawn | epochs | strips found | texts found |\n|---|---|---|---|")
    for name, settings in DRAWN.items():
        run = run_of(settings)
        items = sum(map(len, run_data.mixture_of(run).sources))
        asked = [
            {"strips": list(strips_of(one)), "texts": [str(one.prompt)]}
            for one in examples(run, ENDS[-1] * items)
        ]
        before: set[bytes | str] = set()
        for first, end in pairwise((0, *ENDS)):
            shares = []
            for kind in ("strips", "texts"):
                keys = [key for one in asked[first * items : end * items] for key in one[kind]]
                new = set(keys) - before
                before |= new
                shares.append(f"{1 - len(new) / len(keys):.0%}")
            span = f"{first + 1} to {end}" if end > first + 1 else str(end)
            print(f"| {name} | {span} | {' | '.join(shares)} |", flush=True)


def show_steps(run: Run, *, rounds: int, folder: Path) -> None:
    plain = load_models(run.model)
    injection.attach(plain.transformer, run.adapter, seed=0)
    loss_of = GridLoss(plain.transformer, context_weight=1, guidance=1.0)
    optimiser = torch.optim.AdamW(injection.trainable(plain.transformer).values(), lr=0.0)

    def step(models: Models, drawn: list[PixelExample]) -> tuple[float, float]:
        """Seconds until all is encoded, and until the step is taken."""
        began = time.process_time()
        groups = encode(models, drawn, seed=0)
        encoded = time.process_time()
        loss_of(groups).mean().backward()
        optimiser.step()
        optimiser.zero_grad()
        return encoded - began, time.process_time() - began

    empty = Encodings(folder / "empty")
    cold, warm = (
        replace(plain, encodings=empty),
        replace(plain, encodings=Encodings(folder / "full")),
    )
    all_drawn = examples(run, run.batch * rounds)
    batches = [all_drawn[k : k + run.batch] for k in range(0, len(all_drawn), run.batch)]
    for drawn in batches:
        encode(warm, drawn, seed=0)
    cold.encode_text([""])  # fingerprints are taken once, and not in a step
    cold.encode_pixels(torch.zeros(1, 3, 64, 64))
    ways = {"none": plain, "empty": cold, "full": warm}
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for k, drawn in enumerate(batches):
        for name in [*ways][k % 3 :] + [*ways][: k % 3]:
            taken[name].append(step(ways[name], drawn))
    print(f"\n{rounds} rounds of {run.batch} examples; empty folder: {empty.used}\n")
    print("| folder | encoding, s | whole step, s |\n|---|---|---|")
    for name, found in taken.items():
        encoding, whole = (statistics.median(column) for column in zip(*found, strict=True))
        print(f"| {name} | {encoding:.3f} | {whole:.3f} |")


def show_sizes(folder: Path, *, rounds: int) -> None:
    print("| entry | bytes | key, ms | reading, ms |\n|---|---|---|---|")
    for name, (given, encoding) in AT_FLUX.items():
        given = given.bfloat16() if given.is_floating_point() else given
        key = digest("", given).hex()
        encodings = Encodings(folder / name)
        encodings.write(key, encoding.bfloat16())
        (path,) = entries(encodings.folder)
        spent = []
        for _ in range(rounds):
            began = time.process_time()
            digest("", given)
            keyed = time.process_time()
            encodings.read(key)
            spent.append((keyed - began, time.process_time() - keyed))
        keying, reading = (statistics.median(column) * 1e3 for column in zip(*spent, strict=True))
        print(f"| {name} | {path.stat().st_size:,} | {keying:.1f} | {reading:.1f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, action="append", metavar="NAME=PATH")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    sources = "data.sources=" + str(options.data).replace("'", '"')

    def run_of(settings: list[str]) -> Run:
        return load_run(None, [sources, f"batch={options.batch}", *settings])

    with tempfile.TemporaryDirectory() as folder:
        show_sizes(Path(folder), rounds=options.rounds)
        show_steps(run_of(["data.tasks=all"]), rounds=options.rounds, folder=Path(folder))
        show_hits(run_of)


if __name__ == "__main__":
    main()
