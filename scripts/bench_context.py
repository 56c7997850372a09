"""What a context that is computed once saves: python scripts/bench_context.py --output runs/context

1. FLOPs of FLUX.1-Fill's transformer, counted by torch on the meta device: a full step, an active
   step, and 30 steps of each way. Bytes of the keys and values.
2. Seconds of blocks at FLUX's width, a full call beside an active one in turns, medians: on a CPU
   of one double and one single block, on a GPU of `--blocks`. Beside the ratio of their FLOPs.
3. The embedded base: a whole image with the pipeline, with and without.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from bench_infer import rows_of
from diffusers import FluxTransformer2DModel
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from visualcloze_deft.backbones.flux_fill.context import ContextCache
from visualcloze_deft.backbones.flux_fill.packing import FluxText, Latents, position_ids
from visualcloze_deft.grids.cell_sizes import CELL_STEP
from visualcloze_deft.inference.pipeline import InContextPipeline
from visualcloze_deft.storage.atomic import write_text

FLUX = {"in_channels": 384, "out_channels": 64, "guidance_embeds": True}  # and diffusers' defaults
BLOCKS = 57  # of FLUX, of which a few are counted: all cost the same
GRIDS = ((3, 3, 384), (2, 2, 512), (2, 2, 384), (4, 3, 384))  # rows, columns, pixels of a cell
TEXT = 512
STEPS = 30
FULL_STEPS = (1, 3, 6)
CUDA = torch.cuda.is_available()


@dataclass(frozen=True, kw_only=True)
class Counted:
    """FLOPs of FLUX.1-Fill for a grid, and bytes of its context in bfloat16."""

    grid: str
    full: float
    prefill: float
    rest: float
    active: float
    cache: int

    def speed(
        self, *, full_steps: int | None = None, seeds: int = 1, compiled: bool = False
    ) -> float:
        """How many times fewer FLOPs the images of `seeds` take. full_steps: None is a context
        computed once, which the seeds share. compiled: its examples are there already."""
        if full_steps is None:
            once = self.rest if compiled else self.prefill
            return STEPS * seeds * self.full / (once + STEPS * seeds * self.active)
        return STEPS * self.full / (full_steps * self.full + (STEPS - full_steps) * self.active)


def flux(device: str, dtype: torch.dtype, double: int, single: int) -> FluxTransformer2DModel:
    counts = {"num_layers": double, "num_single_layers": single}
    with torch.device(device):
        return FluxTransformer2DModel.from_config(FLUX | counts).to(dtype).eval()


class Inputs:
    """A cache for a grid whose last cell is generated, with random inputs."""

    def __init__(
        self, net: FluxTransformer2DModel, rows: int, columns: int, side: int, text: int = TEXT
    ) -> None:
        ids = position_ids([(side, side * columns)] * rows)
        target = (ids[:, 0] == rows) & (ids[:, 2] >= (columns - 1) * side // CELL_STEP)
        mask = target[None, :, None].float().expand(1, -1, 256)
        device, dtype, count = net.device, net.dtype, len(ids)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, device=device, dtype=dtype)

        shown = Latents(clean=random(1, count, 64), seen=random(1, count, 64), mask=mask, ids=ids)
        widths = net.config.joint_attention_dim, net.config.pooled_projection_dim
        words = FluxText(random(1, text, widths[0]), random(1, widths[1]))
        self.cache = ContextCache(net, shown, text=words, guidance=30.0)
        self.noisy, self.t = random(1, count, 64), torch.ones(1, device=device)
        self.cache.targets = self.cache.targets.to(device)  # were found where they can be read
        self.cache.known = self.cache.known.to(device)
        self.cache.latents = Latents(
            clean=shown.clean,
            seen=shown.seen,
            mask=mask.to(device, dtype),
            ids=ids.to(device),
        )

    def full(self) -> None:
        self.cache.full(self.noisy, self.t)

    def active(self) -> None:
        self.cache.active(self.noisy, self.t)


def counted(rows: int, columns: int, side: int) -> Counted:
    net = flux("meta", torch.bfloat16, 1, 2)
    asked = Inputs(net, rows, columns, side)
    share = BLOCKS / 3

    def flops(call: Callable[[], Any]) -> float:
        with FlopCounterMode(display=False) as counter:
            call()
        return counter.get_total_flops() * share

    full, prefill = flops(asked.full), flops(asked.cache.prefill)
    active = flops(asked.active)
    asked.cache.prefill_examples(asked.cache.text)
    rest = flops(asked.cache.prefill)
    context = TEXT + len(asked.cache.known)
    width = net.config.num_attention_heads * net.config.attention_head_dim
    return Counted(
        grid=f"{rows}x{columns} at {side}",
        full=full,
        prefill=prefill,
        rest=rest,
        active=active,
        cache=2 * BLOCKS * context * width * 2,
    )


def timed(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Seconds of each, medians of calls in turns."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            began = now()
            call()
            if number:  # the first round warms up
                found[name].append(now() - began)
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def now() -> float:
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


def blocks(options: argparse.Namespace, dtype: torch.dtype) -> list[dict[str, Any]]:
    net = flux("cuda" if CUDA else "cpu", dtype, *options.blocks)
    found = []
    for rows, columns, side in GRIDS[: options.grids]:
        asked, work = Inputs(net, rows, columns, side), counted(rows, columns, side)
        seconds = timed({"full": asked.full, "active": asked.active}, options.rounds)
        bound, ratio = work.full / work.active, seconds["full"] / seconds["active"]
        found.append(
            {
                "grid": work.grid,
                "dtype": str(dtype).removeprefix("torch."),
                "full ms": 1e3 * seconds["full"],
                "active ms": 1e3 * seconds["active"],
                "ratio": ratio,
                "FLOP bound": bound,
                "of bound": ratio / bound,
            }
        )
    return found


def images(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The embedded base's whole pipeline."""
    pipe = InContextPipeline.from_pretrained("tiny")
    pipe.set_progress_bar_config(disable=True)
    found = []
    for rows, columns in ((2, 2), (3, 3), (4, 3)):
        shown = rows_of(rows, columns, pipe.config.resolution)

        def make(full_steps: int | None, shown: Any = shown) -> None:
            pipe.disable_context_cache()
            if full_steps is not None:
                pipe.enable_context_cache(full_steps)
            pipe(rows=shown, task_prompt="", content_prompt="", num_inference_steps=STEPS)

        calls = {"none": lambda m=make: m(None)}
        calls |= {str(k): lambda m=make, k=k: m(k) for k in FULL_STEPS}
        seconds = timed(calls, options.rounds)
        found.append({"grid": f"{rows}x{columns}", **seconds})
    return found


def lines_of(flops: Sequence[Counted], timings: Sequence[Any], whole: Sequence[Any]) -> list[str]:
    heads = "grid", "full step, TFLOP", "active step", "isolated, 30 steps", "with 4 seeds"
    heads += "compiled examples", "K = 1 / 3 / 6", "cache in bf16"
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for one in flops:
        cached = " / ".join(f"{one.speed(full_steps=k):.2f}" for k in FULL_STEPS)
        lines.append(
            f"| {one.grid} | {one.full / 1e12:.1f} | {one.active / 1e12:.1f} | {one.speed():.2f}x "
            f"| {one.speed(seeds=4):.2f}x | {one.speed(compiled=True):.2f}x | {cached}x "
            f"| {one.cache / 1e9:.2f} GB |"
        )
    lines += ["", "| grid | precision | full, ms | active, ms | ratio | FLOP bound | share of it |"]
    lines.append("|---|---|---|---|---|---|---|")
    lines += [
        f"| {t['grid']} | {t['dtype']} | {t['full ms']:.0f} | {t['active ms']:.0f} "
        f"| {t['ratio']:.2f} | {t['FLOP bound']:.2f} | {t['of bound']:.2f} |"
        for t in timings
    ]
    ways = " | ".join(f"K = {k}" for k in FULL_STEPS)
    lines += ["", f"| embedded base | none, s | {ways} |", "|---|---|" + "---|" * len(FULL_STEPS)]
    lines += [
        f"| {w['grid']} | {w['none']:.2f} | "
        + " | ".join(f"{w[str(k)]:.2f} ({w['none'] / w[str(k)]:.2f}x)" for k in FULL_STEPS)
        + " |"
        for w in whole
    ]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, nargs=2, default=(1, 1), help="double and single")
    parser.add_argument("--grids", type=int, default=1, help="how many of the grids are timed")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("runs/bench-context"))
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    flops, timings, whole = [counted(*one) for one in GRIDS], [], []
    with torch.no_grad():
        for dtype in (torch.bfloat16, *(() if CUDA else (torch.float32,))):
            timings += blocks(options, dtype)
            print(timings[-1], flush=True)
        whole = images(options)
    text = "\n".join(lines_of(flops, timings, whole)) + "\n"
    print(text)
    write_text(options.output / "context.md", text)
    numbers = {"flops": [asdict(one) for one in flops], "blocks": timings, "images": whole}
    write_text(options.output / "context.json", json.dumps(numbers, indent=1))


if __name__ == "__main__":
    main()
