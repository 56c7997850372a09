"""`vcdeft compile`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from visualcloze_deft.cli.app import CONTEXT, cli
from visualcloze_deft.cli.options import pipeline_options, with_scales


@cli.command("compile", context_settings=CONTEXT)
@click.option(
    "--examples",
    required=True,
    metavar="FILE",
    help="A grid file (JSON) of example rows. A query row, with a null, may follow; its pictures "
    "are not used.",
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
@pipeline_options
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
    from visualcloze_deft.sampling.denoising import STEPS

    options["model"] = pinned(options["model"], options.pop("revision"))
    compile_file(
        Path(examples),
        Path(output),
        InferenceSettings(
            adapters=with_scales(adapter),
            context="causal",
            steps=STEPS,
            **options,
        ),
        storage=storage,
        overwrite=overwrite,
        dry_run=dry_run,
    )
    if not dry_run:
        click.echo(output)
