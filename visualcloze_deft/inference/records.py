"""What `vcdeft infer` writes of each grid, and whether it stands there already."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import torch

from visualcloze_deft.backbones.attention import AUTO
from visualcloze_deft.backbones.flux_fill.files import resolution_of
from visualcloze_deft.backbones.model_files import index_of
from visualcloze_deft.backbones.peft_files import read_metadata
from visualcloze_deft.backbones.precision import default_dtype
from visualcloze_deft.config.sameness import MAY_DIFFER, Difference, differences
from visualcloze_deft.errors import UserError
from visualcloze_deft.grids.cell_sizes import CELL_STEP, Cells
from visualcloze_deft.grids.prompt import ClipText, Prompt
from visualcloze_deft.inference.arguments import known_or_default
from visualcloze_deft.inference.compiled import HASH
from visualcloze_deft.inference.fingerprints import NAMED, as_named, in_files, weights_of
from visualcloze_deft.inference.grid_reading import Entry
from visualcloze_deft.inference.output import Answer
from visualcloze_deft.inference.request import Request
from visualcloze_deft.inference.settings import InferenceSettings
from visualcloze_deft.reporting.contact_sheet import draw_grid, image_metadata, metadata_text
from visualcloze_deft.storage.atomic import atomic_write, check_foreign, clear_parts, write_text
from visualcloze_deft.storage.locks import CLAIMS
from visualcloze_deft.storage.tensor_headers import read_texts
from visualcloze_deft.storage.text_files import read_object

VERSIONS = ("visualcloze-deft", "torch", "diffusers", "transformers", "peft")
SHEET = "-sheet.png"  # how the names of contact sheets end
WAY_OUT = "give --overwrite, or another --output"


@dataclass(frozen=True, kw_only=True)
class GridJob:
    """One grid that was read and found good. shape: (height, width) of its strips; names: of its
    images; steps: calls of the transformer; prompts: its own, then those of upsampling; record: see
    `record_of`; asked: the grid with its pictures, None where they are read again to make it."""

    entry: Entry
    shape: tuple[tuple[int, int], ...]
    names: tuple[str, ...]
    steps: int
    prompts: tuple[Prompt | str, ...]
    record: dict[str, Any]
    asked: Request | None = None

    @property
    def images(self) -> int:
        """How many samples go through the transformer; each may have several targets."""
        seeds = self.record["seed"]
        return len(seeds) if isinstance(seeds, list) else 1

    @property
    def tokens(self) -> int:
        return sum(h * w for h, w in self.shape) // CELL_STEP**2


def shared_of(settings: InferenceSettings) -> dict[str, Any]:
    """What the records of all grids say: what made them."""
    told = index_of(settings.model)
    for folder in list(settings.adapters)[:1]:
        told |= read_metadata(folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    seen = settings.seen
    return {
        **weights_of(settings.model, settings.lora, in_files(settings.adapters)),
        "dtype": str(default_dtype(device)).removeprefix("torch."),
        "device": device,
        "quantise": settings.quantise,
        "clip_text": settings.clip_text
        or known_or_default(told.get("clip_text"), get_args(ClipText)),
        "cells": settings.cells or known_or_default(told.get("cells"), get_args(Cells)),
        "steps": settings.steps,
        "guidance": settings.guidance,
        "cache": settings.cache,
        # null where all is computed in every step, as in records of before it
        "context": None if seen == "full" else seen,
        "context_cache": settings.context_cache,
        "compiled": settings.compiled and str(settings.compiled),
        "compiled_sha256": settings.compiled and read_texts(settings.compiled).get(HASH),
        # null for "auto", as in records of before it; what it came to is not compared
        "attention": None if settings.attention == AUTO else settings.attention,
        "vae_tiling": settings.vae_tiling,
        "compile": settings.compile_blocks,
        "batch": settings.batch,
        "resolution": settings.resolution or resolution_of(settings.model),
        "versions": {name: version(name) for name in VERSIONS},
    }


def check_unchanged(settings: InferenceSettings, record: Mapping[str, Any]) -> None:
    """Raise `UserError` where what was loaded is not what a record planned before says."""
    now = weights_of(settings.model, settings.lora, in_files(settings.adapters))
    for key, value in now.items():
        if record[key] != value:
            raise UserError(
                f"{key} is {shortly(value)}, and was {shortly(record[key])} when this command "
                "began: a file was replaced; give the command again"
            )


def record_of(asked: Request, shared: Mapping[str, Any]) -> dict[str, Any]:
    """All that is needed to make the images of a grid again. Its keys are those of a grid file,
    too."""
    return {**record_of_grid(asked), **shared}


def record_of_grid(asked: Request) -> dict[str, Any]:
    """What a record says of a grid alone, its pictures as they were read."""
    return {
        "prompt": str(asked.prompt),
        "task": asked.task,
        "task_prompt": asked.task_prompt,
        "content_prompt": asked.content_prompt,
        "rows": [[path and str(path) for path in row] for row in asked.paths],
        "rows_sha256": [list(row) for row in asked.digests],
        "seed": asked.seeds[0] if len(asked.seeds) == 1 else list(asked.seeds),
        "upsampling": [how and asdict(how) for how in asked.upsampling] or None,
    }


def image_names(name: str, asked: Request) -> tuple[str, ...]:
    """File names of the images of a grid, in the order of `Completed`."""
    return tuple(
        name
        + (f"-seed{seed}" if len(asked.seeds) > 1 else "")
        + (f"-{column + 1}" if len(asked.targets) > 1 else "")
        + ".png"
        for seed in asked.seeds
        for column in asked.targets
    )


def check_output(output: Path) -> None:
    """Raise `UserError` where the folder holds what no list of grids leaves, e.g. a project. Files
    in the place of results are looked at one by one: see `finished`."""
    if not (output / CLAIMS).is_file():
        check_foreign(output, ("*.png", "*.json", "*.jsonl"), what="results of vcdeft")


def check_inputs_stay(examples: Path, output: Path, plans: Sequence[GridJob]) -> None:
    """Raise `UserError` where a result would be written over what it is made from."""
    read = {
        os.path.realpath(path)  # which takes links to themselves, as Path.resolve does not
        for plan in plans
        for row in plan.record["rows"]
        for path in row
        if path
    }
    read.add(os.path.realpath(examples))
    if examples.is_dir():
        read |= {os.path.realpath(path) for path in examples.glob("*.json")}
    for plan in plans:
        for name in files_of(plan):
            if os.path.realpath(output / name) in read and not is_record(output / name):
                raise UserError(
                    f"{output / name}: is read here, and would be written over; give another "
                    "--output"
                )


def check_apart(plans: Sequence[GridJob]) -> None:
    """Raise `UserError` where two grids would write a file of one name."""
    whose: dict[str, GridJob] = {}
    for plan in plans:
        for name in files_of(plan):
            other = whose.setdefault(name, plan)
            if other is not plan:
                raise UserError(
                    f"{plan.entry.where}: {name} would also be written for {other.entry.where}; "
                    "rename one of them"
                )


def files_of(plan: GridJob) -> tuple[str, ...]:
    """The names of all files that are made of a grid, the record last."""
    return (*plan.names, f"{plan.entry.name}{SHEET}", f"{plan.entry.name}.json")


def is_record(path: Path) -> bool:
    try:
        return read_record(path) is not None
    except UserError:
        return False


def finished(output: Path, plan: GridJob, *, since: float) -> bool:
    """Whether a grid's record and images are there. Raises `UserError` where something else is in
    their place.

    since: when overwriting was asked for, 0 where it was not: what is older is then not there.
    """
    path = output / f"{plan.entry.name}.json"
    if since:
        return path.is_file() and path.stat().st_mtime >= since
    before = read_record(path)
    now = compared(plan.record)
    if before is None:
        for name in files_of(plan):
            if (output / name).exists() and compared(image_metadata(output / name)) != now:
                raise UserError(
                    f"{output / name}: already there, not made by this command; {WAY_OUT}"
                )
        return False
    for other in differences(compared(before), now):
        if other.name in now:  # what later versions say more counts for nothing
            raise UserError(f"{path}: made with {contrast(other, before, plan.record)}; {WAY_OUT}")
    return all((output / name).is_file() for name in plan.names)


def contrast(other: Difference, before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """How two records differ: in the names of what their hashes are of, where these differ."""
    name = NAMED.get(other.name, "")
    was, wanted = (as_named(record.get(name)) for record in (before, now))
    if was != wanted:
        return f"{name} {was}, asked for is {wanted}"
    return f"{other.name} {shortly(other.before)}, asked for is {shortly(other.now)}"


def compared(record: Mapping[str, Any]) -> dict[str, Any]:
    """What of a record says that images are the same, as it is after JSON."""
    kept = {key: value for key, value in record.items() if key not in MAY_DIFFER["infer"]}
    found: dict[str, Any] = json.loads(json.dumps(kept))
    return found


def read_record(path: Path) -> dict[str, Any] | None:
    """The record of a finished grid; None where there is none. Raises `UserError` where the file is
    something else."""
    if not path.exists():
        return None
    try:
        found = read_object(path, "no record")
    except UserError:
        found = {}
    if "rows_sha256" not in found:
        raise UserError(f"{path}: already there and no record of vcdeft; {WAY_OUT}")
    return found


def shortly(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def done(output: Path, plan: GridJob, since: float) -> bool:
    """Whether a process has written the record."""
    path = output / f"{plan.entry.name}.json"
    return path.is_file() and path.stat().st_mtime >= since


def clear_grid_parts(output: Path, plan: GridJob) -> None:
    """Remove what a process that was killed has left of a grid."""
    for name in files_of(plan):
        clear_parts(output, glob.escape(name))


def write(output: Path, plan: GridJob, asked: Request, answers: Sequence[Answer]) -> None:
    """One grid's files, each whole or not at all, the record last."""
    (output / f"{plan.entry.name}.json").unlink(missing_ok=True)  # of what is overwritten
    images = [image for answer in answers for image in answer.images]
    seeds = [answer.seed for answer in answers for _ in answer.images]
    for name, image, seed in zip(plan.names, images, seeds, strict=True):
        told = metadata_text(plan.record | {"of_seed": seed})
        atomic_write(output / name, partial(image.save, format="PNG", pnginfo=told))
    title = " ".join(part for part in (asked.task_prompt, asked.content_prompt) if part)
    rows = [*asked.rows[:-1], *(answer.row for answer in answers)]
    first = len(asked.rows) - 1
    marks = [(first + k, column) for k in range(len(answers)) for column in asked.targets]
    sheet = draw_grid(rows, title=title, made=marks, cell=192)
    *_, sheet_name, record_name = files_of(plan)
    atomic_write(
        output / sheet_name, partial(sheet.save, format="PNG", pnginfo=metadata_text(plan.record))
    )
    text = json.dumps({"images": list(plan.names), **plan.record}, indent=1)
    write_text(output / record_name, text)
