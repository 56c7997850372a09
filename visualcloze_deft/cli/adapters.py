"""`vcdeft export` and `import`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from visualcloze_deft.cli.app import CONTEXT, cli
from visualcloze_deft.cli.options import REVISION

if TYPE_CHECKING:
    from visualcloze_deft.adapters.headers import Format


@cli.command("export", context_settings=CONTEXT)
@click.argument("run", metavar="RUN")
@click.option(
    "--format",
    "kind",
    required=True,
    type=click.Choice(["peft", "diffusers", "comfyui", "kohya", "merged"]),
    help="The tool that reads the file. 'merged' writes a transformer folder with the adapter in "
    "its weights.",
)
@click.option(
    "--output",
    required=True,
    metavar="PATH",
    help="The .safetensors file, or the folder, to write.",
)
@click.option(
    "--scale",
    type=float,
    default=1.0,
    show_default=True,
    help="The scale of the adapter, folded into the file.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="The precision of the file. A LoRA is float32 by default, a merged transformer as its "
    "base.",
)
@click.option("--model", help="The base. By default it is the one that the adapter was trained on.")
@REVISION
@click.option(
    "--model-lora",
    "lora",
    metavar="PATH",
    help="The LoRA in that base. By default it is the one of the training.",
)
@click.option(
    "--verify/--no-verify",
    default=True,
    show_default=True,
    help="Reads the written file and compares its output with the adapter's.",
)
def export_adapter(
    run: str,
    kind: Format,
    output: str,
    scale: float,
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

    from visualcloze_deft.adapters.export import export
    from visualcloze_deft.backbones.model_files import pinned

    report = export(
        Path(run),
        Path(output),
        kind,
        scale=scale,
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
    help="Leaves out tensors for text encoders. The text encoders are not changed here.",
)
def import_adapter(
    file: str, output: str, model: str, revision: str | None, without_text_encoders: bool
) -> None:
    """Turn a FLUX LoRA file (named as by diffusers, kohya or FLUX itself) into an adapter folder.

    \b
    vcdeft import my-lora.safetensors --model black-forest-labs/FLUX.1-Fill-dev --output my-lora
    vcdeft train --method lora --rank 16 --set adapter.init_from=my-lora ...
    """
    from visualcloze_deft.adapters.import_lora import import_lora
    from visualcloze_deft.backbones.model_files import TINY, pinned
    from visualcloze_deft.backbones.peft_files import adapter_settings

    base = pinned(model, revision)
    assert base is not None
    written = import_lora(
        Path(file),
        Path(output),
        model=base,
        text_encoders="left out" if without_text_encoders else "refused",
    )
    rank = adapter_settings(written)["r"]
    click.echo(f"{written}: an adapter of method lora, rank {rank}; train from it with")
    of_model = "" if base == TINY else f"--model {shlex.quote(base)} "
    start = shlex.quote(f"adapter.init_from={written}")
    click.echo(f"  vcdeft train {of_model}--method lora --rank {rank} --set {start}")
