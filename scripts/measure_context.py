"""What docs/context-cache.md says of quality: python scripts/measure_context.py

The embedded base answers the same held-out grids of the eleven families: with all computed in every
step, with the context cache, and with diffusers' step caches. Prints, and writes into --output and
between the marks of --report, PSNR to the truth and to the image without a cache, and the share of
time, which is of one grid at a time. Calls of other --steps and --examples add their tables.
--adapter: instead of the base alone, with the context that it was trained with.
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
from typing import Any

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


def rows_of(
    found: Mapping[str, Answers], asked: Mapping[str, Sequence[Example]], seeds: int
) -> dict[str, dict[str, Any]]:
    """Of each way: the share of time, the median PSNR to the images without a cache, and in every
    family PSNR to the truth."""
    plain = found[NONE]
    rows = {}
    for name, own in found.items():
        pairs = [pair for f in asked for pair in zip(own.images[f], plain.images[f], strict=True)]
        rows[name] = {
            "time": statistics.median(np.divide(own.seconds, plain.seconds)),
            "near": float(np.median([psnr(*pair) for pair in pairs])),
            "truth": {f: to_truth(own.images[f], asked[f], seeds) for f in asked},
        }
    return rows


def to_truth(images: Sequence[Image.Image], examples: Sequence[Example], seeds: int) -> float:
    """Mean PSNR; `seeds` images of each example follow one another."""
    truths = [truths_of(example)[0] for example in examples for _ in range(seeds)]
    return float(np.mean([psnr(*pair) for pair in zip(images, truths, strict=True)]))


def kept(options: argparse.Namespace, rows: Mapping[str, Any]) -> None:
    """Write what was measured; of ways that were not asked for, what a call before found stays."""
    path = options.output / f"steps-{options.steps}-examples-{options.examples}.json"
    setting = {
        name: getattr(options, name)
        for name in ("model", "adapter", "scenes", "seeds", "steps", "examples")
    }
    before = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    old = before["rows"] if before.get("setting") == setting else {}
    text = json.dumps({"setting": setting, "rows": {**old, **rows}}, indent=1)
    write_text(path, text)


def tables(folder: Path) -> list[str]:
    """Of every setting that was measured: what each way loses."""
    lines: list[str] = []
    files = [json.loads(path.read_text("utf-8")) for path in folder.glob("steps-*.json")]
    for one in sorted(files, key=lambda f: (-f["setting"]["steps"], -f["setting"]["examples"])):
        told, rows = one["setting"], one["rows"]
        plain = rows[NONE]["truth"]
        size = f"{told['scenes']} grids of each family, {told['seeds']} seeds"
        heads = "way", "time", "to uncached", "to the truth, mean of families", "loses most"
        lines += ["", f"{told['steps']} steps, {told['examples']} examples, {size}:", ""]
        lines += [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
        for name, row in rows.items():
            lost = {family: value - plain[family] for family, value in row["truth"].items()}
            worst = min(lost, key=lambda family: lost[family])
            mean = np.mean([*row["truth"].values()])
            if name == NONE:
                lines.append(f"| {name} | 1.00 | | {mean:.2f} | |")
                continue
            change = np.mean([*lost.values()])
            lines.append(
                f"| {name} | {row['time']:.2f} | {row['near']:.1f} | {mean:.2f} ({change:+.2f}) "
                f"| {worst} {lost[worst]:+.2f} |"
            )
    return lines[1:]


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
    options.output.mkdir(parents=True, exist_ok=True)
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
    kept(options, rows_of(found, asked, options.seeds))
    note = (
        "PSNR in dB: to the image without a cache, the median; to the truth, the mean, in brackets "
        "what it changes. Time is a share of that without a cache, the median of grids."
    )
    published(tables(options.output), note, options, MARKS)


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
