"""`vcdeft infer`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from visualcloze_deft.cli.app import CONTEXT, cli
from visualcloze_deft.cli.options import MOST_IMAGES, REVISION, with_strengths
from visualcloze_deft.errors import UserError
from visualcloze_deft.runtime.open_files import check_handles


@cli.command(context_settings=CONTEXT)
@click.option("--examples", required=True, metavar="FILE", help="Grid file (JSON), or a folder.")
@click.option("--model", default="tiny", show_default=True, help="Folder or hub id of FLUX.1-Fill.")
@REVISION
@click.option(
    "--model-lora",
    "lora",
    metavar="PATH",
    help="FLUX LoRA merged into the base, e.g. VisualCloze's.",
)
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
    "--images-per-grid",
    "images",
    type=click.IntRange(1, MOST_IMAGES),
    default=1,
    show_default=True,
    help="Of each grid, with seeds that follow one another.",
)
@click.option(
    "--inference-steps", "steps", type=click.IntRange(1, 1000), default=30, show_default=True
)
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
@click.option(
    "--embedding-cache",
    "encodings",
    metavar="DIR",
    help="Keep encoded rows and texts for further runs.",
)
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
@click.option(
    "--task-folder", "tasks_from", multiple=True, metavar="DIR", help="Your own task files."
)
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
    vcdeft infer --examples grid.json --adapter runs/demo/adapter --images-per-grid 4
    vcdeft infer --examples grids/ --adapter runs/a/adapter=0.7 --adapter runs/b/adapter=0.5
    """
    check_handles()
    from visualcloze_deft.backbones.model_files import pinned
    from visualcloze_deft.inference.infer import infer as run_infer
    from visualcloze_deft.inference.settings import InferenceSettings
    from visualcloze_deft.sampling.upsampling import STRENGTH, Upsampling

    if strength is not None and upsample is None:
        raise UserError("--strength goes with --upsample, e.g. --upsample 2")
    options["model"] = pinned(options["model"], options.pop("revision"))
    chosen = STRENGTH if strength is None else strength
    written = run_infer(
        Path(examples),
        Path(output),
        InferenceSettings(
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
