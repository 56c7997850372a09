"""`vcdeft publish`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from visualcloze_deft.cli.app import CONTEXT, cli
from visualcloze_deft.cli.options import REVISION

if TYPE_CHECKING:
    from visualcloze_deft.publishing.publish import Format


@cli.command(context_settings=CONTEXT)
@click.argument("run", metavar="RUN")
@click.option("--repo", required=True, metavar="OWNER/NAME", help="The repository on the hub.")
@click.option("--private", is_flag=True, help="Makes a new repository that only you can see.")
@click.option(
    "--dry-run",
    metavar="DIR",
    help="Writes what would be uploaded into this folder, and does not look for the hub.",
)
@click.option(
    "--evaluation",
    "evaluations",
    multiple=True,
    metavar="DIR",
    help="A folder of 'vcdeft eval' whose figures the model card shows. Repeatable.",
)
@click.option("--base", metavar="ID", help="The id on the hub of a base that is a local folder.")
@click.option(
    "--format",
    "formats",
    multiple=True,
    type=click.Choice(["diffusers", "comfyui", "kohya"]),
    default=("diffusers", "comfyui"),
    show_default=True,
    help="A LoRA for this tool, beside the adapter. Repeatable.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="The precision of those LoRA files. The default is float32.",
)
@click.option(
    "--with-pictures",
    is_flag=True,
    help="Shows the newest sample sheet, which holds pictures of your data.",
)
@click.option("--model", help="The base. By default it is the one that the adapter was trained on.")
@REVISION
@click.option(
    "--model-lora",
    "lora",
    metavar="PATH",
    help="The LoRA in that base. By default it is the one of the training.",
)
def publish(
    run: str,
    repo: str,
    private: bool,
    dry_run: str | None,
    evaluations: tuple[str, ...],
    base: str | None,
    formats: tuple[Format, ...],
    dtype: Literal["float32", "bfloat16", "float16"] | None,
    with_pictures: bool,
    model: str | None,
    revision: str | None,
    lora: str | None,
) -> None:
    """Upload the adapter of the run folder RUN to the Hugging Face hub: the adapter with its tasks,
    a LoRA for other tools, and a model card made from the run.

    No path, name or token of this machine is uploaded. Files that are there already and are not
    written again stay.

    \b
    vcdeft publish runs/demo --repo me/grids --dry-run look
    vcdeft publish runs/demo --repo me/grids --with-pictures --evaluation evaluation --private
    """
    from visualcloze_deft.backbones.model_files import pinned
    from visualcloze_deft.publishing.publish import PublishRequest
    from visualcloze_deft.publishing.publish import publish as publish_run

    asked = PublishRequest(
        run=Path(run),
        repo=repo,
        private=private,
        base=base,
        evaluations=[Path(place) for place in evaluations],
        formats=tuple(dict.fromkeys(formats)),
        dtype=dtype,
        model=pinned(model, revision),
        lora=lora,
        pictures=with_pictures,
    )
    for line in publish_run(asked, into=Path(dry_run) if dry_run is not None else None):
        click.echo(line)
