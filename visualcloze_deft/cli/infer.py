"""`vcdeft infer`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from visualcloze_deft.cli.app import CONTEXT, cli
from visualcloze_deft.cli.options import MOST_IMAGES, pipeline_options, with_scales
from visualcloze_deft.errors import UserError
from visualcloze_deft.runtime.open_files import check_handles


@cli.command(context_settings=CONTEXT)
@click.option(
    "--examples",
    metavar="FILE",
    help="A grid file (JSON), or a folder of grid files.",
)
@click.option(
    "--compiled",
    metavar="FILE",
    help="A file of 'vcdeft compile', in place of example rows: --examples has query rows alone.",
)
@click.option(
    "--queries",
    metavar="DIR",
    help="A folder of pictures, each the query of --compiled. A text file of the same name is its "
    "content.",
)
@pipeline_options
@click.option(
    "--output", default="outputs", show_default=True, metavar="DIR", help="The folder to write."
)
@click.option(
    "--overwrite", is_flag=True, help="Generates again the images that --output already holds."
)
@click.option("--seed", type=int, help="The seed. It replaces the seeds of the grid file.")
@click.option(
    "--images-per-grid",
    "images",
    type=click.IntRange(1, MOST_IMAGES),
    default=1,
    show_default=True,
    help="The number of images for each grid, with consecutive seeds.",
)
@click.option(
    "--inference-steps", "steps", type=click.IntRange(1, 1000), default=30, show_default=True
)
@click.option(
    "--upsample",
    type=float,
    metavar="SCALE",
    help="Enlarges the images this many times with the model.",
)
@click.option(
    "--strength",
    type=float,
    help="The share of noise that --upsample adds, 0 to 1. The default is 0.4.",
)
@click.option(
    "--batch",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="The number of images of one shape that are generated together.",
)
@click.option(
    "--processes",
    type=click.IntRange(1),
    help="The number of processes that share the list. The default is one per GPU. Further "
    "commands share it too.",
)
@click.option(
    "--embedding-cache",
    "encodings",
    metavar="DIR",
    help="A folder that keeps latents and text embeddings for further commands.",
)
@click.option(
    "--offload",
    type=click.Choice(["none", "model", "group", "sequential"]),
    default="none",
    show_default=True,
    help="Moves weights out of the GPU while they are not used.",
)
@click.option(
    "--vae-tiling", is_flag=True, help="Encodes and decodes in tiles, which takes less memory."
)
@click.option(
    "--compile",
    "compile_blocks",
    is_flag=True,
    help="Compiles the blocks of the transformer with torch.",
)
@click.option(
    "--cache",
    metavar="NAME[=NUMBER]",
    help="Skips parts of steps: first-block or taylorseer. The images change a little.",
)
@click.option(
    "--context-cache",
    type=click.IntRange(1),
    metavar="STEPS",
    help="Computes examples, known cells and text in so many of the steps alone, e.g. 3: several "
    "times faster. The images change a little.",
)
@click.option(
    "--context",
    type=click.Choice(["full", "isolated", "causal"]),
    help="What examples and known cells see: all, in every step; themselves alone, computed once; "
    "or that, examples without the query. The default is as the adapters were trained.",
)
@click.option("--dry-run", is_flag=True, help="Checks all grids and lists the images to make.")
@click.pass_obj
def infer(
    arguments: Sequence[str],
    /,
    examples: str | None,
    compiled: str | None,
    queries: str | None,
    adapter: tuple[str, ...],
    output: str,
    overwrite: bool,
    upsample: float | None,
    strength: float | None,
    processes: int | None,
    encodings: str | None,
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
    from visualcloze_deft.inference.upsampling import STRENGTH, Upsampling

    if strength is not None and upsample is None:
        raise UserError("--strength goes with --upsample, e.g. --upsample 2")
    options["model"] = pinned(options["model"], options.pop("revision"))
    if (examples is None) == (queries is None):
        raise UserError("give --examples, a grid file; or --compiled with --queries, a folder")
    if queries is not None and compiled is None:
        raise UserError("--queries goes with --compiled, a file of 'vcdeft compile'")
    chosen = STRENGTH if strength is None else strength
    written = run_infer(
        Path(examples or queries or ""),
        Path(output),
        InferenceSettings(
            adapters=with_scales(adapter),
            upsampling=None if upsample is None else Upsampling(scale=upsample, strength=chosen),
            compiled=Path(compiled) if compiled else None,
            encodings=Path(encodings) if encodings else None,
            **options,
        ),
        processes=processes or 0,
        pictures=queries is not None,
        overwrite=overwrite,
        dry_run=dry_run,
        arguments=arguments,
    )
    for path in written:
        click.echo(path)
