"""What `vcdeft compile` does: examples in, one file of their keys and values out."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from visualcloze_deft.backbones.precision import default_dtype
from visualcloze_deft.backbones.table import backbone_of
from visualcloze_deft.errors import UserError
from visualcloze_deft.grids.cell_sizes import CELL_STEP, strip_shapes
from visualcloze_deft.inference.checks import check
from visualcloze_deft.inference.compiled import SCALE_BYTES, Storage, is_compiled
from visualcloze_deft.inference.compiled_methods import check_examples, with_query
from visualcloze_deft.inference.grid_reading import read_entries
from visualcloze_deft.inference.infer import load
from visualcloze_deft.inference.records import check_unchanged, shared_of
from visualcloze_deft.inference.request import Request
from visualcloze_deft.inference.settings import InferenceSettings
from visualcloze_deft.storage.atomic import output_folder
from visualcloze_deft.task_registry.files import load_tasks

SUFFIX = ".safetensors"


def compile_file(
    examples: Path,
    output: Path,
    settings: InferenceSettings,
    *,
    storage: Storage = "model",
    overwrite: bool = False,
    dry_run: bool = False,
) -> None:
    """Run the examples of a grid file once, and write what queries need of them to `output`."""
    check_place(output, overwrite=overwrite)
    adapters = check(settings)
    asked, shared = asked_of(examples, settings), shared_of(settings)
    shape = strip_shapes(asked.sizes, shared["resolution"], shared["cells"])[:-1]
    tokens = sum(h * w for h, w in shape) // CELL_STEP**2
    needed = bytes_of(tokens, settings.model, storage)
    rows = "1 row" if len(shape) == 1 else f"{len(shape)} rows"
    tqdm.write(f"{rows} of examples, {tokens:,} tokens: {needed / 1e6:,.2f} MB")
    output_folder(output.parent)
    free = shutil.disk_usage(output.parent).free
    if free < needed:
        raise UserError(
            f"output {output}: {free / 1e6:,.0f} MB free, {needed / 1e6:,.0f} MB needed; make room "
            "there, or give --storage fp8"
        )
    if dry_run:
        return
    pipe = load(settings, adapters)
    check_unchanged(settings, shared)
    compiled = pipe.compile_request(
        asked, resolution=settings.resolution, guidance=settings.guidance
    )
    off = compiled.save(output, storage=storage)
    if off:
        tqdm.write(f"{storage}: keys and values are off by {off:.2%} of their root mean square")


def check_place(output: Path, *, overwrite: bool) -> None:
    """Raise `UserError` where `output` is no place for compiled examples, or holds something."""
    if output.suffix != SUFFIX:
        raise UserError(f"output {output}: give a name that ends in {SUFFIX}")
    if output.is_dir():
        raise UserError(f"output {output}: is a folder; give the name of a file")
    if not output.exists():
        return
    if not overwrite:
        raise UserError(f"output {output}: already there; give --overwrite, or another name")
    if not is_compiled(output):  # but somebody's weights
        raise UserError(f"output {output}: holds no compiled examples; give another name")


def asked_of(examples: Path, settings: InferenceSettings) -> Request:
    """The only grid of a file. Raises `UserError` where it has no example."""
    entries = read_entries(examples)
    if len(entries) > 1:
        raise UserError(f"examples {examples}: {len(entries)} grids; give a file of one")
    (entry,) = entries
    rows = entry.value.get("rows") if isinstance(entry.value, dict) else None
    if isinstance(rows, list) and all(isinstance(row, list) for row in rows):
        entry = replace(entry, value={**entry.value, "rows": with_query(rows)})
    asked = entry.request(load_tasks(settings.all_task_folders))
    with entry.errors():
        check_examples(asked)
    return asked


def bytes_of(tokens: int, model: str, storage: Storage) -> int:
    """Of the keys and values of so many tokens."""
    sizes = backbone_of(model).sizes(model)
    dtype = default_dtype("cuda" if torch.cuda.is_available() else "cpu")
    each = sizes.width + SCALE_BYTES * sizes.heads
    if storage == "model":
        each = sizes.width * dtype.itemsize
    return 2 * tokens * len(sizes.blocks) * each
