"""The command line. Heavy imports stand inside the commands: help and listings need no torch."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click
from click.core import ParameterSource

from visualcloze_deft.errors import REFUSED, Logged, UserError, nearest, refusal
from visualcloze_deft.handles import check_handles, check_run, raise_limit
from visualcloze_deft.signals import end_with_launcher

if TYPE_CHECKING:
    from visualcloze_deft.data.mixture import Mixture
    from visualcloze_deft.export import Format
    from visualcloze_deft.preview import Each
    from visualcloze_deft.registry import Task
    from visualcloze_deft.settings import Run

SAYING = ("click.utils", "tqdm.std", "tqdm.utils")  # modules that write to standard output
MOST_IMAGES = 10_000  # of a grid, and of a task
SEED = click.IntRange(0, 2**63 - 1)
CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}

DATA = click.option(
    "--data", multiple=True, metavar="NAME=PATH", help="Source; repeatable. Default: scenes."
)


ANNOTATE = click.option(
    "--annotate",
    multiple=True,
    metavar="ROLE=PLACE",
    help="Where data lacks a role, compute it from the target: by a model of transformers, or from "
    "what 'vcdeft data annotate' wrote. Repeatable.",
)


class Commands(click.Group):
    """A group that knows what was meant by a mistyped command."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            ctx.fail(f"no such command {args[0]!r}; {nearest(args[0], self.list_commands(ctx))}")
        return super().resolve_command(ctx, args)


@click.group(cls=Commands, context_settings=CONTEXT)
@click.version_option(package_name="visualcloze-deft")
@click.option("--local_rank", type=int, hidden=True, expose_value=False)  # DeepSpeed's launcher
def cli() -> None:
    """Unified in-context image generation: show rows of images, the model fills the missing one.

    \b
    First steps:
      vcdeft tasks list                           what grids it knows
      vcdeft train --tasks all --zero 2           one DEFT adapter for all tasks
      vcdeft plan --config flux-8gpu              what a run needs of each GPU, known before
      vcdeft infer --examples grid.json --adapter runs/demo/adapter
      vcdeft compare compare-scenes               DEFT, PaRa and LoRA on the same examples
      vcdeft eval runs/demo/adapter --suite scenes --output evaluation    figures that hold
    """


def number_or_word(_: click.Context, __: click.Parameter, text: str | None) -> int | str | None:
    number = text is not None and text.isdecimal() and len(text) < 10
    return int(text) if number and text is not None else text


REVISION = click.option(
    "--revision", metavar="REV", help="Of --model on the hub: a branch, tag or commit."
)

RUN_OPTIONS = [
    click.option("--config", metavar="FILE", help="Run file (TOML), or the name of a shipped one."),
    click.option(
        "--model", help="'tiny' (default), a diffusers folder, or a hub id of FLUX.1-Fill."
    ),
    REVISION,
    DATA,
    ANNOTATE,
    click.option(
        "--tasks",
        help="'all', names, groups, patterns; '-restoration/*' takes out, 'NAME=2' draws more "
        "often.",
    ),
    click.option("--method", help="deft, deft-relaxed, para or lora."),
    click.option("--rank", type=int, help="Rank of the adapter."),
    click.option(
        "--zero",
        callback=number_or_word,
        help="DeepSpeed ZeRO stage: 0, 1, 2, 3, or 'auto', the lowest that fits.",
    ),
    click.option(
        "--checkpoint-blocks",
        callback=number_or_word,
        help="Blocks to recompute in the backward pass: a number, 'all', 'none', or 'auto', as "
        "many as memory needs.",
    ),
    click.option("--steps", type=int, help="Optimiser steps in all."),
    click.option("--batch", type=int, help="Grids per process and step."),
    click.option("--resolution", type=int, help="Side of a square cell in pixels."),
    click.option("--lr", type=float, help="Learning rate."),
    click.option("--seed", type=int, help="Seed of everything random."),
    click.option("--output", metavar="DIR", help="Run folder; default: the run file's, runs/demo."),
    click.option(
        "--processes", type=int, help="Default: one per GPU; two on a machine without GPU."
    ),
    click.option(
        "--set", "overrides", multiple=True, metavar="NAME=VALUE", help="Any other setting."
    ),
]  # of `train` and `plan`


def run_options(command: Callable[..., None]) -> Callable[..., None]:
    for option in reversed(RUN_OPTIONS):
        command = option(command)
    return command


def run_of(
    config: str | None,
    data: Sequence[str],
    annotate: Sequence[str],
    overrides: Sequence[str],
    options: Mapping[str, Any],
) -> Run:
    """The settings that `RUN_OPTIONS` say, over a run file."""
    from visualcloze_deft.modelfolder import pinned
    from visualcloze_deft.settings import config_for, load_run

    options = dict(options)
    options["model"] = pinned(options["model"], options.pop("revision", None))
    names = {
        "tasks": "data.tasks",
        "method": "adapter.method",
        "rank": "adapter.rank",
        "resolution": "data.resolution",
        "lr": "optimiser.lr",
    }
    given = [
        f"{names.get(name, name)}="
        f"{json.dumps(value, ensure_ascii=False) if isinstance(value, str) else value}"
        for name, value in options.items()
        if value is not None
    ]
    if data:
        given.append(f"data.sources={json.dumps(list(data), ensure_ascii=False)}")
    for role, place in places(annotate).items():
        given.append(f"data.annotate.{role}={json.dumps(place, ensure_ascii=False)}")
    return load_run(config or config_for(options["model"], data), [*given, *overrides])


@cli.command(context_settings=CONTEXT)
@run_options
@click.option(
    "--attention",
    metavar="NAME",
    help="Kernel of attention: native, cudnn, flash, efficient, math or another backend of "
    "diffusers; auto (default): on a GPU the fastest whose gradients are right there.",
)
@click.option("--resume", is_flag=True, help="Go on from the newest checkpoint in --output.")
@click.option("--dry-run", is_flag=True, help="One step, one save, one sheet; then say the rest.")
@click.option(
    "--allow-change",
    "allowed",
    multiple=True,
    metavar="NAME",
    help="With --resume: a setting that may differ from before, e.g. optimiser.lr.",
)
@click.pass_obj
def train(
    arguments: Sequence[str],
    /,
    config: str | None,
    data: tuple[str, ...],
    annotate: tuple[str, ...],
    overrides: tuple[str, ...],
    allowed: tuple[str, ...],
    resume: bool,
    dry_run: bool,
    **options: Any,
) -> None:
    """Train one adapter for all tasks. Starts its own processes; also runs under torchrun,
    accelerate launch and deepspeed.

    \b
    vcdeft train --tasks all --zero 2
    vcdeft train --config flux-8gpu --data graph200k=/data/graph200k
    vcdeft train --tasks depth-to-image --method lora --rank 8 --set optimiser.warmup=100
    vcdeft train --data folder=photos --annotate depth=depth-anything/Depth-Anything-V2-Small-hf
    """
    from visualcloze_deft.launch import (
        already_launched,
        launch,
        prepared,
        process_count,
        rank,
    )
    from visualcloze_deft.rehearsal import rehearsed, report
    from visualcloze_deft.rundir import SETTINGS, as_decided, own, prepare

    if resume and config is None:
        saved = Path(options["output"] or "runs/demo") / SETTINGS
        config = str(saved) if saved.is_file() else None
    wanted = run_of(config, data, annotate, overrides, options)
    check_run(wanted)
    if allowed and not resume:
        raise UserError("--allow-change goes with --resume")
    if dry_run and resume:
        raise UserError("--dry-run starts a run of its own: leave --resume")
    named = options["batch"] or any(o.startswith(("batch", "accumulate")) for o in overrides)
    divide = resume and not named
    with ExitStack() as held:
        run = held.enter_context(rehearsed(wanted)) if dry_run and rank() == 0 else wanted
        if already_launched():
            from visualcloze_deft.train import train as train_here

            train_here(run, resume=resume, prepared=prepared(), allowed=allowed, divide=divide)
        else:
            processes = process_count(run.processes)
            held.enter_context(own(Path(run.output)))
            mixture = prepare(
                run, processes=processes, resume=resume, allowed=allowed, divide=divide
            )
            run = as_decided(run)
            describe_run(run, mixture, processes)
            words = ["train", "--config", f"{run.output}/{SETTINGS}"] if dry_run else arguments
            if status := launch(words, processes=processes):
                raise SystemExit(status)
        if dry_run and rank() == 0:
            click.echo("\n".join(report(wanted, run)))
    if not dry_run and not already_launched():
        click.echo(f"adapter: {run.output}/adapter   report: {run.output}/report.html")


NOT_OF_A_RUN = ("output", "resume", "allowed", "dry_run")


def of_a_run() -> list[click.Parameter]:
    """The options of `vcdeft train` that say what its run is."""
    return [option for option in train.params if option.name not in NOT_OF_A_RUN]


@cli.command("report", context_settings=CONTEXT)
@click.argument("run", metavar="RUN")
def report_on(run: str) -> None:
    """Draw how training in the folder RUN goes, or went, into RUN/report.html.

    Curves, losses on held-out grids, the last sheet and the settings, in one file that opens
    without a server. A run writes it at its end; this makes it of one that is under way.

    \b
    vcdeft report runs/demo
    """
    from visualcloze_deft.report import write_report

    click.echo(write_report(Path(run)))


@cli.command("compare", context_settings=CONTEXT)
@click.argument("config", metavar="CONFIG")
@click.option("--output", metavar="DIR", help="Default: the comparison file's.")
@click.option("--dry-run", is_flag=True, help="Check all; list trainings, ranks, what is done.")
@click.option(
    "--set", "overrides", multiple=True, metavar="NAME=VALUE", help="Any setting of the file."
)
def compare_methods(
    config: str, output: str | None, dry_run: bool, overrides: tuple[str, ...]
) -> None:
    """Train DEFT, PaRa and LoRA on the same examples in the same order, at the same rank and with
    as many trained values, several seeds each; then measure the gain on what is new and what is
    kept of the old.

    CONFIG is a comparison file (TOML) or the name of a shipped one: compare-scenes,
    compare-subject, compare-flux, compare-flux-subject. Results are tables (Markdown, CSV), a page
    that opens without a server and a line for each task: see docs/compare.md. A call that was ended
    goes on where it stopped: the same command.

    \b
    vcdeft compare compare-scenes --dry-run
    vcdeft compare compare-scenes
    vcdeft compare compare-scenes --set seeds=[0,1,2,3,4] --output runs/compare-scenes
    vcdeft compare mine.toml --set rank=16 --set method.lora.optimiser.lr=1e-4
    """
    from visualcloze_deft.compare import compare, described, planned
    from visualcloze_deft.compare_config import load_comparison

    given = [f"output={json.dumps(output, ensure_ascii=False)}"] if output else []
    comparison = load_comparison(config, [*overrides, *given])
    if dry_run:
        for line in described(planned(comparison)):
            click.echo(line)
        return
    path = compare(comparison)
    click.echo(path.read_text(encoding="utf-8").partition("### Methods in pairs")[0].rstrip())
    click.echo(f"tables: {path}   report: {path.with_name('report.html')}")


def describe_run(run: Run, mixture: Mixture, processes: int) -> None:
    """The first lines of a run: what, on what, how."""
    from visualcloze_deft.data.mixture import idle
    from visualcloze_deft.memory import memory_here, plan_here
    from visualcloze_deft.planned import in_short
    from visualcloze_deft.registry import load_tasks
    from visualcloze_deft.rundir import load_in, plan_of, to_plan, weights_of

    weights = weights_of(run, load_tasks(map(Path, run.data.task_folders)))
    by_group: dict[str, list[float]] = {}
    for task, share in zip(mixture.tasks.values(), mixture.proportions, strict=True):
        by_group.setdefault(task.group, []).append(float(share))
    click.echo(f"model    {run.model}   adapter {run.adapter.method}, rank {run.adapter.rank}")
    click.echo(f"data     {', '.join(run.data.sources)}")
    for source in idle(mixture.tasks, mixture.sources):
        click.echo(f"         {source.name} has nothing that these tasks are trained on")
    click.echo(f"tasks    {len(mixture.tasks)}, the share of each in {run.output}/versions.json")
    for group, shares in sorted(by_group.items(), key=lambda pair: -sum(pair[1])):
        many = f", {len(shares)} tasks" if len(shares) > 1 else ""
        click.echo(f"         {sum(shares):6.1%} {group}{many}")
    if unweighted := sum(not weight for weight in weights.values()):
        click.echo(f"         {unweighted} more have weight 0 here; --tasks NAME trains one")
    if left_out := len(weights) - unweighted - len(mixture.tasks):
        click.echo(f"         {left_out} more are left out: no data has their roles")
    part = f"{run.batch_tokens} tokens" if run.batch_tokens else f"{run.batch} grids"
    click.echo(
        f"training {run.steps} steps of {processes} x {run.accumulate} x {part}, "
        f"ZeRO-{run.zero}, into {run.output}"
    )
    memory = plan_here(to_plan(run), load_in(run, mixture), processes=processes)
    for line in in_short(memory, memory_here(processes)):
        click.echo(line)
    if run.batch_tokens:
        steps = list(islice(plan_of(run, mixture, processes=processes).steps(0), 20))
        grids = [step.examples / len(step.parts) for step in steps]
        waiting = sum(step.idle for step in steps) / len(steps)
        span = f"{min(grids):.1f} to {max(grids):.1f}"
        click.echo(
            f"         {span} grids a batch, {waiting:.1%} of the time waiting for the largest"
        )


@cli.command(context_settings=CONTEXT)
@run_options
@click.option("--memory", metavar="SIZE", help="Of a GPU, e.g. 80GB; default: what is here.")
@click.option("--grid", metavar="ROWSxCOLUMNS", help="The largest grid; default: that of the data.")
@click.option("--run", "before", metavar="DIR", help="An earlier run, for its steps an hour.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def plan(
    config: str | None,
    data: tuple[str, ...],
    annotate: tuple[str, ...],
    overrides: tuple[str, ...],
    memory: str | None,
    grid: str | None,
    before: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """What `vcdeft train` with the same options needs of each GPU, before a weight is read: for
    every ZeRO stage, with blocks recomputed or not. Needs of a model its config.json files alone.

    \b
    vcdeft plan --config flux-8gpu --data graph200k=/data/graph200k
    vcdeft plan --config flux-1gpu --grid 3x3 --memory 24GB --processes 1 --set quantise=nf4
    """
    from visualcloze_deft import planned

    run = run_of(config, data, annotate, overrides, options)
    found = planned.planned(run, memory=memory, grid=grid, before=Path(before) if before else None)
    click.echo(json.dumps(found.as_json(), indent=1) if as_json else found.as_table())


@cli.command(context_settings=CONTEXT)
@click.option("--examples", required=True, metavar="FILE", help="Grid file (JSON), or a folder.")
@click.option("--model", default="tiny", show_default=True, help="Folder or hub id of FLUX.1-Fill.")
@REVISION
@click.option("--lora", metavar="PATH", help="FLUX LoRA merged into the base, e.g. VisualCloze's.")
@click.option(
    "--adapter",
    "adapter",
    multiple=True,
    metavar="DIR[=STRENGTH]",
    help="Adapter folder, e.g. runs/demo/adapter. Repeatable: they add up.",
)
@click.option(
    "--quantise",
    type=click.Choice(["none", "int8", "nf4", "fp8"]),
    default="none",
    show_default=True,
    help="What the blocks are kept in; int8 and nf4 need bitsandbytes.",
)
@click.option(
    "--clip-text",
    type=click.Choice(["fit", "original"]),
    help="Which part of a long text CLIP reads; default: as the adapter was trained.",
)
@click.option(
    "--cells",
    type=click.Choice(["row", "own", "square"]),
    help="Shape of cells: their row's first picture's, their own; default: as the adapter's.",
)
@click.option("--output", default="outputs", show_default=True, metavar="DIR")
@click.option("--overwrite", is_flag=True, help="Make anew what --output has already.")
@click.option("--seed", type=int, help="Replaces the seeds of the file.")
@click.option(
    "--images",
    type=click.IntRange(1, MOST_IMAGES),
    default=1,
    show_default=True,
    help="Of each grid, with seeds that follow one another.",
)
@click.option("--steps", type=click.IntRange(1, 1000), default=30, show_default=True)
@click.option("--guidance", type=float, default=30.0, show_default=True)
@click.option("--resolution", type=click.IntRange(32, 2048), help="Default: the model's.")
@click.option("--upsample", type=float, metavar="SCALE", help="Enlarge the images by the model.")
@click.option("--strength", type=float, help="How much of --upsample is made anew, 0..1: 0.4.")
@click.option(
    "--batch",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Images of grids of one shape that are made together.",
)
@click.option(
    "--processes",
    type=click.IntRange(1),
    help="Share the list; default: one per GPU. Further calls share it, too.",
)
@click.option("--encodings", metavar="DIR", help="Keep encoded rows and texts for further runs.")
@click.option(
    "--offload",
    type=click.Choice(["none", "model", "group", "sequential"]),
    default="none",
    show_default=True,
    help="Keep weights that are not at work out of the GPU.",
)
@click.option("--vae-tiling", is_flag=True, help="Encode and decode in tiles, in less memory.")
@click.option("--compile", "compile_blocks", is_flag=True, help="Compile the blocks (torch).")
@click.option(
    "--cache",
    metavar="NAME[=NUMBER]",
    help="Skip steps that change little: first-block or taylorseer. Changes the images.",
)
@click.option(
    "--attention",
    default="auto",
    show_default=True,
    metavar="NAME",
    help="Kernel of attention: native, cudnn, flash, efficient, math or another backend of "
    "diffusers; auto: on a GPU the fastest that is right there.",
)
@click.option("--tasks-from", multiple=True, metavar="DIR", help="Your own task files.")
@click.option("--dry-run", is_flag=True, help="Check all grids and say what would be made.")
@click.pass_obj
def infer(
    arguments: Sequence[str],
    /,
    examples: str,
    adapter: tuple[str, ...],
    output: str,
    overwrite: bool,
    upsample: float | None,
    strength: float | None,
    processes: int | None,
    encodings: str | None,
    tasks_from: tuple[str, ...],
    dry_run: bool,
    **options: Any,
) -> None:
    """Complete grids: generate what is null in the last row.

    \b
    {"task": "depth-to-image", "content_prompt": "a red mug on a table",
     "rows": [["mug1_depth.png", "mug1.png"], ["mug2_depth.png", null]], "seed": 0}

    A call that was interrupted goes on where it stopped: the same command, the same --output.

    \b
    vcdeft infer --examples grid.json --adapter runs/demo/adapter --images 4
    vcdeft infer --examples grids/ --adapter runs/a/adapter=0.7 --adapter runs/b/adapter=0.5
    """
    check_handles()
    from visualcloze_deft.infer import Settings
    from visualcloze_deft.infer import infer as run_infer
    from visualcloze_deft.modelfolder import pinned
    from visualcloze_deft.upsample import STRENGTH, Upsampling

    if strength is not None and upsample is None:
        raise UserError("--strength goes with --upsample, e.g. --upsample 2")
    options["model"] = pinned(options["model"], options.pop("revision"))
    chosen = STRENGTH if strength is None else strength
    written = run_infer(
        Path(examples),
        Path(output),
        Settings(
            adapters=with_strengths(adapter),
            upsampling=None if upsample is None else Upsampling(scale=upsample, strength=chosen),
            encodings=Path(encodings) if encodings else None,
            task_folders=tasks_from,
            **options,
        ),
        processes=processes or 0,
        overwrite=overwrite,
        dry_run=dry_run,
        arguments=arguments,
    )
    for path in written:
        click.echo(path)


def with_strengths(given: Sequence[str]) -> dict[Path, float]:
    """The folders and strengths that `--adapter` names.

    >>> with_strengths(["a", "b=0.5"])
    {PosixPath('a'): 1.0, PosixPath('b'): 0.5}
    """
    from visualcloze_deft.settings import is_strength

    found: dict[Path, float] = {}
    for text in given:
        folder, equals, number = text.rpartition("=")
        if not equals or Path(text).is_dir():
            folder, number = text, "1"
        try:
            strength = float(number)
        except ValueError:
            raise UserError(f"--adapter {text!r}: {number!r} is no number") from None
        if not is_strength(strength):
            raise UserError(f"--adapter {text!r}: give a number up to 1e6 as its strength, e.g. 1")
        if Path(folder) in found:
            raise UserError(f"--adapter {folder}: named twice; give it one strength")
        found[Path(folder)] = strength
    return found


@cli.command("eval", context_settings=CONTEXT)
@click.argument("adapter", required=False, metavar="[ADAPTER[=STRENGTH]|none]")
@click.option("--suite", help="scenes, graph200k, dreambooth, dreambench-plus or insdet.")
@click.option(
    "--data", multiple=True, metavar="NAME=PATH", help="The suite's data; scenes need none."
)
@click.option("--images", metavar="DIR", help="Score these images, made elsewhere, instead.")
@click.option("--against", metavar="DIR", help="What --images are held to: pairs by name.")
@click.option("--unpaired", is_flag=True, help="Compare --images and --against as two sets.")
@click.option("--prompts", metavar="FILE", help='Of --images: JSON, {"NAME": "prompt", ...}.')
@click.option("--output", required=True, metavar="DIR", help="Given again, it goes on there.")
@click.option(
    "--limit",
    type=click.IntRange(1, 10**6),
    metavar="N",
    help="Grids of each row of the table. Default: 64 of a task of scenes, 100 of graph200k's, all "
    "of the others.",
)
@click.option("--tasks", help="Of scenes or graph200k, as 'vcdeft train --tasks' reads them.")
@click.option("--rows", type=click.IntRange(1, 4), default=2, show_default=True, help="Of a grid.")
@click.option(
    "--samples",
    type=click.IntRange(1, MOST_IMAGES),
    metavar="N",
    help="Images of each grid; dreambooth: 4.",
)
@click.option(
    "--hold-out",
    type=click.IntRange(2),
    metavar="N",
    help="Of graph200k, the items that training with data.hold_out=N never sees.",
)
@click.option(
    "--seed",
    type=SEED,
    default=1,
    show_default=True,
    help="Of grids; not training's.",
)
@click.option(
    "--encoder",
    "encoders",
    multiple=True,
    metavar="NAME[=PLACE]",
    help="clip, dino, dinov2, each also NAME=FOLDER; efficientnet-lite0; OTHER=FOLDER; or none. "
    "Repeatable. Default: efficientnet-lite0 where it is installed.",
)
@click.option(
    "--annotate",
    multiple=True,
    metavar="ROLE=MODEL",
    help="Extract depth, normal, segmentation or uniformer from images by this model of "
    "transformers, to see how well such a condition was followed. Repeatable.",
)
@click.option(
    "--edge-tolerance",
    type=click.IntRange(0, 1000),
    metavar="PIXELS",
    help="How far apart edges may lie that count as the same. Default: 0; with --images, edges are "
    "compared only where it is given.",
)
@click.option("--lpips", is_flag=True, help="Also LPIPS, which needs torchvision.")
@click.option(
    "--against-base", is_flag=True, help="The same grids without the adapter: what was lost."
)
@click.option("--model", default="tiny", show_default=True, help="Folder or hub id of FLUX.1-Fill.")
@REVISION
@click.option("--lora", metavar="PATH", help="FLUX LoRA merged into the base.")
@click.option(
    "--quantise",
    type=click.Choice(["none", "int8", "nf4", "fp8"]),
    default="none",
    show_default=True,
)
@click.option("--steps", type=click.IntRange(1, 1000), default=30, show_default=True)
@click.option("--guidance", type=float, default=30.0, show_default=True)
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True)
@click.option("--processes", type=click.IntRange(1), help="That generate; default: one per GPU.")
@click.option("--tasks-from", multiple=True, metavar="DIR", help="Your own task files.")
@click.option("--dry-run", is_flag=True, help="Check all and say what would be made.")
def evaluate(
    adapter: str | None,
    suite: str | None,
    data: tuple[str, ...],
    images: str | None,
    against: str | None,
    unpaired: bool,
    prompts: str | None,
    output: str,
    limit: int | None,
    tasks: str | None,
    rows: int,
    samples: int | None,
    hold_out: int | None,
    seed: int,
    encoders: tuple[str, ...],
    annotate: tuple[str, ...],
    edge_tolerance: int | None,
    lpips: bool,
    against_base: bool,
    processes: int | None,
    tasks_from: tuple[str, ...],
    dry_run: bool,
    **options: Any,
) -> None:
    """Measure an adapter on a suite, or the base alone (ADAPTER is none): generate, score, report.

    Writes into --output: results.jsonl (a line for each image), table.md, table.csv, report.html
    (figures, bars, sheets) and settings.json. A call that was interrupted goes on where it stopped:
    the same command, the same --output. More encoders may be added to a finished one.

    \b
    vcdeft eval runs/demo/adapter --suite scenes --limit 8 --steps 10 --batch 8 --output look
    vcdeft eval runs/demo/adapter --suite scenes --against-base --output retention
    vcdeft eval runs/mine/adapter --model black-forest-labs/FLUX.1-Fill-dev --suite dreambooth \\
        --data dreambooth=PATH --encoder clip --encoder dino=models/dino --output subjects
    vcdeft eval --images made/ --against truth/ --output compared
    """
    check_handles()
    from visualcloze_deft.evaluation.evaluate import (
        Asked,
        Scoring,
        evaluate_folders,
        evaluate_suite,
    )
    from visualcloze_deft.evaluation.suites import Making
    from visualcloze_deft.infer import Settings
    from visualcloze_deft.modelfolder import pinned

    revision = options.pop("revision")
    scoring = Scoring(
        encoders=encoders or None,
        annotate=places(annotate),
        tolerance=edge_tolerance,
        lpips=lpips,
    )
    if images is not None or against is not None:
        if images is None or against is None:
            raise UserError("--images and --against go together: what was made, and its truth")
        if vain := given_but(OF_FOLDERS):
            raise UserError(f"--images scores what is there: leave {', '.join(vain)}")
        written = evaluate_folders(
            Path(images),
            Path(against),
            Path(output),
            scoring,
            unpaired=unpaired,
            prompts=Path(prompts) if prompts else None,
            dry_run=dry_run,
        )
    else:
        if not adapter or not suite:
            raise UserError(
                "give an ADAPTER folder (or none) and --suite, or --images and --against; "
                "'vcdeft eval --help' shows examples"
            )
        if unpaired or prompts:
            raise UserError("--unpaired and --prompts go with --images")
        options["model"] = pinned(options["model"], revision)
        written = evaluate_suite(
            Asked(
                suite=suite,
                settings=Settings(
                    adapters={} if adapter == "none" else with_strengths([adapter]),
                    task_folders=tasks_from,
                    **options,
                ),
                scoring=scoring,
                making=Making(
                    data=sources_named(data),
                    seed=seed,
                    rows=rows,
                    limit=limit,
                    tasks=tasks,
                    hold_out=hold_out or 0,
                    annotate=places(annotate),
                    task_folders=tasks_from,
                ),
                images=samples,
                against_base=against_base,
                processes=processes or 0,
            ),
            Path(output),
            dry_run=dry_run,
        )
    if written:
        click.echo((written.parent / "table.md").read_text(encoding="utf-8"))
        click.echo(f"report: {written}")


OF_FOLDERS = frozenset(  # what of `vcdeft eval` goes with --images
    "images against unpaired prompts output encoders annotate edge_tolerance lpips dry_run".split()
)


def given_but(known: frozenset[str]) -> list[str]:
    """What the command line names of this command beside `known`, as it is written there."""
    context = click.get_current_context()
    return [
        parameter.opts[0] if isinstance(parameter, click.Option) else str(parameter.name).upper()
        for parameter in context.command.params
        if parameter.name not in known
        and context.get_parameter_source(str(parameter.name)) is ParameterSource.COMMANDLINE
    ]


def sources_named(data: Sequence[str]) -> dict[str, str]:
    """What --data says: name -> path.

    >>> sources_named(["dreambooth=data/dreambooth", "scenes"])
    {'dreambooth': 'data/dreambooth', 'scenes': ''}
    """
    found: dict[str, str] = {}
    for told in data:
        name, _, place = told.partition("=")
        if name in found:
            raise UserError(f"--data {told}: {name} is given twice")
        found[name] = place
    return found


@cli.command("export", context_settings=CONTEXT)
@click.argument("run", metavar="RUN")
@click.option(
    "--format",
    "kind",
    required=True,
    type=click.Choice(["peft", "diffusers", "comfyui", "kohya", "merged"]),
    help="Who is to read it; merged: a transformer folder with the adapter in its weights.",
)
@click.option("--output", required=True, metavar="PATH", help="A .safetensors file, or a folder.")
@click.option("--strength", type=float, default=1.0, show_default=True, help="Folded in.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Of a LoRA file, default float32; of a merged transformer, default its base's.",
)
@click.option("--model", help="The base; default: the one the adapter was trained on.")
@REVISION
@click.option("--lora", metavar="PATH", help="The LoRA in that base; default: as in training.")
@click.option(
    "--verify/--no-verify",
    default=True,
    show_default=True,
    help="Read what was written and compare the outputs.",
)
def export_adapter(
    run: str,
    kind: Format,
    output: str,
    strength: float,
    dtype: str | None,
    model: str | None,
    revision: str | None,
    lora: str | None,
    verify: bool,
) -> None:
    """Write the adapter of RUN (a run or adapter folder) for another tool. DEFT and PaRa become
    plain LoRA, exactly.

    \b
    vcdeft export runs/demo --format diffusers --output deft-lora.safetensors
    vcdeft export runs/demo --format comfyui --dtype bfloat16 --output my.safetensors
    vcdeft export runs/demo --format merged --output my-transformer
    """
    import torch

    from visualcloze_deft.export import export
    from visualcloze_deft.modelfolder import pinned

    report = export(
        Path(run),
        Path(output),
        kind,
        strength=strength,
        dtype=getattr(torch, dtype) if dtype else None,
        model=pinned(model, revision),
        lora=lora,
        verify=verify,
    )
    click.echo(report.path)
    for note in report.notes:
        click.echo(note)
    if report.reader:
        click.echo(f"read again by {report.reader}; errors relative to what the adapter changes:")
        if report.weights is not None:
            click.echo(f"  weights {report.weights:.1e}, the worst layer")
        lost = "lost in the base's rounding, not compared"
        click.echo(f"  output  {lost if report.output is None else f'{report.output:.1e}'}")


@cli.command("import", context_settings=CONTEXT)
@click.argument("file", metavar="FILE")
@click.option("--output", required=True, metavar="DIR", help="The adapter folder to write.")
@click.option("--model", default="tiny", show_default=True, help="The base that the LoRA changes.")
@REVISION
@click.option(
    "--without-text-encoders",
    is_flag=True,
    help="Leave out tensors for text encoders, which stay as they are here.",
)
def import_adapter(
    file: str, output: str, model: str, revision: str | None, without_text_encoders: bool
) -> None:
    """Turn a FLUX LoRA file (named as by diffusers, kohya or FLUX itself) into an adapter folder.

    \b
    vcdeft import my-lora.safetensors --model black-forest-labs/FLUX.1-Fill-dev --output my-lora
    vcdeft train --method lora --rank 16 --set adapter.start=my-lora ...
    """
    from visualcloze_deft.export import import_lora
    from visualcloze_deft.modelfolder import pinned

    base = pinned(model, revision)
    assert base is not None
    written = import_lora(
        Path(file),
        Path(output),
        model=base,
        text_encoders="left out" if without_text_encoders else "refused",
    )
    click.echo(written)


@cli.group(cls=Commands, context_settings=CONTEXT)
def tasks() -> None:
    """List, show and preview tasks."""


FOLDERS = click.option(
    "--from",
    "folders",
    multiple=True,
    metavar="DIR",
    help="Your own task files, beside the shipped.",
)


RESOLUTION = click.option(
    "--resolution",
    type=click.IntRange(32, 2048),
    help="Side of a square cell in pixels; default: the embedded base's for scenes, 384 "
    "for pictures.",
)


HOLD_OUT = click.option(
    "--hold-out",
    type=click.IntRange(2),
    metavar="N",
    help="Only every N-th item of the data: those that training with data.hold_out=N never sees.",
)


@tasks.command("list", context_settings=CONTEXT)
@FOLDERS
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def list_tasks(folders: tuple[str, ...], as_json: bool) -> None:
    """All tasks by group: what is shown -> what is generated, in the roles that data must have."""
    from visualcloze_deft.registry import load_tasks

    known = load_tasks(map(Path, folders))
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
@FOLDERS
@click.option(
    "--model", help="Also what this model's text encoders read and lose of a grid's text."
)
@REVISION
@click.option("--content", default="", metavar="TEXT", help="A content sentence, with --model.")
def show_task(
    name: str, folders: tuple[str, ...], model: str | None, revision: str | None, content: str
) -> None:
    """What task NAME shows, generates and says, and which data it can be made from.

    \b
    vcdeft tasks show depth-to-image --model tiny --content "a red mug on a table"
    """
    from visualcloze_deft.data.derive import missing
    from visualcloze_deft.data.sources import ROLES_OF
    from visualcloze_deft.modelfolder import pinned
    from visualcloze_deft.registry import load_tasks

    model = pinned(model, revision)
    known = load_tasks(map(Path, folders))
    if name not in known:
        raise UserError(f"unknown task {name!r}; {nearest(name, known)}")
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
    from visualcloze_deft.models import load_tokenizers, text_length
    from visualcloze_deft.prompt import Prompt, clip_text, fits, unread

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


@tasks.command("check", context_settings=CONTEXT)
@click.argument("file", required=False)
@FOLDERS
def check_tasks(file: str | None, folders: tuple[str, ...]) -> None:
    """Say what is wrong with a task FILE, and where; without one, check all files."""
    from visualcloze_deft.registry import load_roles, load_tasks, read_tasks

    if file is not None and not Path(file).is_file():
        raise UserError(f"{file}: no such file")
    if file is None:
        found = list(load_tasks(map(Path, folders)).values())
    else:
        found = read_tasks(Path(file), load_roles([*map(Path, folders), Path(file).parent]))
    click.echo(f"{len(found)} tasks, nothing wrong" if len(found) > 3 else "nothing wrong")
    for task in found if len(found) <= 3 else ():
        click.echo(f"  {task.name}: {task.sentence()}")


OVERWRITE = click.option(
    "--overwrite", is_flag=True, help="Also a file at --output that is no preview of vcdeft."
)


@tasks.command("preview", context_settings=CONTEXT)
@click.argument("name")
@FOLDERS
@DATA
@ANNOTATE
@click.option("--count", type=click.IntRange(1, 64), default=8, show_default=True)
@click.option(
    "--each",
    type=click.Choice(["task", "group"]),
    help="One grid of each, as 'vcdeft infer' would be asked, instead of --count drawn ones.",
)
@HOLD_OUT
@click.option("--seed", type=SEED, default=0, show_default=True)
@RESOLUTION
@click.option("--output", default="preview.png", show_default=True, metavar="FILE")
@OVERWRITE
def preview(
    name: str,
    folders: tuple[str, ...],
    data: tuple[str, ...],
    annotate: tuple[str, ...],
    count: int,
    each: Each | None,
    hold_out: int | None,
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
    from visualcloze_deft.preview import example_sheet, one_of_each
    from visualcloze_deft.rundir import mixture_of
    from visualcloze_deft.sheet import write_preview

    run = preview_run(name, folders, data, annotate, hold_out, seed, resolution)
    mixture = mixture_of(run, held_out=True)
    path = png_path(output, overwrite=overwrite)
    drawn = one_of_each(mixture, each) if each else [mixture[k] for k in range(count)]
    write_preview(example_sheet(drawn), path, of=f"tasks {name}")
    click.echo(path)


@tasks.command("example", context_settings=CONTEXT)
@click.argument("name")
@FOLDERS
@DATA
@ANNOTATE
@click.option(
    "--count", type=click.IntRange(1, MOST_IMAGES), default=1, show_default=True, help="Per task."
)
@click.option("--rows", type=click.IntRange(1, 4), default=2, show_default=True)
@HOLD_OUT
@click.option("--seed", type=SEED, default=1, show_default=True)
@RESOLUTION
@click.option("--output", default="grids", show_default=True, metavar="DIR")
def example(
    name: str,
    folders: tuple[str, ...],
    data: tuple[str, ...],
    annotate: tuple[str, ...],
    count: int,
    rows: int,
    hold_out: int | None,
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
    from visualcloze_deft.preview import grids_to_try, write_grids
    from visualcloze_deft.rundir import resolution_of, sources_of, tasks_of

    run = preview_run(name, folders, data, annotate, hold_out, seed, resolution)
    _, tasks = tasks_of(run)
    grids = grids_to_try(
        tasks,
        sources_of(run, held_out=True),
        seed=seed,
        resolution=resolution_of(run),
        count=count,
        rows=rows,
    )
    click.echo(write_grids(grids, Path(output)))


@cli.group(cls=Commands, context_settings=CONTEXT)
def data() -> None:
    """Check a data source, look at it, and compute the roles it lacks."""


CHECKED_SCENES = 8  # are a few seconds of one processor


@data.command("check", context_settings=CONTEXT)
@click.argument("source", metavar="NAME=PATH")
@FOLDERS
@click.option(
    "--workers", type=click.IntRange(0, 256), help="Reading processes; default: one per core."
)
def check_data(source: str, folders: tuple[str, ...], workers: int | None) -> None:
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
    from visualcloze_deft.registry import load_tasks

    tasks = load_tasks(map(Path, folders))
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
    from visualcloze_deft.preview import item_sheet
    from visualcloze_deft.sheet import write_preview

    path = png_path(output, overwrite=overwrite)
    sheet = item_sheet(open_source(source, size=256, seed=seed), count=count, seed=seed)
    write_preview(sheet, path, of=f"data {source}")
    click.echo(path)


@data.command("annotate", context_settings=CONTEXT)
@click.argument("source", metavar="NAME=PATH")
@click.option(
    "--annotate", required=True, multiple=True, metavar="ROLE=MODEL", help="Repeat for more roles."
)
@click.option("--output", required=True, metavar="DIR", help="Given again, it goes on there.")
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
    from visualcloze_deft.data.annotate import annotate as write
    from visualcloze_deft.data.annotate import check_models
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


@data.command("encode", context_settings=CONTEXT, params=of_a_run())
@click.option("--output", required=True, metavar="DIR", help="Given again, it goes on there.")
@click.option(
    "--examples",
    type=click.IntRange(1, 10**9),
    metavar="N",
    help="Default: as many as the run will draw.",
)
@click.option("--text-only", is_flag=True, help="Texts, which are few and large to encode.")
@click.pass_obj
def encode_data(
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

    The run then finds it with --set data.encodings=DIR. Runs may share a folder.

    \b
    vcdeft data encode --config flux-8gpu --data graph200k=PATH --output encodings
    vcdeft train --config flux-8gpu --data graph200k=PATH --set data.encodings=encodings \\
        --set offload_encoders=true
    """
    from visualcloze_deft.launch import already_launched, forget_group, launch, process_count
    from visualcloze_deft.precompute import encode_run, prepare

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


def places(annotate: Sequence[str]) -> dict[str, str]:
    """What --annotate says: role -> place. Only roles that a model computes, each once."""
    from visualcloze_deft.data.annotators import check_role

    found: dict[str, str] = {}
    for pair in annotate:
        role, _, place = pair.partition("=")
        if not place:
            raise UserError(f"--annotate {pair!r}: expected ROLE=PLACE, e.g. depth=MODEL")
        if role in found:
            raise UserError(f"--annotate {pair!r}: {role} is given twice")
        check_role(role)
        found[role] = place
    return found


def png_path(output: str, *, overwrite: bool) -> Path:
    """`output`, if a picture can be written there. overwrite: also over one of somebody else."""
    from visualcloze_deft.output import output_folder
    from visualcloze_deft.sheet import check_replaceable

    path = Path(output)
    if path.suffix != ".png" or path.is_dir():
        raise UserError(f"--output {path}: give a file that ends in .png")
    if not path.parent.is_dir():
        raise UserError(f"--output {path}: no folder {path.parent}")
    if not overwrite:
        check_replaceable(path, way_out="give --overwrite, or another --output")
    output_folder(path.parent)
    return path


def preview_run(
    name: str,
    folders: tuple[str, ...],
    data: tuple[str, ...],
    annotate: tuple[str, ...],
    hold_out: int | None,
    seed: int,
    resolution: int | None,
) -> Run:
    from visualcloze_deft.modelfolder import FLUX_RESOLUTION, TINY, resolution_of
    from visualcloze_deft.settings import parse_run

    made = all(source.startswith("scenes") for source in data)
    wanted: dict[str, Any] = {"tasks": name, "task_folders": folders}
    wanted["resolution"] = resolution or (resolution_of(TINY) if made else FLUX_RESOLUTION)
    wanted |= {"hold_out": hold_out or 0, "annotate": places(annotate)}
    if data:
        wanted["sources"] = data
    return parse_run({"data": wanted, "seed": seed}, where="command line")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line. A user's mistake, and what the system or a parser of files refuses, is
    one line and exit code 2; a mistake of ours stays a traceback."""
    logging.setLogRecordFactory(Logged)
    # recommends another package on every start, whether anything is quantised or not
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    end_with_launcher()
    raise_limit()
    try:
        words = list(sys.argv[1:] if arguments is None else arguments)
        cli.main(args=words, obj=words, standalone_mode=False)
    except UserError as error:
        refuse(str(error))
    except REFUSED as error:
        where = "standard output: " if on_output(error) else ""
        refuse(where + refusal(error))
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.ctx.get_help() if error.ctx else "", err=True)
        raise SystemExit(2) from None
    except click.ClickException as error:
        refuse(error.format_message())
    except click.Abort:
        raise SystemExit(130) from None


def refuse(message: str) -> NoReturn:
    """Say in one line what was wrong, and end with exit code 2."""
    if os.environ.get("RANK", "") not in ("", "0"):
        time.sleep(3)  # all processes find the same mistake: the first says it and ends them
    with suppress(OSError):  # nobody reads it, or the device is full
        click.echo(f"vcdeft: {UserError(message)}", err=True)
    raise SystemExit(2) from None


def on_output(error: BaseException) -> bool:
    """Whether standard output did not take what was said: its device is full. A closed pipe ends a
    command without a word, with exit code 1: that is click's."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_globals["__name__"] in SAYING
