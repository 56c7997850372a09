"""The options of every command, as a list: a new one is a decision, and so is a new meaning."""

from __future__ import annotations

from collections.abc import Iterator

import click

from visualcloze_deft.cli import cli

OPTIONS = {
    "compare": "CONFIG --dry-run --output --set",
    "compile": (
        "--adapter --attention --cells --clip-text --dry-run --examples --guidance --model "
        "--model-lora --output --overwrite --quantise --resolution --revision --storage "
        "--task-folder --untrained-context"
    ),
    "data annotate": "SOURCE --annotate --output",
    "data cache": (
        "--annotate --attention --batch --config --data --examples --gradient-checkpointing "
        "--lr --method --model --output --processes --rank --resolution --revision --seed "
        "--set --steps --task-folder --tasks --text-only --validation-every --zero"
    ),
    "data caption": "SOURCE --batch --model --output --overwrite --prompt",
    "data check": "SOURCES --task-folder --workers",
    "data preview": "SOURCE --count --output --overwrite --seed",
    "eval": (
        "ADAPTER --against --against-base --annotate --batch --data --dry-run "
        "--edge-tolerance --encoder --guidance --images --images-per-grid --inference-steps "
        "--limit --lpips --model --model-lora --output --processes --prompts --quantise "
        "--revision --rows --seed --suite --task-folder --tasks --unpaired --validation-every"
    ),
    "export": (
        "RUN --dtype --format --model --model-lora --no-verify --output --revision --scale --verify"
    ),
    "import": "FILE --model --output --revision --without-text-encoders",
    "infer": (
        "--adapter --attention --batch --cache --cells --clip-text --compile --compiled --context "
        "--context-cache --dry-run --embedding-cache --examples --guidance --images-per-grid "
        "--inference-steps --model --model-lora --offload --output --overwrite --processes "
        "--quantise --queries --resolution --revision --seed --strength --task-folder "
        "--untrained-context --upsample --vae-tiling"
    ),
    "plan": (
        "--annotate --batch --config --data --gradient-checkpointing --grid --json --lr "
        "--memory --method --model --output --processes --rank --resolution --revision --run "
        "--seed --set --steps --task-folder --tasks --validation-every --zero"
    ),
    "publish": (
        "RUN --base --dry-run --dtype --evaluation --format --model --model-lora --private --repo "
        "--revision --with-pictures"
    ),
    "report": "RUN",
    "tasks check": "FILE --task-folder",
    "tasks example": (
        "NAME --annotate --content --count --data --output --resolution --rows --seed "
        "--task-folder --validation-every"
    ),
    "tasks new": "NAME --columns --targets --task-folder",
    "tasks list": "--json --task-folder",
    "tasks preview": (
        "NAME --annotate --count --data --each --output --overwrite --resolution --seed "
        "--task-folder --validation-every"
    ),
    "tasks show": "NAME --content --model --revision --task-folder",
    "train": (
        "--allow-change --annotate --attention --batch --config --data --dry-run "
        "--gradient-checkpointing --lr --method --model --output --processes --rank "
        "--resolution --resume --revision --seed --set --steps --task-folder --tasks "
        "--validation-every --zero"
    ),
}
# Commands in which an option of one name does the same: where they differ, the name is another one.
MEANINGS = {
    "--images": {"eval"},  # a folder; how many are made of a grid is --images-per-grid
    "--strength": {"infer"},  # of upsampling; an adapter has a --scale
    "--steps": {"train", "plan", "data cache"},  # of the optimiser; sampling has --inference-steps
    "--inference-steps": {"infer", "eval"},
    "--scale": {"export"},
}


def commands(command: click.Command, *path: str) -> Iterator[tuple[str, click.Command]]:
    if isinstance(command, click.Group):
        for name, inner in command.commands.items():
            yield from commands(inner, *path, name)
    else:
        yield " ".join(path), command


def words(command: click.Command) -> list[str]:
    """Arguments in capitals, then options."""
    options = [p for p in command.params if isinstance(p, click.Option) and not p.hidden]
    named = sorted(word for option in options for word in option.opts + option.secondary_opts)
    return [str(p.name).upper() for p in command.params if isinstance(p, click.Argument)] + named


def test_the_options_of_all_commands_are_these() -> None:
    assert {name: words(c) for name, c in commands(cli)} == {
        n: w.split() for n, w in OPTIONS.items()
    }


def test_an_option_means_the_same_in_every_command() -> None:
    for option, having in MEANINGS.items():
        assert {name for name, c in commands(cli) if option in words(c)} == having, option


def test_every_option_has_a_sentence_of_help() -> None:
    silent = []
    for name, command in commands(cli):
        with click.Context(command) as context:
            for option in command.params:
                record = option.get_help_record(context)
                if isinstance(option, click.Option) and record and not record[1].strip():
                    silent.append(f"{name} {option.opts[0]}")
    assert silent == []
