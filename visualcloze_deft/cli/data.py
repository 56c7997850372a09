"""`vcdeft data`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from visualcloze_deft.cli.app import CONTEXT, Commands, cli
from visualcloze_deft.cli.options import OVERWRITE, SEED, TASK_FOLDERS, places, png_path, run_of
from visualcloze_deft.cli.train import of_a_run
from visualcloze_deft.runtime.open_files import check_handles
from visualcloze_deft.training.files_needed import check_run


@cli.group(cls=Commands, context_settings=CONTEXT)
def data() -> None:
    """Check a data source, look at it, and compute the roles it lacks."""


CHECKED_SCENES = 8  # are a few seconds of one processor


@data.command("check", context_settings=CONTEXT)
@click.argument("source", metavar="NAME=PATH")
@TASK_FOLDERS
@click.option(
    "--workers",
    type=click.IntRange(0, 256),
    help="The number of reading processes. The default is one per core.",
)
def check_data(source: str, task_folders: tuple[str, ...], workers: int | None) -> None:
    """Read all pictures of a source: what it has, how masks and depth were read, which tasks it
    serves, what was left out and what is broken, and why.

    Exit code 1 where something is broken.

    \b
    vcdeft data check graph200k=/data/graph200k
    """
    workers = (os.cpu_count() or 1) if workers is None else workers
    check_handles(readers=workers, lower="--workers")
    from tqdm import tqdm

    from visualcloze_deft.data.check import look_at_all, report
    from visualcloze_deft.data.left_out import left_out
    from visualcloze_deft.data.sources import open_source
    from visualcloze_deft.task_registry.files import load_tasks

    tasks = load_tasks(map(Path, task_folders))
    if source == "scenes":  # which have no end
        source = f"scenes={CHECKED_SCENES}"
        click.echo(f"scenes are made without end; {CHECKED_SCENES} of them:")
    opened = open_source(source, size=512, seed=0)
    items = look_at_all(opened, workers=workers)
    seen = tqdm(items, desc="reading", total=len(opened), unit="item")
    lines, broken = report(seen, tasks)
    for line in lines:
        click.echo(line)
    for line in left_out(opened):
        click.echo(f"left out: {line}", err=True)
    for line in broken:
        click.echo(f"broken: {line}", err=True)
    if broken:
        click.echo(f"{len(broken)} pictures are broken", err=True)
        raise SystemExit(1)


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
