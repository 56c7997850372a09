"""What the README's table says: python scripts/evaluate_scenes.py --adapter runs/demo/adapter

Runs `vcdeft eval --suite scenes --against-base` and writes its PSNR in dB for every task, beside
that of (a) the condition itself, (b) a constant image of the truth's mean colour, and (c) the VAE's
reconstruction of the truth. Then whether examples and words matter. Writes table.md, results.json
and sheet.png into --output, and the evaluation with its report into --output/suite.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from visualcloze_deft.backbones.flux_fill.model import Models
from visualcloze_deft.data.example import Example
from visualcloze_deft.evaluation.cases import Shot, read_cases, shots_of
from visualcloze_deft.evaluation.evaluate import BASE, IMAGES, evaluate_suite
from visualcloze_deft.evaluation.metrics.fidelity import psnr
from visualcloze_deft.evaluation.settings import RESULTS, EvaluationRequest, Scoring
from visualcloze_deft.evaluation.suite_queries import GridSettings
from visualcloze_deft.evaluation.suites import rows_of
from visualcloze_deft.grids import grid
from visualcloze_deft.images.reading import read_image
from visualcloze_deft.inference.pipeline import InContextPipeline
from visualcloze_deft.inference.settings import InferenceSettings
from visualcloze_deft.reporting.contact_sheet import draw_grid, draw_sheet
from visualcloze_deft.reporting.statistics import Figure, difference
from visualcloze_deft.sampling.denoising import GUIDANCE
from visualcloze_deft.sampling.examples import complete_examples, truths_of

BATCH = 16
PICTURED = 2  # grids of each task on the sheet
SWAPPED = (  # a task, and the one whose example it gets
    ("image-to-depth", "image-to-normals"),
    ("image-to-normals", "image-to-depth"),
    ("depth-to-image", "image-to-depth"),
    ("segmentation-to-image", "image-to-depth"),
)


@dataclass(frozen=True, kw_only=True)
class Margin:
    """PSNR in dB with what belongs there, with what does not, and their difference."""

    right: float
    wrong: float
    margin: Figure


# The suite


def request(options: argparse.Namespace) -> EvaluationRequest:
    settings = InferenceSettings(
        model=options.model,
        adapters={Path(options.adapter): 1.0},
        steps=options.steps,
        guidance=GUIDANCE,
        batch=BATCH,
    )
    return EvaluationRequest(
        suite="scenes",
        settings=settings,
        scoring=Scoring(encoders=("none",)),
        making=GridSettings(data={}, limit=options.scenes),
        against_base=True,
    )


def scores_of(output: Path, models: Models) -> dict[str, dict[str, list[float]]]:
    """PSNR of every grid of every task, by what it is of."""
    cases = read_cases(output)
    shots = shots_of(cases, output, output / IMAGES)
    found: dict[str, dict[str, list[float]]] = {}
    lines = map(json.loads, (output / RESULTS).read_text("utf-8").splitlines())
    for shot, line in zip(shots, lines, strict=True):
        assert shot.truth is not None
        truth = read_image(shot.truth)
        row = found.setdefault(shot.row, {})
        others = {
            "copy": psnr(read_image(condition_of(shot)), truth),
            "constant": psnr(constant(truth), truth),
            "vae": psnr(reconstructed(models, truth), truth),
        }
        measured = {"base": line["base"]["psnr"], "adapter": line["scores"]["psnr"]}
        for name, value in (others | measured).items():
            row.setdefault(name, []).append(value)
    return found


def condition_of(shot: Shot) -> Path:
    """The last picture that the query shows."""
    return list(shot.shown.values())[-1]


def constant(image: Image.Image) -> Image.Image:
    mean = np.asarray(image, float).mean(axis=(0, 1)).round().astype(np.uint8)
    return Image.new("RGB", image.size, tuple(int(v) for v in mean))


def reconstructed(models: Models, image: Image.Image) -> Image.Image:
    pixels = grid.to_pixels(image)[None]
    return grid.to_image(models.decode_latents(models.encode_pixels(pixels))[0])


# Examples and words


def psnr_of(models: Models, examples: Sequence[Example], steps: int) -> list[float]:
    made = complete_examples(models, examples, steps=steps, batch=BATCH)
    return [
        psnr(images[0], truths_of(example)[0])
        for images, example in zip(made, examples, strict=True)
    ]


def compared(
    models: Models, right: Sequence[Example], wrong: Sequence[Example], steps: int
) -> Margin:
    one, other = (psnr_of(models, examples, steps) for examples in (right, wrong))
    return Margin(
        right=float(np.mean(one)), wrong=float(np.mean(other)), margin=difference(one, other)
    )


def examples_of(making: GridSettings) -> dict[str, list[Example]]:
    """The grids of the suite."""
    rows = rows_of("scenes", making)
    return {row.name: [row.make(k).example for k in range(row.count)] for row in rows}


def what_matters(
    models: Models, known: Mapping[str, Sequence[Example]], steps: int
) -> dict[str, Margin]:
    """Words removed: the task's own example against another task's. Editing: the right instruction
    against another item's."""
    found = {}
    for name, other in SWAPPED:
        right = [replace(e, task_sentence="", content="") for e in known[name]]
        wrong = [
            replace(one, rows=(another.rows[0], one.rows[-1]))
            for one, another in zip(right, known[other], strict=True)
        ]
        found[f"{name}, example of {other}"] = compared(models, right, wrong, steps)
    edits = known["image-editing"]
    turned = [replace(one, content=edits[k - 1].content) for k, one in enumerate(edits)]
    found["editing, another scene's instruction"] = compared(models, edits, turned, steps)
    return found


# What is written


def sheet(output: Path) -> Image.Image:
    """Rows: example, query, base, adapter; the truth last."""
    pages, seen = [], {}
    for case, shot in zip(
        cases := read_cases(output), shots_of(cases, output, output / IMAGES), strict=True
    ):
        seen[case.row] = seen.get(case.row, 0) + 1
        if seen[case.row] > PICTURED:
            continue
        pictures = output / "grids"
        above = [
            read_image(pictures / f"{case.name}-1{column + 1}.png")
            for column in range(len(case.roles))
        ]
        shown = [read_image(path) for path in shot.shown.values()]
        base = read_image(output / BASE / shot.image.name)
        row = [*shown, base, read_image(shot.image), read_image(shot.truth)]
        last = (1, len(shown)), (1, len(shown) + 1)
        title = f"{case.row}: {case.prompt}" if case.prompt else case.row
        title = f"{title} | base, adapter, truth"
        pages.append(draw_grid([above, row], title=title, made=last, cell=96))
    return draw_sheet(pages, columns=4)


def markdown(
    scores: Mapping[str, Mapping[str, Sequence[float]]], matters: Mapping[str, Margin], note: str
) -> str:
    lines = [
        "| task | copy | constant | base | base + DEFT | VAE of truth | gain of DEFT (95 %) |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, of_task in scores.items():
        p = {kind: np.mean(values) for kind, values in of_task.items()}
        gain = difference(of_task["adapter"], of_task["base"])
        ours = [f"{p['base']:.1f}", f"{p['adapter']:.1f}"]
        better = int(gain.mean > 0)
        ours[better] = f"**{ours[better]}**"
        lines.append(
            f"| {name} | {p['copy']:.1f} | {p['constant']:.1f} | {' | '.join(ours)} "
            f"| {p['vae']:.1f} | {signed(gain)} |"
        )
    lines += [
        "",
        note,
        "",
        "| what is taken away | right | wrong | margin (95 %) |",
        "|---|---|---|---|",
    ]
    for name, one in matters.items():
        lines.append(f"| {name} | {one.right:.1f} | {one.wrong:.1f} | {signed(one.margin)} |")
    return "\n".join(lines) + "\n"


def signed(figure: Figure) -> str:
    return f"{figure.mean:+.2f} ({figure.low:+.2f} to {figure.high:+.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapter", required=True)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--scenes", type=int, default=64)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--output", type=Path, default=Path("runs/evaluation"))
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    start, asked, suite = time.monotonic(), request(options), options.output / "suite"
    evaluate_suite(asked, suite)
    models = InContextPipeline.from_pretrained(options.model, adapter=options.adapter).models
    with torch.no_grad():
        scores = scores_of(suite, models)
    known = examples_of(replace(asked.making, resolution=models.resolution))
    matters = what_matters(models, known, options.steps)
    note = (
        f"PSNR in dB, mean over {options.scenes} held-out scenes per task, one in-context example, "
        f"{options.steps} steps. {(time.monotonic() - start) / 60:.1f} minutes."
    )
    table = markdown(scores, matters, note)
    print(table)
    (options.output / "table.md").write_text(table, encoding="utf-8")
    sheet(suite).save(options.output / "sheet.png")
    numbers: dict[str, Any] = {
        "tasks": {
            name: {kind: float(np.mean(values)) for kind, values in of_task.items()}
            | {"gain": difference(of_task["adapter"], of_task["base"]).record()}
            for name, of_task in scores.items()
        },
        "examples and words": {
            name: {"right": one.right, "wrong": one.wrong, "margin": one.margin.record()}
            for name, one in matters.items()
        },
    }
    (options.output / "results.json").write_text(json.dumps(numbers, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
