"""`vcdeft tasks`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from visualcloze_deft.cli.app import CONTEXT, Commands, cli
from visualcloze_deft.cli.options import (
    ANNOTATE,
    DATA,
    HOLD_OUT,
    MOST_IMAGES,
    OVERWRITE,
    RESOLUTION,
    REVISION,
    SEED,
    TASK_FOLDERS,
    png_path,
    preview_run,
)
from visualcloze_deft.errors import UserError

if TYPE_CHECKING:
    from visualcloze_deft.data.example import Example
    from visualcloze_deft.data.queries import Each
    from visualcloze_deft.task_registry.task import Task


@cli.group(cls=Commands, context_settings=CONTEXT)
def tasks() -> None:
    """List, show and preview tasks."""


@tasks.command("list", context_settings=CONTEXT)
@TASK_FOLDERS
@click.option("--json", "as_json", is_flag=True, help="Prints JSON.")
def list_tasks(task_folders: tuple[str, ...], as_json: bool) -> None:
    """All tasks by group: what is shown -> what is generated, in the roles that data must have."""
    from visualcloze_deft.task_registry.files import load_tasks

    known = load_tasks(map(Path, task_folders))
    if as_json:
        entries = [{"name": task.name, **task.as_file()} for task in known.values()]
        click.echo(json.dumps(entries, indent=1, ensure_ascii=False))
        return
    width = max(map(len, known)) + 2
    group = ""
    for task in known.values():
        if task.group != group:
            group = task.group
            click.echo(click.style(group, bold=True))
        arrow = f"{' + '.join(task.conditions)} -> {' + '.join(task.targets)}"
        click.echo(f"  {task.name:{width}}{arrow}")
    click.echo(f"{len(known)} tasks; 'vcdeft tasks show NAME' tells more of one")


@tasks.command("show", context_settings=CONTEXT)
@click.argument("name")
@TASK_FOLDERS
@click.option(
    "--model", help="Shows how much of a grid's text the text encoders of this model read."
)
@REVISION
@click.option("--content", default="", metavar="TEXT", help="A content sentence for --model.")
def show_task(
    name: str, task_folders: tuple[str, ...], model: str | None, revision: str | None, content: str
) -> None:
    """What task NAME shows, generates and says, and which data it can be made from.

    \b
    vcdeft tasks show depth-to-image --model tiny --content "a red mug on a table"
    """
    from visualcloze_deft.backbones.model_files import pinned
    from visualcloze_deft.data.derive import missing
    from visualcloze_deft.data.sources import ROLES_OF
    from visualcloze_deft.task_registry.files import load_tasks
    from visualcloze_deft.task_registry.select import way_out

    model = pinned(model, revision)
    known = load_tasks(map(Path, task_folders))
    if name not in known:
        raise UserError(f"unknown task {name!r}; {way_out(name, known)}")
    task = known[name]
    click.echo(f"{click.style(name, bold=True)}, in {task.group}, from {task.path}")
    click.echo(task.summary)
    for role, phrases in task.columns.items():
        kind = "generated" if role in task.targets else "shown"
        click.echo(f"  {kind:10}{role}: {' / '.join(phrases)}")
    for sentence in task.instructions:
        click.echo(f"  says      {sentence}")
    if task.content:
        click.echo(f"  and       the {task.content} of what is generated")
    able = [source for source, roles in ROLES_OF.items() if not missing(task.roles, roles)]
    click.echo(f"  data      {', '.join([*able, 'folder'])} (where its items have these roles)")
    if model is not None:
        show_text(task, model, content)


def show_text(task: Task, model: str, content: str) -> None:
    """What each text encoder of `model` reads of a grid of two rows, and what it does not."""
    from visualcloze_deft.backbones.flux_fill.clip_text import clip_text, fits, unread
    from visualcloze_deft.backbones.flux_fill.loading import load_tokenizers
    from visualcloze_deft.backbones.flux_fill.model import text_length
    from visualcloze_deft.grids.prompt import Prompt

    clip, t5 = load_tokenizers(model)
    whole = Prompt(rows=2, columns=len(task.roles), task=task.sentence(), content=content)
    read = [
        ("T5", t5, text_length(t5), str(whole)),
        ("CLIP", clip, clip.model_max_length, clip_text(whole, fits(clip))),
        ("CLIP, original order", clip, clip.model_max_length, str(whole)),
    ]
    for encoder, tokenizer, length, text in read:
        count = len(tokenizer(text, verbose=False).input_ids)
        click.echo(f"{encoder}: {count} tokens, reads {min(count, length)} of at most {length}")
        click.echo(f"  {text}")
        if lost := unread(tokenizer, text, length):
            click.echo(f"  lost: {lost}")


@tasks.command("new", context_settings=CONTEXT)
@click.argument("name")
@click.option(
    "--columns",
    required=True,
    metavar="ROLE,ROLE,...",
    help="The columns of a row, in order: the roles of your data. The last one is generated.",
)
@click.option(
    "--targets",
    default="",
    metavar="ROLE,...",
    help="The last columns, where several are generated.",
)
@click.option(
    "--task-folder",
    default="my_tasks",
    show_default=True,
    metavar="DIR",
    help="The folder to write into. Other commands take the same option.",
)
def new_task(name: str, columns: str, targets: str, task_folder: str) -> None:
    """Write a task file with comments, for a task that none of the shipped ones is.

    \b
    vcdeft tasks new relight --columns before,after
    vcdeft train --tasks relight --task-folder my_tasks --data folder=PATH
    """
    from visualcloze_deft.task_registry.new_task import write_new_task

    split = [
        [part.strip() for part in text.split(",") if part.strip()] for text in (columns, targets)
    ]
    path = write_new_task(name, split[0], Path(task_folder), targets=split[1])
    click.echo(f"{path}: edit its sentences, then")
    click.echo(f"  vcdeft tasks check {path}")
    click.echo(f"  vcdeft train --tasks {name} --task-folder {task_folder} --data folder=PATH")


@tasks.command("check", context_settings=CONTEXT)
@click.argument("file", required=False)
@TASK_FOLDERS
def check_tasks(file: str | None, task_folders: tuple[str, ...]) -> None:
    """Say what is wrong with a task FILE, and where; without one, check all files."""
    from visualcloze_deft.task_registry.files import load_roles, load_tasks, read_tasks
    from visualcloze_deft.task_registry.new_task import PLACEHOLDER

    if file is not None and not Path(file).is_file():
        raise UserError(f"{file}: no such file")
    if file is None:
        found = list(load_tasks(map(Path, task_folders)).values())
    else:
        found = read_tasks(Path(file), load_roles([*map(Path, task_folders), Path(file).parent]))
    unedited = [task.name for task in found if task.summary == PLACEHOLDER]
    said = f"the summary is still the template's: {', '.join(unedited)}"
    said = said if unedited else "nothing wrong"
    click.echo(f"{len(found)} tasks, {said}" if len(found) > 3 else said)
    for task in found if len(found) <= 3 else ():
        click.echo(f"  {task.name}: {task.sentence()}")


@tasks.command("preview", context_settings=CONTEXT)
@click.argument("name")
@TASK_FOLDERS
@DATA
@ANNOTATE
@click.option("--count", type=click.IntRange(1, 64), default=8, show_default=True)
@click.option(
    "--each",
    type=click.Choice(["task", "group"]),
    help="Draws one grid of each, as 'vcdeft infer' gets it, instead of --count examples.",
)
@HOLD_OUT
@click.option("--seed", type=SEED, default=0, show_default=True)
@RESOLUTION
@click.option("--output", default="preview.png", show_default=True, metavar="FILE")
@OVERWRITE
def preview(
    name: str,
    task_folders: tuple[str, ...],
    data: tuple[str, ...],
    annotate: tuple[str, ...],
    count: int,
    each: Each | None,
    validation_every: int | None,
    seed: int,
    resolution: int | None,
    output: str,
    overwrite: bool,
) -> None:
    """Draw sample grids of task NAME (or 'all') as training sees them, into a PNG.

    \b
    vcdeft tasks preview deraining --data folder=photos
    vcdeft tasks preview all --each group --data graph200k=PATH --data scenes
    """
    from visualcloze_deft.data.queries import one_of_each
    from visualcloze_deft.reporting.contact_sheet import write_preview
    from visualcloze_deft.training.run_data import mixture_of
    from visualcloze_deft.training.sample_sheets import example_sheet

    run = preview_run(name, task_folders, data, annotate, validation_every, seed, resolution)
    mixture = mixture_of(run, held_out=True)
    path = png_path(output, overwrite=overwrite)
    drawn = one_of_each(mixture, each) if each else [mixture[k] for k in range(count)]
    write_preview(example_sheet(drawn), path, of=f"tasks {name}")
    click.echo(path)


@tasks.command("example", context_settings=CONTEXT)
@click.argument("name")
@TASK_FOLDERS
@DATA
@ANNOTATE
@click.option(
    "--count",
    type=click.IntRange(1, MOST_IMAGES),
    default=1,
    show_default=True,
    help="The number of grids for each task.",
)
@click.option("--rows", type=click.IntRange(1, 4), default=2, show_default=True)
@click.option(
    "--content", default="", help="The content prompt of all grids, in place of captions."
)
@HOLD_OUT
@click.option("--seed", type=SEED, default=1, show_default=True)
@RESOLUTION
@click.option("--output", default="grids", show_default=True, metavar="DIR")
def example(
    name: str,
    task_folders: tuple[str, ...],
    data: tuple[str, ...],
    annotate: tuple[str, ...],
    count: int,
    rows: int,
    content: str,
    validation_every: int | None,
    seed: int,
    resolution: int | None,
    output: str,
) -> None:
    """Write grids of task NAME (or 'all') with their pictures: a grid.json for 'vcdeft infer'.

    Data that has what a task shows, but nothing that it generates, is asked: its pictures come last
    in grids without a truth, below rows from other data.

    \b
    vcdeft tasks example subject-driven --data dreambench-plus=PATH --data dreambooth=PATH
    """
    from visualcloze_deft.data.unpaired import check_paired
    from visualcloze_deft.inference.grid_files import write_grids
    from visualcloze_deft.task_registry.files import load_tasks
    from visualcloze_deft.training.run_data import resolution_of, sources_of, tasks_of
    from visualcloze_deft.training.sample_sheets import grids_to_try

    run = preview_run(name, task_folders, data, annotate, validation_every, seed, resolution)
    _, tasks = tasks_of(run)
    sources = sources_of(run, held_out=True)
    check_paired(tasks, sources, load_tasks(map(Path, task_folders)))
    grids = grids_to_try(
        tasks, sources, seed=seed, resolution=resolution_of(run), count=count, rows=rows
    )
    grids = (replace(grid, content=content or grid.content) for grid in grids)
    made: Counter[str] = Counter()
    click.echo(write_grids(counted(grids, made), Path(output)))
    for task, number in made.items():
        if number < count:
            click.echo(f"{task}: {number} grids, one for each item that it can ask for", err=True)


def counted(grids: Iterable[Example], made: Counter[str]) -> Iterator[Example]:
    """`grids` as they are; `made` counts them by task."""
    for grid in grids:
        made[grid.task] += 1
        yield grid
