"""What 8 bits cost compiled examples: python scripts/measure_compiled.py --adapter runs/causal

The adapter answers held-out grids of the eleven families with their examples compiled and stored in
each precision. Prints, and writes into --output and between the
marks of --report: bytes of a file, the error of keys and values, and PSNR of the images to those of
the model's own precision and to the truth.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

import numpy as np
from evaluate_scenes import examples_of
from measure_context import published
from PIL import Image

from visualcloze_deft.data.example import Example
from visualcloze_deft.evaluation.metrics.fidelity import psnr
from visualcloze_deft.evaluation.suite_queries import GridSettings
from visualcloze_deft.inference.compiled import Storage
from visualcloze_deft.inference.pipeline import InContextPipeline
from visualcloze_deft.sampling.examples import truths_of

MARKS = "<!-- compiled:begin -->\n", "<!-- compiled:end -->"


@dataclass(kw_only=True)
class Stored:
    """Of one precision: what files take, their errors, and the images."""

    sizes: list[int] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    images: list[Image.Image] = field(default_factory=list)


def answers(
    pipe: InContextPipeline, example: Example, steps: int, folder: Path
) -> dict[Storage, tuple[int, float, Image.Image]]:
    """A grid's image with its examples in each precision."""
    query = hidden(example)
    rows = [*example.complete[:-1], query]
    compiled = pipe.compile_examples(rows, task_prompt=example.task_sentence)
    found = {}
    for storage in get_args(Storage):
        path = folder / f"{storage}.safetensors"
        error = compiled.save(path, storage=storage)
        pipe.load_compiled(path)
        made = pipe(
            rows=[query],
            content_prompt=example.content,
            seed=example.index,
            num_inference_steps=steps,
        )
        pipe.unload_compiled()
        found[storage] = path.stat().st_size, error, made.images[0]
    return found


def hidden(example: Example) -> list[Image.Image | None]:
    """The query row as it is asked."""
    cells = zip(example.complete[-1], example.hidden, strict=True)
    return [None if asked else image for image, asked in cells]


def table(found: dict[Storage, Stored], truths: Sequence[Image.Image]) -> list[str]:
    lines = [
        "| `--storage` | size | error of keys and values | images to `model` | to the truth |",
        "|---|---|---|---|---|",
    ]
    exact = found["model"]
    for storage, own in found.items():
        share = np.mean(own.sizes) / np.mean(exact.sizes)
        same = [psnr(*pair) for pair in zip(own.images, exact.images, strict=True)]
        near = "" if storage == "model" else f"{np.median(same):.1f} dB, at least {min(same):.1f}"
        true = np.mean([psnr(*pair) for pair in zip(own.images, truths, strict=True)])
        lines.append(
            f"| {storage} | {share:.2f} | {np.mean(own.errors):.2%} | {near} | {true:.2f} dB |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--adapter", required=True)
    parser.add_argument("--scenes", type=int, default=16, help="grids of each family")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--output", type=Path, default=Path("runs/compiled"))
    parser.add_argument("--report", type=Path, help="a page with the marks")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    pipe = InContextPipeline.from_pretrained(options.model, adapter=options.adapter)
    pipe.set_context("causal", untrained=True)
    pipe.set_progress_bar_config(disable=True)
    making = GridSettings(data={}, limit=options.scenes, rows=2, resolution=pipe.config.resolution)
    found: dict[Storage, Stored] = {storage: Stored() for storage in get_args(Storage)}
    truths = []
    for examples in examples_of(making).values():
        for example in examples:
            truths.append(truths_of(example)[0])
            for storage, (size, error, image) in answers(
                pipe, example, options.steps, options.output
            ).items():
                found[storage].sizes.append(size)
                found[storage].errors.append(error)
                found[storage].images.append(image)
    note = (
        f"{len(truths)} held-out grids of the eleven families, one example, {options.steps} steps, "
        "an adapter of the demo's recipe. Sizes are shares of float32, which is the model's own "
        "precision here; of bfloat16 8 bits are 0.53. Images: PSNR, the median and the least."
    )
    published(table(found, truths), note, options, MARKS)


if __name__ == "__main__":
    main()
