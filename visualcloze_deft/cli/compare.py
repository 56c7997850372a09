"""`vcdeft compare`."""

from __future__ import annotations

import json

import click

from visualcloze_deft.cli.app import CONTEXT, cli


@cli.command("compare", context_settings=CONTEXT)
@click.argument("config", metavar="CONFIG")
@click.option(
    "--output",
    metavar="DIR",
    help="The folder of the comparison. By default the comparison file names it.",
)
@click.option(
    "--dry-run",
    is_flag=True,
    help="Checks everything and lists the trainings, their ranks and their state.",
)
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="NAME=VALUE",
    help="Sets any setting of the comparison file. Repeatable.",
)
def compare_methods(
    config: str, output: str | None, dry_run: bool, overrides: tuple[str, ...]
) -> None:
    """Train DEFT, PaRa and LoRA on the same examples in the same order, at the same rank and with
    as many trained values, several seeds each; then measure the gain on what is new and, where the
    file names old tasks, what is kept of those.

    CONFIG is a comparison file (TOML) or the name of a shipped one: compare-scenes,
    compare-subject, compare-flux, compare-flux-subject. Results are tables (Markdown, CSV),
    samples of all methods side by side, a page that opens without a server and a line for each
    task: see docs/compare.md. A call that was ended
    goes on where it stopped: the same command.

    \b
    vcdeft compare compare-scenes --dry-run
    vcdeft compare compare-scenes
    vcdeft compare compare-scenes --set seeds=[0,1,2,3,4] --output runs/compare-scenes
    vcdeft compare mine.toml --set rank=16 --set method.lora.optimiser.lr=1e-4
    """
    from visualcloze_deft.comparison.compare import compare, described, planned
    from visualcloze_deft.config.comparison import load_comparison

    given = [f"output={json.dumps(output, ensure_ascii=False)}"] if output else []
    comparison = load_comparison(config, [*overrides, *given])
    if dry_run:
        for line in described(planned(comparison)):
            click.echo(line)
        return
    path = compare(comparison)
    click.echo(path.read_text(encoding="utf-8").partition("### Methods in pairs")[0].rstrip())
    click.echo(f"tables: {path}   report: {path.with_name('report.html')}")
