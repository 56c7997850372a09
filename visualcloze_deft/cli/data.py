"""`vcdeft data`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from visualcloze_deft.cli.app import CONTEXT, Commands, cli
from visualcloze_deft.cli.options import OVERWRITE, SEED, TASK_FOLDERS, places, png_path, run_of
from visualcloze_deft.cli.train import of_a_run
from visualcloze_deft.errors import UserError
from visualcloze_deft.runtime.open_files import check_handles
from visualcloze_deft.training.files_needed import check_run

if TYPE_CHECKING:
    from visualcloze_deft.data.check import SourceReport
    from visualcloze_deft.task_registry.task import Task


@cli.group(cls=Commands, context_settings=CONTEXT)
def data() -> None:
    """Check a data source, look at it, and compute the roles it lacks."""


CHECKED_SCENES = 8  # are a few seconds of one processor


@data.command("check", context_settings=CONTEXT)
@click.argument("sources", nargs=-1, required=True, metavar="NAME=PATH...")
@TASK_FOLDERS
@click.option(
    "--workers",
    type=click.IntRange(0, 256),
    help="The number of reading processes. The default is one per core.",
)
def check_data(
    sources: tuple[str, ...], task_folders: tuple[str, ...], workers: int | None
) -> None:
    """Read all pictures of sources: what they have, how files were read, which tasks they serve,
    what was left out and all that is broken, and why. Ends with the command that trains on them.

    Exit code 1 where something is broken, 2 where a source cannot be opened.

    \b
    vcdeft data check folder=photos
    vcdeft data check graph200k=/data/graph200k folder=photos
    """
    workers = (os.cpu_count() or 1) if workers is None else workers
    check_handles(readers=workers, lower="--workers")
    from visualcloze_deft.data.served import train_command
    from visualcloze_deft.task_registry.files import load_tasks

    tasks = load_tasks(map(Path, task_folders))
    reports: dict[str, SourceReport] = {}
    unopened = []
    for source in dict.fromkeys(sources):
        if len(sources) > 1:
            click.echo(f"\n== {source}")
        try:
            reports[source] = _checked(source, tasks, workers)
        except UserError as error:
            unopened.append(error)
            if len(sources) > 1:
                click.echo(f"broken: {error}", err=True)
    if len(sources) == 1 and unopened:
        raise unopened[0]
    if broken := sum(len(one.broken) for one in reports.values()):
        click.echo(f"{broken} pictures or rows are broken", err=True)
    kinds = {source: one.kinds for source, one in reports.items()}
    units = {source: one.units for source, one in reports.items()}
    if command := train_command(kinds, tasks, task_folders, units=units):
        click.echo(f"\ntrain on it, here on the built-in model:\n  {command}")
    if unopened or broken:
        raise SystemExit(2 if unopened else 1)


def _checked(source: str, tasks: Mapping[str, Task], workers: int) -> SourceReport:
    """Say what there is to say of one source."""
    from tqdm import tqdm

    from visualcloze_deft.data.base import unit_count
    from visualcloze_deft.data.check import look_at_all, report
    from visualcloze_deft.data.left_out import left_out
    from visualcloze_deft.data.sources import open_source
    from visualcloze_deft.data.sources.folder import Folder
    from visualcloze_deft.data.unpaired import missing_tasks_for

    if source == "scenes":  # which have no end
        source = f"scenes={CHECKED_SCENES}"
        click.echo(f"scenes are made without end; {CHECKED_SCENES} of them:")
    faults: list[UserError] = []
    try:
        opened = open_source(source, size=512, seed=0, on_fault=faults.append)
    finally:
        for fault in faults:
            click.echo(f"broken: {fault}", err=True)
    items = look_at_all(opened, workers=workers)
    seen = tqdm(items, desc="reading", total=len(opened), unit="item")
    notes = opened.notes if isinstance(opened, Folder) else ()
    found = report(seen, tasks, source=opened.name, notes=notes)
    for line in [*found.lines, *missing_tasks_for(opened.name, found.kinds, tasks)]:
        click.echo(line)
    for line in left_out(opened):
        click.echo(f"left out: {line}", err=True)
    for line in found.broken:
        click.echo(f"broken: {line}", err=True)
    units = unit_count(opened) if isinstance(opened, Folder) else 0
    return replace(found, broken=[*map(str, faults), *found.broken], units=units)


@data.command("preview", context_settings=CONTEXT)
@click.argument("source", metavar="NAME=PATH")
@click.option("--count", type=click.IntRange(1, 64), default=8, show_default=True)
@click.option("--seed", type=SEED, default=0, show_default=True)
@click.option("--output", default="data.png", show_default=True, metavar="FILE")
@OVERWRITE
def preview_data(source: str, count: int, seed: int, output: str, overwrite: bool) -> None:
    """Draw some items of a source, all their roles side by side, into a PNG."""
    from visualcloze_deft.data.sources import open_source
    from visualcloze_deft.reporting.contact_sheet import write_preview
    from visualcloze_deft.training.sample_sheets import item_sheet

    path = png_path(output, overwrite=overwrite)
    sheet = item_sheet(open_source(source, size=256, seed=seed), count=count, seed=seed)
    write_preview(sheet, path, of=f"data {source}")
    click.echo(path)


@data.command("annotate", context_settings=CONTEXT)
@click.argument("source", metavar="NAME=PATH")
@click.option(
    "--annotate",
    required=True,
    multiple=True,
    metavar="ROLE=MODEL",
    help="The role to compute and the model that computes it. Repeatable.",
)
@click.option(
    "--output",
    required=True,
    metavar="DIR",
    help="The folder to write. The same command continues an interrupted one.",
)
def annotate_data(source: str, annotate: tuple[str, ...], output: str) -> None:
    """Compute roles that a source lacks from its targets, once, for training to read.

    ROLE is depth, normal, segmentation, uniformer or mask; MODEL a folder or hub id of transformers
    for depth estimation (depth, normal) or image segmentation. Exit code 1 where something is
    broken.

    \b
    vcdeft data annotate folder=photos --output photo-maps \\
        --annotate depth=depth-anything/Depth-Anything-V2-Small-hf
    vcdeft train --data folder=photos --annotate depth=photo-maps --tasks depth-to-image
    """
    from visualcloze_deft.data.annotation.source import annotate as write
    from visualcloze_deft.data.annotation.source import check_models
    from visualcloze_deft.data.sources import open_source

    models = places(annotate)
    check_models(models)
    opened = open_source(source, size=512, seed=0)
    written = write(opened, models, Path(output), spec=source)
    click.echo(f"{output}: {written.made} pictures made, {written.kept} were there")
    for line in written.broken:
        click.echo(f"broken: {line}", err=True)
    if written.broken:
        click.echo(f"{len(written.broken)} items cannot be annotated", err=True)
        raise SystemExit(1)


@data.command("caption", context_settings=CONTEXT)
@click.argument("source", metavar="folder=PATH")
@click.option(
    "--model",
    required=True,
    metavar="PLACE",
    help="A vision-language model: a folder or hub id that transformers' image-text-to-text reads.",
)
@click.option(
    "--prompt",
    metavar="TEXT",
    help="The question to the model. The default asks for one or two sentences.",
)
@click.option(
    "--batch",
    type=click.IntRange(1, 1024),
    default=4,
    show_default=True,
    help="The number of images that the model sees at once.",
)
@click.option(
    "--output",
    metavar="DIR",
    help="A folder for all captions. By default each stands beside its image.",
)
@click.option("--overwrite", is_flag=True, help="Writes captions anew, also those edited by hand.")
def caption_data(
    source: str, model: str, prompt: str | None, batch: int, output: str | None, overwrite: bool
) -> None:
    """Write a caption for each target that has none, with a vision-language model.

    A caption is a .txt beside its image, or in caption/ beside a shard. 'folder' reads it there.
    Edit it as you like: the same command keeps the captions that are there, so it also continues an
    interrupted one. Exit code 1 where something is broken.

    \b
    vcdeft data caption folder=photos --model HuggingFaceTB/SmolVLM-Instruct
    vcdeft data caption folder=photos --model qwen --prompt "Name the object in three words."
    """
    from visualcloze_deft.config.source_specs import name_and_place
    from visualcloze_deft.data.annotation.caption_models import check_captioner
    from visualcloze_deft.data.annotation.captions import caption
    from visualcloze_deft.data.sources.folder import Folder

    name, place = name_and_place(source)
    if name != "folder" or not place:
        raise UserError(f"{source!r}: captions are written for folder=PATH alone")
    opened = Folder(Path(place))
    check_captioner(model)
    written = caption(
        opened,
        model,
        prompt=prompt,
        batch=batch,
        output=Path(output) if output else None,
        overwrite=overwrite,
    )
    click.echo(f"{output or source}: {written.made} captions made, {written.kept} were there")
    for line in written.broken:
        click.echo(f"broken: {line}", err=True)
    if written.broken:
        click.echo(f"{len(written.broken)} images have no caption", err=True)
        raise SystemExit(1)


@data.command("cache", context_settings=CONTEXT, params=of_a_run())
@click.option(
    "--output",
    required=True,
    metavar="DIR",
    help="The folder to write. The same command continues an interrupted one.",
)
@click.option(
    "--examples",
    type=click.IntRange(1, 10**9),
    metavar="N",
    help="The number of examples. By default the cache covers the whole run.",
)
@click.option(
    "--text-only",
    is_flag=True,
    help="Caches text embeddings alone: texts are few and take long to encode.",
)
@click.pass_obj
def cache_data(
    arguments: Sequence[str],
    /,
    config: str | None,
    data: tuple[str, ...],
    annotate: tuple[str, ...],
    overrides: tuple[str, ...],
    output: str,
    examples: int | None,
    text_only: bool,
    **options: Any,
) -> None:
    """Encode what a run will draw, before it: give the options of 'vcdeft train'.

    The run then finds it with --set data.embedding_cache=DIR. Runs may share a folder.

    \b
    vcdeft data cache --config flux-8gpu --data graph200k=PATH --output encodings
    vcdeft train --config flux-8gpu --data graph200k=PATH --set data.embedding_cache=encodings \\
        --set offload_encoders=true
    """
    from visualcloze_deft.runtime.launch import (
        already_launched,
        forget_group,
        launch,
        process_count,
    )
    from visualcloze_deft.training.cache_latents import encode_run, prepare

    run = run_of(config, data, annotate, overrides, options)
    check_run(run)
    processes = process_count(run.processes)
    launched = already_launched()
    if processes == 1 or launched:
        if not launched:
            forget_group()
        encode_run(run, Path(output), examples=examples, text_only=text_only)
        return
    prepare(run, Path(output))
    if status := launch(arguments, processes=processes):
        raise SystemExit(status)
