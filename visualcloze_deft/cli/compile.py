"""`vcdeft compile`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from visualcloze_deft.cli.app import CONTEXT, cli
from visualcloze_deft.cli.options import REVISION, TASK_FOLDERS, with_scales


@cli.command("compile", context_settings=CONTEXT)
@click.option(
    "--examples",
    required=True,
    metavar="FILE",
    help="A grid file (JSON) of example rows. A query row, with a null, may follow; its pictures "
    "are not used.",
)
@click.option(
    "--adapter",
    multiple=True,
    metavar="DIR[=SCALE]",
    help="An adapter that was trained with context=causal, and its scale. Repeatable.",
)
@click.option(
    "--output", required=True, metavar="FILE", help="The file to write, NAME.safetensors."
)
@click.option(
    "--storage",
    type=click.Choice(["model", "fp8", "int8"]),
    default="model",
    show_default=True,
    help="The precision of the file: the model's, or 8 bits, half of bfloat16.",
)
@click.option(
    "--model",
    default="tiny",
    show_default=True,
    help="A diffusers folder or a hub id of FLUX.1-Fill, or 'tiny'.",
)
@REVISION
@click.option(
    "--model-lora",
    "lora",
    metavar="PATH",
    help="A FLUX LoRA that is merged into the base, e.g. VisualCloze's.",
)
@click.option(
    "--quantise",
    type=click.Choice(["none", "int8", "nf4", "fp8"]),
    default="none",
    show_default=True,
    help="The precision of the frozen blocks. 'vcdeft infer' must name the same.",
)
@click.option(
    "--resolution",
    type=click.IntRange(32, 2048),
    help="The side of a square cell in pixels. By default it is the model's.",
)
@click.option(
    "--untrained-context",
    is_flag=True,
    help="Allows adapters that were trained with another context, and the base alone.",
)
@TASK_FOLDERS
@click.option("--overwrite", is_flag=True, help="Writes over compiled examples in --output.")
@click.option("--dry-run", is_flag=True, help="Checks all and prints the size of the file.")
def compile_(
    *,
    examples: str,
    adapter: tuple[str, ...],
    output: str,
    storage: Any,
    overwrite: bool,
    dry_run: bool,
    **options: Any,
) -> None:
    """Run examples once: a file that answers queries in their place.

    It holds keys and values of the examples, and their pictures. 'vcdeft infer --compiled' then
    takes a folder of pictures, or query rows. It needs the same model and adapter.

    \b
    vcdeft compile --examples grid.json --adapter runs/causal --output relight.safetensors
    vcdeft infer --compiled relight.safetensors --adapter runs/causal --queries photos/
    """
    from visualcloze_deft.backbones.model_files import pinned
    from visualcloze_deft.inference.compiling import compile_file
    from visualcloze_deft.inference.settings import InferenceSettings
    from visualcloze_deft.sampling.denoising import GUIDANCE, STEPS

    options["model"] = pinned(options["model"], options.pop("revision"))
    compile_file(
        Path(examples),
        Path(output),
        InferenceSettings(
            adapters=with_scales(adapter),
            context="causal",
            steps=STEPS,
            guidance=GUIDANCE,
            **options,
        ),
        storage=storage,
        overwrite=overwrite,
        dry_run=dry_run,
    )
    if not dry_run:
        click.echo(output)
