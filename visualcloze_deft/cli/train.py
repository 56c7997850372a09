"""`vcdeft train`, `plan` and `report`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from visualcloze_deft.cli.app import CONTEXT, cli
from visualcloze_deft.cli.options import run_of, run_options, setting
from visualcloze_deft.errors import UserError
from visualcloze_deft.training.files_needed import check_run

if TYPE_CHECKING:
    from visualcloze_deft.config.run_settings import Run


@cli.command(context_settings=CONTEXT)
@run_options
@setting("--attention", "attention", metavar="NAME")
@click.option("--resume", is_flag=True, help="Continues from the newest checkpoint in --output.")
@click.option(
    "--dry-run",
    is_flag=True,
    help="Runs one step, one save and one sample sheet, then prints the cost of the run.",
)
@click.option(
    "--allow-change",
    "allowed",
    multiple=True,
    metavar="NAME",
    help="A setting that may differ from before with --resume, e.g. optimiser.lr. Repeatable.",
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
    from visualcloze_deft.runtime.launch import (
        already_launched,
        launch,
        prepared,
        process_count,
        rank,
    )
    from visualcloze_deft.training.deepspeed_settings import check_installed
    from visualcloze_deft.training.dry_run import dry_run_of, report
    from visualcloze_deft.training.preparation import as_decided, prepare
    from visualcloze_deft.training.run_folder import SETTINGS, run_lock
    from visualcloze_deft.training.summary import summary_of

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
        run = held.enter_context(dry_run_of(wanted)) if dry_run and rank() == 0 else wanted
        if already_launched():
            check_installed()
            from visualcloze_deft.training.train import train as train_here

            train_here(run, resume=resume, prepared=prepared(), allowed=allowed, divide=divide)
        else:
            processes = process_count(run.processes)
            held.enter_context(run_lock(Path(run.output)))
            mixture = prepare(
                run, processes=processes, resume=resume, allowed=allowed, divide=divide
            )
            run = as_decided(run)
            for line in summary_of(run, mixture, processes=processes):
                click.echo(line)
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

    Curves, validation losses, the last sheet and the settings, in one file that opens
    without a server. A run writes it at its end; this makes it of one that is under way.

    \b
    vcdeft report runs/demo
    """
    from visualcloze_deft.training.report import write_report

    click.echo(write_report(Path(run)))


@cli.command(context_settings=CONTEXT)
@run_options
@click.option(
    "--memory",
    metavar="SIZE",
    help="The memory of a GPU, e.g. 80GB. The default is that of this machine.",
)
@click.option(
    "--grid", metavar="ROWSxCOLUMNS", help="The largest grid. By default it is that of the data."
)
@click.option(
    "--run",
    "before",
    metavar="DIR",
    help="An earlier run, whose speed gives the hours of this one.",
)
@click.option("--json", "as_json", is_flag=True, help="Prints JSON.")
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
    from visualcloze_deft.training import memory_report

    asked = run_of(config, data, annotate, overrides, options)
    run = with_published_sizes(asked)
    found = memory_report.memory_report_of(
        run, memory=memory, grid=grid, before=Path(before) if before else None
    )
    found = replace(found, plan=replace(found.plan, run=asked))
    click.echo(json.dumps(found.as_json(), indent=1) if as_json else found.as_table())


def with_published_sizes(run: Run) -> Run:
    """`run`, where the hub cannot be asked for FLUX.1-Fill with its sizes as they are known."""
    from visualcloze_deft.backbones.flux_fill.files import PUBLISHED
    from visualcloze_deft.backbones.model_files import FILL
    from visualcloze_deft.backbones.table import backbone_of
    from visualcloze_deft.storage.hub import Unreached, hub_id

    try:
        backbone_of(run.model)
    except Unreached:
        if hub_id(run.model)[0] != FILL:
            raise
        click.echo(
            f"{run.model}: not here, and the hub is not reached; planned from its known sizes",
            err=True,
        )
        return run.model_copy(update={"model": str(PUBLISHED)})
    return run
