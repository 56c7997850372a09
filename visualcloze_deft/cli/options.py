"""Options that several commands share, and what their values mean."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from visualcloze_deft.errors import UserError

if TYPE_CHECKING:
    from visualcloze_deft.config.run_settings import Run

MOST_IMAGES = 10_000  # of a grid, and of a task
SEED = click.IntRange(0, 2**63 - 1)

DATA = click.option(
    "--data",
    multiple=True,
    metavar="NAME=PATH",
    help="A source of data, e.g. folder=PATH. Repeatable. The default is scenes.",
)


ANNOTATE = click.option(
    "--annotate",
    multiple=True,
    metavar="ROLE=PLACE",
    help="Computes a role that the data lacks from the target, with a model of transformers or "
    "from "
    "a folder of 'vcdeft data annotate'. Repeatable.",
)


TASK_FOLDERS = click.option(
    "--task-folder",
    "task_folders",
    multiple=True,
    metavar="DIR",
    help="A folder with your own task files, beside the shipped ones. Repeatable.",
)


def number_or_word(_: click.Context, __: click.Parameter, text: str | None) -> int | str | None:
    number = text is not None and text.isdecimal() and len(text) < 10
    return int(text) if number and text is not None else text


REVISION = click.option(
    "--revision", metavar="REV", help="The branch, tag or commit of --model on the hub."
)


class Setting(click.Option):
    """An option that sets a setting of a run; the docstring of the setting is its help."""

    def __init__(self, *words: Any, setting: str, **more: Any) -> None:
        super().__init__(*words, **more)
        self.setting = setting

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        from visualcloze_deft.config.run_settings import description

        self.help = description(self.setting)
        return super().get_help_record(ctx)


def setting(option: str, name: str, **more: Any) -> Callable[[Any], Any]:
    return click.option(option, cls=Setting, setting=name, **more)


RUN_OPTIONS = [
    click.option(
        "--config", metavar="FILE", help="A run file (TOML), or the name of a shipped one."
    ),
    setting("--model", "model"),
    REVISION,
    DATA,
    ANNOTATE,
    setting("--tasks", "data.tasks"),
    TASK_FOLDERS,
    setting("--validation-every", "data.validation_every", type=int, metavar="N"),
    setting("--method", "adapter.method"),
    setting("--rank", "adapter.rank", type=int),
    setting("--zero", "zero", callback=number_or_word),
    setting("--gradient-checkpointing", "gradient_checkpointing", callback=number_or_word),
    setting("--steps", "steps", type=int),
    setting("--batch", "batch", type=int),
    setting("--resolution", "data.resolution", type=int),
    setting("--lr", "optimiser.lr", type=float),
    setting("--seed", "seed", type=int),
    setting("--output", "output", metavar="DIR"),
    setting("--processes", "processes", type=int),
    click.option(
        "--set",
        "overrides",
        multiple=True,
        metavar="NAME=VALUE",
        help="Sets any other setting of the run file. Repeatable.",
    ),
]  # of `train` and `plan`


def run_options(command: Callable[..., None]) -> Callable[..., None]:
    for option in reversed(RUN_OPTIONS):
        command = option(command)
    return command


PIPELINE_OPTIONS = [
    click.option(
        "--model",
        default="tiny",
        show_default=True,
        help="A diffusers folder or a hub id of FLUX.1-Fill, or 'tiny'.",
    ),
    REVISION,
    click.option(
        "--model-lora",
        "lora",
        metavar="PATH",
        help="A FLUX LoRA that is merged into the base, e.g. VisualCloze's.",
    ),
    click.option(
        "--adapter",
        "adapter",
        multiple=True,
        metavar="DIR[=SCALE]",
        help="An adapter folder, e.g. runs/demo/adapter, and its scale. Repeatable: they add up.",
    ),
    click.option(
        "--quantise",
        type=click.Choice(["none", "int8", "nf4", "fp8"]),
        default="none",
        show_default=True,
        help="The precision of the frozen blocks. int8 and nf4 need bitsandbytes.",
    ),
    click.option(
        "--clip-text",
        type=click.Choice(["fit", "original"]),
        help="The part of a long text that CLIP reads. By default it is that of the adapter's "
        "training.",
    ),
    click.option(
        "--cells",
        type=click.Choice(["row", "own", "square"]),
        help="The shape of cells: that of the first image of the row, their own, or square. By "
        "default it is that of the adapter's training.",
    ),
    click.option(
        "--resolution",
        type=click.IntRange(32, 2048),
        help="The side of a square cell in pixels. By default it is the model's.",
    ),
    click.option("--guidance", type=float, default=30.0, show_default=True),
    click.option(
        "--untrained-context",
        is_flag=True,
        help="Allows a context that an adapter, or the base alone, was not trained with.",
    ),
    click.option(
        "--attention",
        default="auto",
        show_default=True,
        metavar="NAME",
        help="The attention kernel: native, cudnn, flash, efficient, math or another backend of "
        "diffusers. auto takes the fastest kernel of the GPU whose results are right.",
    ),
    TASK_FOLDERS,
]  # of `infer` and `compile`


def pipeline_options(command: Callable[..., None]) -> Callable[..., None]:
    for option in reversed(PIPELINE_OPTIONS):
        command = option(command)
    return command


def run_of(
    config: str | None,
    data: Sequence[str],
    annotate: Sequence[str],
    overrides: Sequence[str],
    options: Mapping[str, Any],
) -> Run:
    """The settings that `RUN_OPTIONS` say, over a run file."""
    from visualcloze_deft.backbones.model_files import pinned
    from visualcloze_deft.config.near_settings import OPTIONS
    from visualcloze_deft.config.run_settings import config_for, load_run

    options = dict(options)
    options["model"] = pinned(options["model"], options.pop("revision", None))
    folders = options.pop("task_folders", ())
    names = {option: setting for setting, option in OPTIONS.items()}
    given: list[tuple[str, str, Any]] = []  # option, setting, value
    for name, value in options.items():
        option = f"--{name.replace('_', '-')}"
        given += [(option, names.get(option, name), value)] if value is not None else []
    given += [("--data", "data.sources", list(data))] if data else []
    given += [("--task-folder", "data.task_folders", list(folders))] if folders else []
    given += [("--annotate", f"data.annotate.{r}", at) for r, at in places(annotate).items()]
    return load_run(
        config or config_for(options["model"], data),
        overrides,
        options=[(option, f"{name}={toml_value(value)}") for option, name, value in given],
    )


def toml_value(value: Any) -> str:
    return str(value) if isinstance(value, float) else json.dumps(value, ensure_ascii=False)


def with_scales(given: Sequence[str]) -> dict[Path, float]:
    """The adapter folders and scales that `--adapter` names; a run folder stands for its adapter.

    >>> with_scales(["a", "b=0.5"])
    {PosixPath('a'): 1.0, PosixPath('b'): 0.5}
    """
    from visualcloze_deft.config.numbers import is_scale
    from visualcloze_deft.storage.adapter_places import adapter_folder

    found: dict[Path, float] = {}
    for text in given:
        folder, equals, number = text.rpartition("=")
        if not equals or Path(text).is_dir():
            folder, number = text, "1"
        try:
            scale = float(number)
        except ValueError:
            raise UserError(f"--adapter {text!r}: {number!r} is no number") from None
        if not is_scale(scale):
            raise UserError(f"--adapter {text!r}: give a number up to 1e6 as its scale, e.g. 1")
        place = adapter_folder(Path(folder))
        if place in found:
            raise UserError(f"--adapter {folder}: named twice; give it one scale")
        found[place] = scale
    return found


def given_but(known: frozenset[str]) -> list[str]:
    """What the command line names of this command beside `known`, as it is written there."""
    context = click.get_current_context()
    return [
        parameter.opts[0] if isinstance(parameter, click.Option) else str(parameter.name).upper()
        for parameter in context.command.params
        if parameter.name not in known
        and context.get_parameter_source(str(parameter.name)) is ParameterSource.COMMANDLINE
    ]


def sources_named(data: Sequence[str]) -> dict[str, str]:
    """What --data says: name -> path.

    >>> sources_named(["dreambooth=data/dreambooth", "scenes"])
    {'dreambooth': 'data/dreambooth', 'scenes': ''}
    """
    from visualcloze_deft.config.source_specs import named_places

    return named_places(data, option="--data")


RESOLUTION = click.option(
    "--resolution",
    type=click.IntRange(32, 2048),
    help="The side of a square cell in pixels. The default is the built-in model's for scenes, 384 "
    "for images.",
)


HOLD_OUT = click.option(
    "--validation-every",
    type=click.IntRange(2),
    metavar="N",
    help="Takes only every N-th item of the data: those that training with "
    "data.validation_every=N never sees.",
)


OVERWRITE = click.option(
    "--overwrite",
    is_flag=True,
    help="Replaces a file at --output that is no preview of vcdeft, too.",
)


def places(annotate: Sequence[str]) -> dict[str, str]:
    """What --annotate says: role -> place. Only roles that a model computes, each once."""
    from visualcloze_deft.config.source_specs import named_places
    from visualcloze_deft.data.annotation.models import check_role

    found = named_places(annotate, option="--annotate")
    for role, place in found.items():
        if not place:
            raise UserError(f"--annotate {role!r}: expected ROLE=PLACE, e.g. depth=MODEL")
        check_role(role)
    return found


def png_path(output: str, *, overwrite: bool) -> Path:
    """`output`, if a picture can be written there. overwrite: also over one of somebody else."""
    from visualcloze_deft.reporting.contact_sheet import check_replaceable
    from visualcloze_deft.storage.atomic import output_folder

    path = Path(output)
    if path.suffix != ".png" or path.is_dir():
        raise UserError(f"--output {path}: give a file that ends in .png")
    if not path.parent.is_dir():
        raise UserError(f"--output {path}: no folder {path.parent}")
    if not overwrite:
        check_replaceable(path, way_out="give --overwrite, or another --output")
    output_folder(path.parent)
    return path


def preview_run(
    name: str,
    task_folders: tuple[str, ...],
    data: tuple[str, ...],
    annotate: tuple[str, ...],
    validation_every: int | None,
    seed: int,
    resolution: int | None,
) -> Run:
    from visualcloze_deft.backbones.flux_fill.files import FLUX_RESOLUTION, resolution_of
    from visualcloze_deft.backbones.model_files import TINY
    from visualcloze_deft.config.run_settings import parse_run

    made = all(source.startswith("scenes") for source in data)
    wanted: dict[str, Any] = {"tasks": name, "task_folders": task_folders}
    wanted["resolution"] = resolution or (resolution_of(TINY) if made else FLUX_RESOLUTION)
    wanted |= {"validation_every": validation_every or 0, "annotate": places(annotate)}
    if data:
        wanted["sources"] = data
    return parse_run({"data": wanted, "seed": seed}, where="command line")
