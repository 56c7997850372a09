"""What a caller may give the pipeline, checked and completed."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, get_args

import torch

from visualcloze_deft.adapters import files
from visualcloze_deft.adapters.places import adapter_at, name_of
from visualcloze_deft.backbones.attention import AUTO, check_known, require
from visualcloze_deft.backbones.attention_check import Shapes
from visualcloze_deft.backbones.flux_fill.files import check_folder
from visualcloze_deft.backbones.lora_files import shapes_of
from visualcloze_deft.backbones.model_files import folder_of, index_of, on_hub
from visualcloze_deft.backbones.table import backbone_of
from visualcloze_deft.config.numbers import is_whole
from visualcloze_deft.config.run_settings import Bits
from visualcloze_deft.errors import UserError, suggestion
from visualcloze_deft.grids.cell_sizes import CELL_STEP, Cells
from visualcloze_deft.grids.prompt import ClipText
from visualcloze_deft.inference.compiled import Compiled
from visualcloze_deft.inference.grid_reading import read_requests
from visualcloze_deft.inference.pictures import Picture
from visualcloze_deft.inference.request import Request, request
from visualcloze_deft.inference.upsampling import Enlarging, as_upsampling
from visualcloze_deft.sampling.room import ran_out
from visualcloze_deft.storage.text_files import brief
from visualcloze_deft.task_registry.task import Task

Adapter = str | Path | files.StoredAdapter
Scales = Mapping[str, float] | Mapping[Path, float] | Mapping[files.StoredAdapter, float]
Adapters = Adapter | Sequence[Adapter] | Scales


KEYS = ("rows", "task", "task_prompt", "content_prompt", "seed", "images", "upsampling")
TEXT_PARTS = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
PARTS = ("scheduler", "vae", *TEXT_PARTS, "transformer")


@contextmanager
def enough_memory(doing: str) -> Iterator[None]:
    """Say what to change where memory runs out."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
        raise UserError(
            f"out of memory while {doing}: lower the batch, the resolution or the upsampling; "
            "offload (--offload model, enable_model_cpu_offload); keep the base in fewer bits "
            "(--quantise nf4); or decode in tiles (--vae-tiling, vae.enable_tiling)"
        ) from None


def left_out(name: str) -> dict[str, None]:
    """The parts that a model was saved without, each as None."""
    told = index_of(name)
    return {part: None for part in PARTS if told.get(part) == [None, None]}


def here(name: str, token: str | None) -> str:
    """A model's name or, of a hub id, the folder of its snapshot, downloaded with `token`."""
    if not on_hub(name):
        return name
    check_folder(name, token=token)
    return str(folder_of(name, token=token))


def device_of(device: str | None, device_map: str | None) -> str:
    """Where the parts go: all to one device, a GPU where there is one."""
    if device is not None and device_map is not None:
        raise UserError(f"device {device!r} and device_map {device_map!r}: give one of them")
    word = "device" if device_map is None else "device_map"
    wanted = device or device_map or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.device(wanted)
    except RuntimeError:
        raise UserError(
            f"{word} {wanted!r}: name one device, e.g. 'cuda'; parts that do not fit there go "
            "to the CPU and back with enable_model_cpu_offload()"
        ) from None
    return wanted


def is_side(value: object) -> bool:
    """Whether a cell can have sides of `value` pixels."""
    return is_whole(value) and value > 0 and value % CELL_STEP == 0


def check_words(
    *,
    quantise: str,
    cells: str | None,
    clip_text: str | None,
    resolution: int | None,
    dtype: object,
) -> None:
    """Raise `UserError` for what none of these arguments of `from_pretrained` can be."""
    for name, value, known in (
        ("quantise", quantise, get_args(Bits)),
        ("cells", cells, (None, *get_args(Cells))),
        ("clip_text", clip_text, (None, *get_args(ClipText))),
    ):
        if value not in known:
            raise UserError(f"{name} {value!r}: give one of {', '.join(filter(None, known))}")
    if resolution is not None and not is_side(resolution):
        raise UserError(f"resolution {brief(resolution)}: give a multiple of {CELL_STEP}")
    if not isinstance(dtype, torch.dtype | Mapping | None):
        raise UserError(f"dtype {brief(dtype)}: give a torch.dtype, or one for each part")


def check_attention(attention: str, model: str, *, device: str, dtype: torch.dtype) -> None:
    """Raise `UserError` where the kernel `attention` does not compute for `model` on `device`."""
    check_known(attention)
    if attention == AUTO:
        return
    sizes = backbone_of(model).sizes(model)
    shapes = Shapes(
        lengths=(), heads=sizes.heads, width=sizes.head, dtype=dtype, device=torch.device(device)
    )
    require(attention, shapes, passes="forward")


def requests_of(
    grids: str | Path | Mapping[str, Any] | Sequence[Mapping[str, Any]] | None,
    tasks: Mapping[str, Task],
    *,
    rows: Sequence[Sequence[Picture | None]] | None,
    own: Mapping[str, str | None],
    seed: int | Sequence[int] | None,
    images: int,
    upsampling: Enlarging | Sequence[Enlarging | None] | None,
    compiled: Compiled | None = None,
) -> list[Request]:
    """The grids of a call, checked, see `InContextPipeline.__call__`. own: task and prompts that go
    with `rows`. compiled: examples that go before every row."""
    if (grids is None) == (rows is None):
        raise UserError(f"grids and rows: {'neither' if grids is None else 'both'} given; give one")
    beside = [name for name, value in own.items() if value is not None]
    if grids is not None and beside:
        raise UserError(f"{beside[0]} goes with rows; each of grids names its own")
    if isinstance(grids, str | Path):
        for name, several in (("seed", seed), ("upsampling", upsampling)):
            if isinstance(several, list | tuple):
                raise UserError(f"{name} {several}: give one, or none, for a grid file")
        return read_requests(
            Path(grids),
            tasks,
            seed=seed if isinstance(seed, int) else None,
            images=images,
            upsampling=as_upsampling(upsampling),
            compiled=compiled,
        )
    common = {"seed": seed, "images": images, "upsampling": upsampling}
    if grids is None:
        return [one_request({"rows": rows, **own}, tasks, common, compiled)]
    if not isinstance(grids, Mapping | list | tuple):
        raise UserError(f"grids {brief(grids)}: give a grid file, a folder or a list of grids")
    found = []
    for number, one in enumerate([grids] if isinstance(grids, Mapping) else grids, 1):
        try:
            found.append(one_request(one, tasks, common, compiled))
        except UserError as error:
            raise UserError(f"grid {number}: {error}") from None
    return found


def one_request(
    given: Mapping[str, Any],
    tasks: Mapping[str, Task],
    common: Mapping[str, Any],
    compiled: Compiled | None,
) -> Request:
    """One grid of a call, checked. common: `seed`, which replaces its own, `images` and
    `upsampling`, for a grid without its own. compiled: see `requests_of`."""
    if not isinstance(given, Mapping):
        raise UserError(f"{brief(given)}: expected an object such as {{'rows': ..., 'seed': 0}}")
    for key in given:
        if key not in KEYS:
            raise UserError(f"unknown key {key!r}; {suggestion(str(key), KEYS)}")
    for name in ("task", "task_prompt", "content_prompt"):
        if not isinstance(given.get(name), str | None):
            raise UserError(f"{name} {brief(given[name])}: give text")
    keys = {**given}
    if common["seed"] is not None:
        keys["seed"] = common["seed"]
    if isinstance(keys.get("seed") or 0, int):
        keys.setdefault("images", common["images"])
    keys.setdefault("upsampling", common["upsampling"])
    keys = {key: value for key, value in keys.items() if value is not None}
    shown = checked_rows(keys.pop("rows", None))
    if compiled is not None:
        shown, keys = compiled.before(shown, keys)
    return request(shown, tasks, **keys)


def checked_rows(rows: object) -> list[Sequence[object]]:
    """Raise `UserError` unless `rows` is a list of rows of cells."""
    if not isinstance(rows, list | tuple):
        raise UserError(f"rows {brief(rows)}: give a list of rows, each a list of pictures")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, list | tuple):
            raise UserError(
                f"row {number} is {brief(row)}, not a list of pictures; give "
                "rows=[[example, its target], [query, None]]"
            )
    return list(rows)


def stored_adapters(adapters: Adapters | None, model: str) -> dict[files.StoredAdapter, float]:
    """Each adapter read, with its scale. model: the name of the base.

    Raises `UserError` where one cannot be read.
    """
    if adapters is None:
        return {}
    several = adapters if isinstance(adapters, list | tuple | Mapping) else [adapters]
    given = several if isinstance(several, Mapping) else dict.fromkeys(several, 1.0)
    return {
        one
        if isinstance(one, files.StoredAdapter)
        else adapter_at(one, lambda: shapes_of(model)): scale
        for one, scale in given.items()
    }


def folders_of(task_folders: str | Path | Sequence[str | Path]) -> list[Path]:
    """One folder of task files, or several."""
    if isinstance(task_folders, str | Path):
        return [Path(task_folders)]
    return [*map(Path, task_folders)]


def names_of(adapters: Collection[files.StoredAdapter]) -> list[str]:
    """What adapters are called in a pipeline: `name_of` their folders, where that is one's own."""
    short = [name_of(one.folder) for one in adapters]
    return [
        str(one.folder) if short.count(name) > 1 else name
        for one, name in zip(adapters, short, strict=True)
    ]


Word = TypeVar("Word", bound=str)


def known_or_default(told: str | None, known: tuple[Word, ...]) -> Word:
    """What an adapter's file says, or the first of `known` where it says nothing that is known."""
    return next((word for word in known if word == told), known[0])
