"""What `vcdeft infer` does: grids in, images, contact sheets and their recipe out.

OUTPUT/NAME.png          (NAME-2.png: of column 2, NAME-seed7.png: of seed 7, where several)
OUTPUT/NAME-sheet.png    the whole grid
OUTPUT/NAME.json         all that made them, written last: a grid that has one is finished

Any number of processes, also of other machines on one file system, may work on one list: each
locks the grid that it makes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from visualcloze_deft.adapters.files import StoredAdapter
from visualcloze_deft.backbones.attention import NATIVE
from visualcloze_deft.backbones.model_files import folder_of
from visualcloze_deft.backbones.precision import default_dtype
from visualcloze_deft.errors import UserError
from visualcloze_deft.grids.cell_sizes import grid_cells, strip_shapes
from visualcloze_deft.inference import acceleration
from visualcloze_deft.inference.checks import check, described, other_bases, unread_words
from visualcloze_deft.inference.compiled import read_compiled
from visualcloze_deft.inference.example_parts import ExampleParts
from visualcloze_deft.inference.grid_reading import Entry, picture_entries, read_entries
from visualcloze_deft.inference.output import NotFinite
from visualcloze_deft.inference.pipeline import InContextPipeline
from visualcloze_deft.inference.records import (
    GridJob,
    check_apart,
    check_inputs_stay,
    check_output,
    check_unchanged,
    clear_grid_parts,
    finished,
    image_names,
    record_of,
    record_of_grid,
    shared_of,
    write,
)
from visualcloze_deft.inference.request import Request
from visualcloze_deft.inference.settings import InferenceSettings
from visualcloze_deft.inference.workers import SINCE, WAIT, share
from visualcloze_deft.runtime.launch import check_processes, prepared
from visualcloze_deft.storage.atomic import output_folder
from visualcloze_deft.storage.locks import WorkLocks
from visualcloze_deft.task_registry.files import load_tasks
from visualcloze_deft.task_registry.task import Task

MOST_PIXELS = 50_000_000  # of pictures kept from checking a list to making it: 150 MB
MANY = 20  # grids from which on reading their pictures gets a bar


def infer(
    source: Path,
    output: Path,
    settings: InferenceSettings,
    *,
    processes: int = 0,
    pictures: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    arguments: Sequence[str] = (),
) -> list[Path]:
    """Complete every grid of `source` that is not finished in `output`; returns the images
    written.

    source: a grid file, or a folder of them. pictures: it is a folder of pictures, each the query
    of compiled examples.
    processes: 0 is one for each GPU, as far as there are grids, or one. arguments: the command
    line, with which further processes are started. overwrite: make anew what was there before.
    """
    adapters = check(settings)
    check_processes(processes)
    if not dry_run:
        folder_of(settings.model)  # whose fingerprint the records hold
    since = float(os.environ.get(SINCE, time.time())) if overwrite else 0.0
    tasks = load_tasks(settings.all_task_folders)
    shared = shared_of(settings)
    entries = entries_of(source, settings, shared, pictures=pictures)
    plans = grid_jobs(entries, tasks, settings, shared, output)
    check_apart(plans)
    check_output(output)
    output_folder(output)
    check_inputs_stay(source, output, plans)
    waiting = [plan for plan in plans if not finished(output, plan, since=since)]
    if not prepared():
        for line in (
            *unread_words(waiting, settings.model, shared["clip_text"]),
            *other_bases(settings),
            *(described(plans, waiting, shared) if dry_run else ()),
        ):
            tqdm.write(line)
        if len(waiting) < len(plans) and not dry_run:
            tqdm.write(f"{len(plans) - len(waiting)} of {len(plans)} grids are finished already")
    if dry_run:
        return []
    count = processes or max(min(torch.cuda.device_count(), len(waiting)), 1)
    if count > 1 and not prepared():
        adapters.clear()  # each process reads them
        share(output, waiting, arguments, count, since=since)
    elif waiting:
        work(output, waiting, tasks, settings, adapters, since=since)
    return [output / name for plan in waiting for name in plan.names if (output / name).is_file()]


def entries_of(
    source: Path, settings: InferenceSettings, shared: Mapping[str, Any], *, pictures: bool
) -> list[Entry]:
    """The grids to complete. Raises `UserError` where compiled examples are of another model."""
    if settings.compiled is None:
        return read_entries(source)
    compiled = read_compiled(settings.compiled, whole=False)
    compiled.check_made_with(shared, where=str(settings.compiled))
    return picture_entries(source, compiled) if pictures else read_entries(source, compiled)


def grid_jobs(
    entries: Sequence[Entry],
    tasks: Mapping[str, Task],
    settings: InferenceSettings,
    shared: Mapping[str, Any],
    output: Path,
) -> list[GridJob]:
    """Every grid read: a mistake in the last one is found before the first one is made. Pictures
    are kept for making it, as far as `MOST_PIXELS` goes."""
    plans, pixels = [], 0
    few = len(entries) < MANY or prepared()
    for entry in tqdm(entries, desc="checking grids", unit="grid", disable=few):
        asked = requested(entry, tasks, settings)
        unfinished = not (output / f"{entry.name}.json").exists()
        if unfinished:
            pixels += sum(w * h for row in asked.sizes for w, h in filter(None, row))
        shape = strip_shapes(asked.sizes, shared["resolution"], shared["cells"])
        last = grid_cells(asked.sizes, shared["resolution"], shared["cells"])[-1]
        cells = [last[column] for column in asked.targets]
        ways = [(how, *cell) for how, cell in zip(asked.upsampling, cells, strict=False) if how]
        with entry.errors():
            for how, width, height in ways:
                how.size(width, height)
        steps = settings.steps + sum(how.steps(settings.steps) for how, *_ in ways)
        plans.append(
            GridJob(
                entry=entry,
                shape=shape,
                names=image_names(entry.name, asked),
                steps=steps * len(asked.seeds),
                prompts=(asked.prompt, *(how.prompt for how, *_ in ways if how.prompt)),
                record=record_of(asked, shared),
                asked=asked if unfinished and pixels <= MOST_PIXELS else None,
            )
        )
    return plans


def requested(entry: Entry, tasks: Mapping[str, Task], settings: InferenceSettings) -> Request:
    return entry.request(
        tasks, seed=settings.seed, images=settings.images, upsampling=settings.upsampling
    )


def work(
    output: Path,
    waiting: Sequence[GridJob],
    tasks: Mapping[str, Task],
    settings: InferenceSettings,
    adapters: dict[StoredAdapter, float],
    *,
    since: float,
) -> None:
    """Make what nobody else makes, grids of one shape together; then wait for what others make, and
    make what they leave undone when they end."""
    if all(finished(output, plan, since=since) for plan in waiting):  # by others, meanwhile
        return
    pipe, locks, examples = load(settings, adapters), WorkLocks(output), ExampleParts()
    adapters.clear()  # they are in the pipeline now
    check_unchanged(settings, waiting[0].record)
    if pipe.attention.line:
        tqdm.write(pipe.attention.line)
    used = {
        "attention_used": pipe.attention.backend,
        "attention_check": pipe.attention.line,
    }
    left, theirs = list(waiting), list[GridJob]()
    said = False
    with tqdm(total=sum(plan.steps for plan in left), desc="generating", unit="step") as bar:

        def step(_: Any, __: int, ___: Any, told: dict[str, Any]) -> dict[str, Any]:
            bar.update(len(told["latents"]))
            return told

        while left or theirs:
            if not left:
                if not said:
                    tqdm.write(f"waiting for what other processes make, {len(theirs)} grids")
                said = True
                time.sleep(WAIT)
                left, theirs = theirs, []
            chunk = next_batch(output, left, theirs, locks, bar, settings.batch, since=since)
            if not chunk:
                continue
            before = bar.n
            asked = [plan.asked or requested(plan.entry, tasks, settings) for plan in chunk]
            try:
                made = pipe.complete(
                    asked,
                    num_inference_steps=settings.steps,
                    guidance_scale=settings.guidance,
                    resolution=settings.resolution,
                    batch_size=settings.batch,
                    callback_on_step_end=step,
                    examples=examples,
                )
            except NotFinite as error:
                raise UserError(f"{chunk[error.grid].entry.where}: {error.why}") from None
            bar.update(before + sum(plan.steps for plan in chunk) - bar.n)
            for number, (plan, one) in enumerate(zip(chunk, asked, strict=True)):
                answers = [answer for answer in made.answers if answer.grid == number]
                record = plan.record | record_of_grid(one) | used
                write(output, replace(plan, record=record, asked=None), one, answers)
                locks.release(plan.entry.name)


def next_batch(
    output: Path,
    left: list[GridJob],
    theirs: list[GridJob],
    locks: WorkLocks,
    bar: Any,
    size: int,
    *,
    since: float,
) -> list[GridJob]:
    """Grids of one shape that this process has locked, taken from `left`; those that others make go
    to `theirs`, and finished ones count as made."""
    chunk: list[GridJob] = []
    images = 0
    for plan in [plan for plan in left if plan.shape == left[0].shape]:
        if chunk and images + plan.images > size:
            break
        left.remove(plan)
        if not locks.take(plan.entry.name):
            theirs.append(plan)
        elif finished(output, plan, since=since):  # by another, meanwhile
            bar.update(plan.steps)
            locks.release(plan.entry.name)
        else:
            clear_grid_parts(output, plan)
            chunk.append(plan)
            images += plan.images
    return chunk


def load(settings: InferenceSettings, adapters: Mapping[StoredAdapter, float]) -> InContextPipeline:
    """The pipeline that `settings` describe."""
    offloaded = settings.offload != "none"
    pipe = InContextPipeline.from_pretrained(
        settings.model,
        adapter=adapters,
        lora=settings.lora,
        device="cpu" if offloaded else None,
        torch_dtype=default_dtype("cuda" if torch.cuda.is_available() else "cpu"),
        quantise=settings.quantise,
        clip_text=settings.clip_text,
        cells=settings.cells,
        encodings=settings.encodings,
        task_folders=settings.all_task_folders,
        attention=NATIVE if offloaded else settings.attention,
    )
    pipe.set_context(settings.asked_context, untrained=settings.untrained_context)
    if settings.compiled is not None:
        pipe.load_compiled(settings.compiled)
    if settings.context_cache is not None:
        pipe.enable_context_cache(settings.context_cache)
    acceleration.enable(
        pipe,
        offload=settings.offload,
        cache=settings.cache,
        attention=settings.attention if offloaded else None,
        vae_tiling=settings.vae_tiling,
        compile_blocks=settings.compile_blocks,
    )
    pipe.blend.settle()
    pipe.set_progress_bar_config(disable=True)
    return pipe
