"""The context cache beside what others offer: python scripts/bench_peers.py --report PAGE

The embedded base completes one 3x3 grid with diffusers' own pipeline, uncached and with its step
caches, and with cache-dit's where it is installed; then with ours. For each: seconds, the share of
diffusers' uncached time round by round, and PSNR to the same pipeline's uncached image. What a
peer refuses is said in its row.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from bench_infer import CONTENT, TASK, rows_of
from measure_context import CACHES, published
from PIL import Image

from visualcloze_deft.evaluation.metrics.fidelity import psnr
from visualcloze_deft.inference.acceleration import cache_settings
from visualcloze_deft.inference.pipeline import InContextPipeline
from visualcloze_deft.paths import BASE

MARKS = "<!-- peers:begin -->\n", "<!-- peers:end -->"
THEIRS, OURS = "diffusers", "vcdeft"
Make = Callable[[int], Image.Image]  # told a seed


@dataclass(kw_only=True)
class Timed:
    """A way to make the image: seconds and PSNR of every round, or why it cannot."""

    who: str
    seconds: list[float] = field(default_factory=list)
    near: list[float] = field(default_factory=list)
    refused: str = ""


@contextmanager
def step_cache(pipe: Any, name: str) -> Iterator[None]:
    pipe.transformer.enable_cache(cache_settings(name))
    try:
        yield
    finally:
        pipe.transformer.disable_cache()


@contextmanager
def cache_dit_cache(pipe: Any) -> Iterator[None]:
    """Its dynamic block cache; the embedded base has too few blocks for its default of eight."""
    import cache_dit

    transformer = pipe.transformer
    pipe.transformer = copy.deepcopy(transformer)  # diffusers' caches break where it was
    cache_dit.enable_cache(pipe, cache_config=cache_dit.DBCacheConfig(Fn_compute_blocks=1))
    try:
        yield
    finally:
        cache_dit.disable_cache(pipe)
        pipe.transformer = transformer


@contextmanager
def full_steps(pipe: InContextPipeline, count: int) -> Iterator[None]:
    pipe.enable_context_cache(count)
    try:
        yield
    finally:
        pipe.disable_context_cache()


@contextmanager
def isolated(pipe: InContextPipeline) -> Iterator[None]:
    pipe.set_context("isolated", untrained=True)
    try:
        yield
    finally:
        pipe.set_context()


def ways(theirs: Any, ours: InContextPipeline) -> dict[str, tuple[str, Callable[[], Any]]]:
    """Name -> whose, and what to work within."""
    found: dict[str, tuple[str, Callable[[], Any]]] = {
        "diffusers' step caches": (THEIRS, lambda: step_cache(theirs, CACHES[0])),
        **{f"--cache {name}": (OURS, lambda name=name: step_cache(ours, name)) for name in CACHES},
    }
    if importlib.util.find_spec("cache_dit"):
        found["cache-dit"] = THEIRS, lambda: cache_dit_cache(theirs)
    for count in (1, 2, 3, 6):
        found[f"--context-cache {count}"] = OURS, lambda count=count: full_steps(ours, count)
    found["--context isolated, not trained"] = OURS, lambda: isolated(ours)
    return found


def measured(options: argparse.Namespace) -> dict[str, Timed]:
    theirs = diffusers.VisualClozeGenerationPipeline.from_pretrained(
        BASE, resolution=options.resolution
    )
    ours = InContextPipeline(**theirs.components, resolution=options.resolution)
    for pipe in (theirs, ours):
        pipe.set_progress_bar_config(disable=True)
    rows = rows_of(3, 3, options.resolution)
    told = {"task_prompt": TASK, "content_prompt": CONTENT, "num_inference_steps": options.steps}
    length = min(theirs.tokenizer_2.model_max_length, 512)

    def by_them(seed: int) -> Image.Image:
        draw = torch.Generator().manual_seed(seed)
        made = theirs(image=rows, generator=draw, max_sequence_length=length, **told)
        return made.images[0][0]

    def by_us(seed: int) -> Image.Image:
        return ours(rows=rows, seed=seed, **told).images[0]

    makers: dict[str, Make] = {THEIRS: by_them, OURS: by_us}
    found = {who: Timed(who=who) for who in makers}
    found |= {name: Timed(who=who) for name, (who, _) in ways(theirs, ours).items()}
    for seed in range(options.rounds + 1):
        plain = {who: timed(found[who], make, seed) for who, make in makers.items()}
        for name, (who, within) in ways(theirs, ours).items():
            if found[name].refused:
                continue
            try:
                with within():
                    image = timed(found[name], makers[who], seed)
            except (ValueError, RuntimeError, AttributeError) as error:
                found[name].refused = str(error).splitlines()[0]
                continue
            found[name].near.append(psnr(image, plain[who]))
        print(f"round {seed} of {options.rounds}", flush=True)
    return found


def timed(into: Timed, make: Make, seed: int) -> Image.Image:
    began = time.perf_counter()
    image = make(seed)
    if seed:  # the first round warms up
        into.seconds.append(time.perf_counter() - began)
    return image


def table(found: dict[str, Timed]) -> list[str]:
    lines = ["| pipeline | cache | time | seconds | to uncached |", "|---|---|---|---|---|"]
    base = found[THEIRS].seconds
    for name, one in found.items():
        what = "none" if name in (THEIRS, OURS) else name.replace("--", "`--", 1)
        what += "`" if what.startswith("`") else ""
        if one.refused:
            lines.append(f"| {one.who} | {what} | | | refused: {one.refused} |")
            continue
        share = statistics.median(np.divide(one.seconds, base))
        near = f"{np.median(one.near):.1f} dB" if one.near else ""
        lines.append(
            f"| {one.who} | {what} | {share:.2f} | {statistics.median(one.seconds):.2f} | {near} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--resolution", type=int, default=128)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("runs/bench-peers"))
    parser.add_argument("--report", type=Path, help="a page with the marks")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        found = measured(options)
    note = (
        f"The embedded base, one 3x3 grid at {options.resolution} px, {options.steps} steps, one "
        f"image at a time, diffusers {diffusers.__version__}, on a CPU. Medians of "
        f"{options.rounds} seeds; time is the share of diffusers' uncached one, seed by seed."
    )
    published(table(found), note, options, MARKS)


if __name__ == "__main__":
    main()
