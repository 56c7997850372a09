"""The group of all commands."""

from __future__ import annotations

from typing import Any

import click

from visualcloze_deft.errors import suggestion

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


class Commands(click.Group):
    """A group that knows what was meant by a mistyped command."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            ctx.fail(f"no such command {args[0]!r}; {suggestion(args[0], self.list_commands(ctx))}")
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
