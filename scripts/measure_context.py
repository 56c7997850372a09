"""What docs/context-cache.md says of quality: python scripts/measure_context.py

The embedded base answers the same held-out grids of the eleven families: with all computed in every
step, with the context cache, and with diffusers' step caches. Prints, and writes into --output and
between the marks of --report, PSNR to the truth and to the image without a cache, and the share of
time, which is of one grid at a time. --adapter: instead of the base alone, with the context
that it was trained with.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from evaluate_scenes import examples_of
from PIL import Image

from visualcloze_deft.data.example import Example
from visualcloze_deft.evaluation.metrics.fidelity import psnr
from visualcloze_deft.evaluation.suite_queries import GridSettings
from visualcloze_deft.grids import grid
from visualcloze_deft.inference import acceleration
from visualcloze_deft.inference.pipeline import InContextPipeline
from visualcloze_deft.sampling.context import Context
from visualcloze_deft.sampling.denoising import generate
from visualcloze_deft.sampling.examples import truths_of
from visualcloze_deft.storage.atomic import write_text

FULL_STEPS = (1, 2, 3, 6)
CACHES = ("first-block=0.05", "first-block=0.1", "first-block=0.2", "taylorseer=3")
NONE = "none"
APART = 1_000_003  # between the seeds of one grid
MARKS = "<!-- context:begin -->\n", "<!-- context:end -->"


@dataclass(frozen=True, kw_only=True)
class Answers:
    """Of one way: the images of every family's grids, and the seconds of each."""

    images: Mapping[str, Sequence[Image.Image]]
    seconds: Sequence[float]


def ways(pipe: InContextPipeline, steps: int) -> dict[str, Callable[[], object]]:
    """Name -> a context in which the pipeline works so, which gives a `Context`."""
    return {
        NONE: lambda: using(pipe),
        **{
            f"context cache, {full} full": lambda full=full: using(pipe, full_steps=full)
            for full in FULL_STEPS
            if full < steps
        },
        **{name: lambda name=name: using(pipe, cache=name) for name in CACHES},
    }


@contextmanager
def using(
    pipe: InContextPipeline, *, full_steps: int | None = None, cache: str | None = None
) -> Iterator[Context]:
    if cache:
        pipe.transformer.enable_cache(acceleration.cache_settings(cache))
    if full_steps:
        pipe.enable_context_cache(full_steps)
    try:
        yield pipe.context
    finally:
        pipe.disable_context_cache()
        if cache:
            pipe.transformer.disable_cache()


def answered(
    pipe: InContextPipeline,
    asked: Mapping[str, Sequence[Example]],
    context: Context,
    options: argparse.Namespace,
) -> Answers:
    images: dict[str, list[Image.Image]] = {}
    seconds = []
    models = pipe.models
    for name, examples in asked.items():
        for example in examples:
            built = grid.join(example.complete, hidden=example.hidden)
            for seed in range(options.seeds):
                began = time.perf_counter()
                made = generate(
                    models,
                    [built],
                    [example.prompt],
                    seeds=[example.index + seed * APART],
                    steps=options.steps,
                    context=context,
                )
                seconds.append(time.perf_counter() - began)
                images.setdefault(name, []).append(made[0][0])
    return Answers(images=images, seconds=seconds)


def table(
    found: Mapping[str, Answers], asked: Mapping[str, Sequence[Example]], seeds: int
) -> list[str]:
    """A row for each way: the share of time, PSNR to the images without a cache, and in every
    family PSNR to the truth."""
    families = list(asked)
    plain = found[NONE]
    lines = [
        f"| way | time | to uncached | {' | '.join(families)} | mean |",
        f"|---|---|---|{'---|' * (len(families) + 1)}",
    ]
    for name, own in found.items():
        share = statistics.median(np.divide(own.seconds, plain.seconds))
        same = [
            psnr(a, b)
            for family in families
            for a, b in zip(own.images[family], plain.images[family], strict=True)
        ]
        to_truth = [
            float(
                np.mean(
                    [
                        psnr(image, truths_of(example)[0])
                        for image, example in zip(
                            own.images[f], (e for e in asked[f] for _ in range(seeds)), strict=True
                        )
                    ]
                )
            )
            for f in families
        ]
        uncached = "" if name == NONE else f"{np.median(same):.1f}"
        values = " | ".join(f"{value:.2f}" for value in [*to_truth, float(np.mean(to_truth))])
        lines.append(f"| {name} | {share:.2f} | {uncached} | {values} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--adapter")
    parser.add_argument("--scenes", type=int, default=64, help="grids of each family")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--examples", type=int, default=2, help="rows above the query")
    parser.add_argument(
        "--ways", nargs="*", default=[""], help="only those with such words in their names"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/context"))
    parser.add_argument("--report", type=Path, help="a page with the marks")
    options = parser.parse_args()
    pipe = InContextPipeline.from_pretrained(options.model, adapter=options.adapter)
    making = GridSettings(
        data={},
        limit=options.scenes,
        rows=options.examples + 1,
        resolution=pipe.config.resolution,
    )
    asked, found = examples_of(making), {}
    began = time.monotonic()
    with torch.no_grad():
        for name, way in ways(pipe, options.steps).items():
            if name != NONE and not any(word in name for word in options.ways):
                continue
            with way() as context:
                found[name] = answered(pipe, asked, context, options)
            print(f"{time.monotonic() - began:.0f} s: {name}", flush=True)
    note = (
        f"{options.model}, {options.scenes} held-out grids of each family, {options.seeds} seeds, "
        f"{options.examples} examples, {options.steps} steps. PSNR in dB: to the truth, and the "
        "median to the image without a cache. Time is a share of that without a cache, the median "
        "of grids."
    )
    text = "\n".join([*table(found, asked, options.seeds), "", note, ""])
    print(text)
    options.output.mkdir(parents=True, exist_ok=True)
    name = f"steps-{options.steps}-examples-{options.examples}"
    write_text(options.output / f"{name}.md", text)
    times = {way: own.seconds for way, own in found.items()}
    write_text(options.output / f"{name}.json", json.dumps(times))
    if options.report:
        put_between(options.report, MARKS, text)


def published(
    lines: Sequence[str], note: str, options: argparse.Namespace, marks: tuple[str, str]
) -> None:
    """Print a table with its note, and write it into --output and between `marks` of --report."""
    text = "\n".join([*lines, "", note, ""])
    print(text)
    write_text(options.output / "table.md", text)
    if options.report:
        put_between(options.report, marks, text)


def put_between(page: Path, marks: tuple[str, str], text: str) -> None:
    """Write `text` between two lines of a page."""
    begin, end = marks
    between = re.escape(begin) + ".*?" + re.escape(end)
    old = page.read_text(encoding="utf-8")
    new, count = re.subn(between, lambda _: f"{begin}{text}{end}", old, flags=re.DOTALL)
    if count != 1:
        raise SystemExit(f"{page}: the marks {begin.strip()} and {end} are there {count} times")
    write_text(page, new)


if __name__ == "__main__":
    main()
