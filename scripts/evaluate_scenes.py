"""What the README's table says: python scripts/evaluate_scenes.py --adapter runs/demo/adapter

For every task family, on held-out scenes with one in-context example, PSNR in dB of (a) copying the
condition, (b) the base, (c) base + adapter, (d) the VAE's reconstruction of the truth, (e) a
constant image of the truth's mean colour. Then whether examples and words matter. Writes
table.md, results.json and sheet.png into --output.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from families import families
from PIL import Image
from tqdm import tqdm

from visualcloze_deft.backbones.flux_fill.model import Models
from visualcloze_deft.data.example import Example
from visualcloze_deft.data.mixture import Mixture
from visualcloze_deft.data.queries import query_of
from visualcloze_deft.data.sources.scenes import Scenes
from visualcloze_deft.evaluation.metrics.fidelity import psnr
from visualcloze_deft.grids import grid
from visualcloze_deft.inference.pipeline import InContextPipeline
from visualcloze_deft.reporting.contact_sheet import draw_grid, draw_sheet
from visualcloze_deft.sampling.denoising import generate

SEED = 1  # training uses scenes of seed 0
BATCH = 16


def truth_of(example: Example) -> Image.Image:
    return example.rows[-1][example.hidden.index(True)]


def complete(models: Models, examples: Sequence[Example], steps: int) -> list[Image.Image]:
    made: list[Image.Image] = []
    for start in range(0, len(examples), BATCH):
        part = examples[start : start + BATCH]
        grids = [grid.join(e.complete, hidden=e.hidden) for e in part]
        seeds = [e.index for e in part]
        found = generate(models, grids, [e.prompt for e in part], seeds=seeds, steps=steps)
        made += [images[0] for images in found]
    return made


def reconstruct(models: Models, images: Sequence[Image.Image]) -> list[Image.Image]:
    side = models.resolution
    pixels = torch.stack([grid.to_pixels(grid.fitted(image, (side, side))) for image in images])
    return [grid.to_image(p) for p in models.decode_latents(models.encode_pixels(pixels))]


def constant(image: Image.Image) -> Image.Image:
    mean = np.asarray(image, float).mean(axis=(0, 1)).round().astype(np.uint8)
    return Image.new("RGB", image.size, tuple(int(v) for v in mean))


def interval(differences: np.ndarray) -> tuple[float, float, float]:
    """Mean of paired differences and its 95 % bootstrap interval."""
    rng = np.random.default_rng(0)
    means = rng.choice(differences, (2000, len(differences))).mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(differences.mean()), float(low), float(high)


def gains(base: Models, tuned: Models, mixture: Mixture, count: int, steps: int) -> dict:
    results = {}
    for name, task in tqdm(mixture.tasks.items(), desc="families"):
        examples = [query_of(mixture, task, index=k) for k in range(count)]
        truths = [truth_of(e) for e in examples]
        condition = max(c for c, hidden in enumerate(examples[0].hidden) if not hidden)
        made = {
            "copy": [e.rows[-1][condition] for e in examples],
            "base": complete(base, examples, steps),
            "adapter": complete(tuned, examples, steps),
            "vae": reconstruct(base, truths),
            "constant": [constant(t) for t in truths],
        }
        scores = {
            kind: [psnr(a, t) for a, t in zip(images, truths, strict=True)]
            for kind, images in made.items()
        }
        gain = np.array(scores["adapter"]) - np.array(scores["base"])
        results[name] = {
            "psnr": {kind: float(np.mean(values)) for kind, values in scores.items()},
            "gain": interval(gain),
            "examples": examples[:3],
            "made": [made["base"][:3], made["adapter"][:3]],
        }
    return results


def examples_matter(models: Models, mixture: Mixture, count: int, steps: int) -> dict:
    """Words removed: PSNR with the task's own example minus PSNR with another task's."""
    pairs = [
        ("image-to-depth", "image-to-normals"),
        ("image-to-normals", "image-to-depth"),
        ("depth-to-image", "image-to-depth"),
        ("segmentation-to-image", "image-to-depth"),
    ]
    found = {}
    for name, other in pairs:
        right = [query_of(mixture, mixture.tasks[name], index=k) for k in range(count)]
        right = [replace(e, task_sentence="", content="") for e in right]
        wrong = [
            replace(
                e, rows=(query_of(mixture, mixture.tasks[other], index=e.index).rows[0], e.rows[-1])
            )
            for e in right
        ]
        truths = [truth_of(e) for e in right]
        scores = [
            np.array([psnr(a, t) for a, t in zip(complete(models, es, steps), truths, strict=True)])
            for es in (right, wrong)
        ]
        found[f"{name}, example of {other}"] = {
            "right": float(scores[0].mean()),
            "wrong": float(scores[1].mean()),
            "margin": interval(scores[0] - scores[1]),
        }
    return found


def text_matters(models: Models, mixture: Mixture, count: int, steps: int) -> dict:
    """Editing: PSNR with the right instruction minus PSNR with another item's."""
    right = [query_of(mixture, mixture.tasks["image-editing"], index=k) for k in range(count)]
    words = [e.content for e in right]
    wrong = [replace(e, content=words[(k + 1) % count]) for k, e in enumerate(right)]
    truths = [truth_of(e) for e in right]
    scores = [
        np.array([psnr(a, t) for a, t in zip(complete(models, es, steps), truths, strict=True)])
        for es in (right, wrong)
    ]
    return {
        "right": float(scores[0].mean()),
        "wrong": float(scores[1].mean()),
        "margin": interval(scores[0] - scores[1]),
    }


def sheet(results: dict) -> Image.Image:
    """Rows: example, query, base, adapter; the truth last."""
    pages = []
    for name, found in results.items():
        for k, example in enumerate(found["examples"][:2]):
            shown = [
                i for i, hidden in zip(example.rows[-1], example.hidden, strict=True) if not hidden
            ]
            row = [*shown, found["made"][0][k], found["made"][1][k], truth_of(example)]
            last = (1, len(shown)), (1, len(shown) + 1)
            title = f"{name}: {example.content}" if example.content else name
            pages.append(
                draw_grid(
                    [example.rows[0], row],
                    title=f"{title} | base, adapter, truth",
                    made=last,
                    cell=96,
                )
            )
    return draw_sheet(pages, columns=4)


def markdown(results: dict, examples: dict, text: dict, note: str) -> str:
    lines = [
        "| task | copy | constant | base | base + DEFT | VAE of truth | gain of DEFT (95 %) |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, found in results.items():
        p, (mean, low, high) = found["psnr"], found["gain"]
        ours = [f"{p['base']:.1f}", f"{p['adapter']:.1f}"]
        better = int(mean > 0)
        ours[better] = f"**{ours[better]}**"
        lines.append(
            f"| {name} | {p['copy']:.1f} | {p['constant']:.1f} | {' | '.join(ours)} "
            f"| {p['vae']:.1f} | {mean:+.2f} ({low:+.2f} to {high:+.2f}) |"
        )
    lines += [
        "",
        note,
        "",
        "| what is taken away | right | wrong | margin (95 %) |",
        "|---|---|---|---|",
    ]
    for name, found in [*examples.items(), ("editing, another scene's instruction", text)]:
        mean, low, high = found["margin"]
        lines.append(
            f"| {name} | {found['right']:.1f} | {found['wrong']:.1f} "
            f"| {mean:+.2f} ({low:+.2f} to {high:+.2f}) |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapter", required=True)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--scenes", type=int, default=64)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--output", type=Path, default=Path("runs/evaluation"))
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    base = InContextPipeline.from_pretrained(options.model).models
    tuned = InContextPipeline.from_pretrained(options.model, adapter=options.adapter).models
    mixture = Mixture(
        families(), [Scenes(size=base.resolution, seed=SEED)], seed=SEED, resolution=base.resolution
    )
    results = gains(base, tuned, mixture, options.scenes, options.steps)
    examples = examples_matter(tuned, mixture, options.scenes, options.steps)
    text = text_matters(tuned, mixture, options.scenes, options.steps)
    minutes = (time.monotonic() - start) / 60
    note = (
        f"PSNR in dB, mean over {options.scenes} held-out scenes per task, one in-context example, "
        f"{options.steps} steps. {minutes:.1f} minutes."
    )
    table = markdown(results, examples, text, note)
    print(table)
    (options.output / "table.md").write_text(table, encoding="utf-8")
    sheet(results).save(options.output / "sheet.png")
    for found in results.values():
        del found["examples"], found["made"]
    numbers = {"families": results, "examples": examples, "text": text}
    (options.output / "results.json").write_text(json.dumps(numbers, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
