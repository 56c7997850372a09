"""What `vcdeft infer` does: a grid file in, images, contact sheets and their recipe out."""

from __future__ import annotations

import json
import math
import re
from importlib.metadata import version
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from visualcloze_deft.cells import CELL_STEP, Cells
from visualcloze_deft.checkpoint import digest
from visualcloze_deft.errors import UserError
from visualcloze_deft.gridfile import Request, read_requests
from visualcloze_deft.modelfolder import WEIGHTS, Bits, fingerprint, told_by
from visualcloze_deft.output import output_folder
from visualcloze_deft.pipeline import InContextPipeline
from visualcloze_deft.prompt import ClipText
from visualcloze_deft.registry import load_tasks
from visualcloze_deft.sheet import draw_grid

VERSIONS = ("visualcloze-deft", "torch", "diffusers", "transformers", "peft")


def infer(
    examples: Path,
    output: Path,
    *,
    model: str,
    lora: str | None,
    adapter: Path | None,
    quantise: Bits,
    clip_text: ClipText | None,
    cells: Cells | None,
    seed: int | None,
    steps: int,
    guidance: float,
    resolution: int | None,
    task_folders: tuple[str, ...],
) -> list[Path]:
    """Complete every grid of `examples` into `output`; returns the images written.

    For grid k: `00k.png` (`00k-COLUMN.png` where there are several targets), `00k-sheet.png` and
    `00k.json`, which holds all that made them. What `output` holds stays: numbers go on after it.
    """
    if not math.isfinite(guidance):
        raise UserError(f"--guidance {guidance}: give a number, e.g. 30")
    if resolution is not None and resolution % CELL_STEP:
        raise UserError(f"--resolution {resolution}: give a multiple of {CELL_STEP}")
    requests = read_requests(examples, load_tasks(map(Path, task_folders)), seed=seed)
    output_folder(output)
    pipe = InContextPipeline.from_pretrained(
        model,
        adapter=adapter,
        lora=lora,
        quantise=quantise,
        clip_text=clip_text,
        cells=cells,
        task_folders=task_folders,
    )
    shared: dict[str, object] = {
        "model": model,
        "model_fingerprint": fingerprint(model),
        "model_lora": lora,
        "adapter": str(adapter.absolute()) if adapter else None,
        "adapter_sha256": digest(adapter / WEIGHTS) if adapter else None,
        "dtype": str(pipe.models.transformer.dtype).removeprefix("torch."),
        "device": pipe.models.device.type,
        "quantise": quantise,
        "clip_text": pipe.models.clip_text,
        "cells": pipe.cells,
        "steps": steps,
        "guidance": guidance,
        "resolution": resolution or pipe.models.resolution,
        "versions": {name: version(name) for name in VERSIONS},
    }
    if adapter and (trained_on := told_by(adapter).get("base_lora", "")) != (lora or ""):
        tqdm.write(
            f"the adapter was trained on a base with the LoRA {trained_on or 'none'} merged, "
            f"here it is {lora or 'none'}; see --lora"
        )
    written = []
    first = 1 + max((leading_number(path.name) for path in output.iterdir()), default=0)
    with tqdm(total=steps * len(requests), desc="generating", unit="step") as bar:
        for number, asked in enumerate(requests, first):
            for encoder, words in pipe.models.unread(asked.prompt).items():
                tqdm.write(f"grid {number}: {encoder} does not read the end of its text: {words}")
            images = pipe.complete(
                asked, steps=steps, guidance=guidance, resolution=resolution, step=bar.update
            )
            written += write(output, f"{number:03d}", asked, images, shared)
    return written


def leading_number(name: str) -> int:
    """The number a file name begins with, 0 where there is none.

    >>> leading_number("012-sheet.png"), leading_number("grid.json")
    (12, 0)
    """
    digits = re.match(r"[0-9]+", name)
    return int(digits[0]) if digits else 0


def write(
    output: Path, name: str, asked: Request, images: list[Image.Image], shared: dict[str, object]
) -> list[Path]:
    """One grid's files."""
    paths = []
    for column, image in zip(asked.targets, images, strict=True):
        path = output / (f"{name}.png" if len(images) == 1 else f"{name}-{column + 1}.png")
        image.save(path)
        paths.append(path)
    answers = iter(images)
    last = [next(answers) if image is None else image for image in asked.rows[-1]]
    made = [(len(asked.rows) - 1, column) for column in asked.targets]
    title = " ".join(part for part in (asked.task_prompt, asked.content_prompt) if part)
    draw_grid([*asked.rows[:-1], last], title=title, made=made, cell=192).save(
        output / f"{name}-sheet.png"
    )
    recipe = {
        "images": [path.name for path in paths],
        "prompt": str(asked.prompt),
        "task": asked.task,
        "task_prompt": asked.task_prompt,
        "content_prompt": asked.content_prompt,
        "rows": [[path and str(path) for path in row] for row in asked.paths],
        "rows_sha256": [[path and digest(path) for path in row] for row in asked.paths],
        "seed": asked.seed,
        **shared,
    }
    (output / f"{name}.json").write_text(json.dumps(recipe, indent=1), encoding="utf-8")
    return paths
