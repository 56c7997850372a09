"""`vcdeft eval`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from visualcloze_deft.cli.app import CONTEXT, cli
from visualcloze_deft.cli.options import (
    MOST_IMAGES,
    REVISION,
    SEED,
    TASK_FOLDERS,
    given_but,
    places,
    sources_named,
    with_scales,
)
from visualcloze_deft.errors import UserError
from visualcloze_deft.runtime.open_files import check_handles

if TYPE_CHECKING:
    from visualcloze_deft.evaluation.settings import Scoring

Options = Mapping[str, Any]


@cli.command("eval", context_settings=CONTEXT)
@click.argument("adapter", required=False, metavar="[ADAPTER[=SCALE]|none]")
@click.option(
    "--suite", help="The suite: scenes, graph200k, dreambooth, dreambench-plus or insdet."
)
@click.option(
    "--data", multiple=True, metavar="NAME=PATH", help="The data of the suite. Scenes need none."
)
@click.option(
    "--images",
    metavar="DIR",
    help="Scores the images of this folder instead. Any tool may have made them.",
)
@click.option(
    "--against", metavar="DIR", help="The folder of ground truth for --images, paired by file name."
)
@click.option(
    "--unpaired", is_flag=True, help="Compares --images and --against as two sets, without pairs."
)
@click.option(
    "--prompts", metavar="FILE", help='The prompts of --images, as JSON: {"NAME": "prompt", ...}.'
)
@click.option(
    "--output",
    required=True,
    metavar="DIR",
    help="The folder to write. The same command continues an interrupted one.",
)
@click.option(
    "--limit",
    type=click.IntRange(1, 10**6),
    metavar="N",
    help="The number of grids for each row of the table. The default is 64 for a task of scenes, "
    "100 "
    "for one of graph200k, and all grids of the other suites.",
)
@click.option("--tasks", help="The tasks of scenes or graph200k, as in 'vcdeft train --tasks'.")
@click.option(
    "--rows",
    type=click.IntRange(1, 4),
    default=2,
    show_default=True,
    help="The number of rows of a grid, the query among them.",
)
@click.option(
    "--images-per-grid",
    "samples",
    type=click.IntRange(1, MOST_IMAGES),
    metavar="N",
    help="The number of images for each grid. The default is 1, for dreambooth 4.",
)
@click.option(
    "--validation-every",
    type=click.IntRange(2),
    metavar="N",
    help="Takes from graph200k only the items that training with data.validation_every=N never "
    "sees.",
)
@click.option(
    "--seed",
    type=SEED,
    default=1,
    show_default=True,
    help="The seed of the grids. It is independent of the training's seed.",
)
@click.option(
    "--encoder",
    "encoders",
    multiple=True,
    metavar="NAME[=PLACE]",
    help="An image encoder: clip, dino, dinov2 (each also NAME=FOLDER), efficientnet-lite0, "
    "another "
    "NAME=FOLDER, or none. Repeatable. The default is efficientnet-lite0 where it is installed.",
)
@click.option(
    "--annotate",
    multiple=True,
    metavar="ROLE=MODEL",
    help="Extracts depth, normal, segmentation or uniformer maps from the images with this model "
    "of "
    "transformers, to measure how well the condition was followed. Repeatable.",
)
@click.option(
    "--edge-tolerance",
    type=click.IntRange(0, 1000),
    metavar="PIXELS",
    help="The distance at which two edges still count as the same. The default is 0. With "
    "--images, "
    "edges are compared only if this option is given.",
)
@click.option("--lpips", is_flag=True, help="Measures LPIPS too. It needs torchvision.")
@click.option(
    "--against-base",
    is_flag=True,
    help="Completes the same grids without the adapter too, to measure gain and forgetting.",
)
@click.option(
    "--model",
    default="tiny",
    show_default=True,
    help="A diffusers folder or a hub id of FLUX.1-Fill, or 'tiny'.",
)
@REVISION
@click.option(
    "--model-lora", "lora", metavar="PATH", help="A FLUX LoRA that is merged into the base."
)
@click.option(
    "--quantise",
    type=click.Choice(["none", "int8", "nf4", "fp8"]),
    default="none",
    show_default=True,
)
@click.option(
    "--inference-steps", "steps", type=click.IntRange(1, 1000), default=30, show_default=True
)
@click.option("--guidance", type=float, default=30.0, show_default=True)
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True)
@click.option(
    "--processes",
    type=click.IntRange(1),
    help="The number of generating processes. The default is one per GPU.",
)
@TASK_FOLDERS
@click.option("--dry-run", is_flag=True, help="Checks everything and lists the images to make.")
def evaluate(
    adapter: str | None,
    suite: str | None,
    images: str | None,
    against: str | None,
    output: str,
    dry_run: bool,
    **options: Any,
) -> None:
    """Measure an adapter on a suite, or the base alone (ADAPTER is none): generate, score, report.

    Writes into --output: results.jsonl (a line for each image), table.md, table.csv, report.html
    (figures, bars, sheets) and settings.json. A call that was interrupted goes on where it stopped:
    the same command, the same --output. More encoders may be added to a finished one.

    \b
    vcdeft eval runs/demo/adapter --suite scenes --limit 8 --batch 8 --output look
    vcdeft eval runs/demo/adapter --suite scenes --against-base --output retention
    vcdeft eval runs/mine/adapter --model black-forest-labs/FLUX.1-Fill-dev --suite dreambooth \\
        --data dreambooth=PATH --encoder clip --encoder dino=models/dino --output subjects
    vcdeft eval --images made/ --against truth/ --output compared
    """
    check_handles()
    if images is not None or against is not None:
        written = of_folders(images, against, output, options, dry_run=dry_run)
    else:
        written = of_suite(adapter, suite, output, options, dry_run=dry_run)
    if written:
        click.echo((written.parent / "table.md").read_text(encoding="utf-8"))
        click.echo(f"report: {written}")


def of_folders(
    images: str | None, against: str | None, output: str, options: Options, *, dry_run: bool
) -> Path | None:
    """Score images that are there; returns the report."""
    from visualcloze_deft.evaluation.folders import evaluate_folders

    if images is None or against is None:
        raise UserError("--images and --against go together: what was made, and its truth")
    if vain := given_but(OF_FOLDERS):
        raise UserError(f"--images scores what is there: leave {', '.join(vain)}")
    return evaluate_folders(
        Path(images),
        Path(against),
        Path(output),
        scoring_of(options),
        unpaired=options["unpaired"],
        prompts=Path(options["prompts"]) if options["prompts"] else None,
        dry_run=dry_run,
    )


def of_suite(
    adapter: str | None, suite: str | None, output: str, options: Options, *, dry_run: bool
) -> Path | None:
    """Measure an adapter on a suite; returns the report."""
    from visualcloze_deft.backbones.model_files import pinned
    from visualcloze_deft.evaluation.evaluate import evaluate_suite
    from visualcloze_deft.evaluation.settings import EvaluationRequest
    from visualcloze_deft.evaluation.suite_queries import GridSettings
    from visualcloze_deft.inference.settings import InferenceSettings

    if not adapter or not suite:
        raise UserError(
            "give an ADAPTER folder (or none) and --suite, or --images and --against; "
            "'vcdeft eval --help' shows examples"
        )
    if options["unpaired"] or options["prompts"]:
        raise UserError("--unpaired and --prompts go with --images")
    settings = InferenceSettings(
        model=str(pinned(options["model"], options["revision"])),
        adapters={} if adapter == "none" else with_scales([adapter]),
        task_folders=options["task_folders"],
        **{name: options[name] for name in SETTINGS},
    )
    making = GridSettings(
        data=sources_named(options["data"]),
        validation_every=options["validation_every"] or 0,
        annotate=places(options["annotate"]),
        task_folders=options["task_folders"],
        **{name: options[name] for name in ("seed", "rows", "limit", "tasks")},
    )
    asked = EvaluationRequest(
        suite=suite,
        settings=settings,
        scoring=scoring_of(options),
        making=making,
        images=options["samples"],
        against_base=options["against_base"],
        processes=options["processes"] or 0,
    )
    return evaluate_suite(asked, Path(output), dry_run=dry_run)


def scoring_of(options: Options) -> Scoring:
    from visualcloze_deft.evaluation.settings import Scoring

    return Scoring(
        encoders=options["encoders"] or None,
        annotate=places(options["annotate"]),
        tolerance=options["edge_tolerance"],
        lpips=options["lpips"],
    )


SETTINGS = (
    "lora",
    "quantise",
    "steps",
    "guidance",
    "batch",
)  # options that settings take as they are
OF_FOLDERS = frozenset(  # what of `vcdeft eval` goes with --images
    "images against unpaired prompts output encoders annotate edge_tolerance lpips dry_run".split()
)
