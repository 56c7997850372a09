"""What a caller may give the pipeline, checked and completed."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch

from visualcloze_deft.adapters import files
from visualcloze_deft.backbones.attention import AUTO, check_known, require
from visualcloze_deft.backbones.attention_check import Shapes
from visualcloze_deft.backbones.flux_fill.files import check_folder
from visualcloze_deft.backbones.model_files import folder_of, index_of, on_hub
from visualcloze_deft.backbones.table import backbone_of
from visualcloze_deft.errors import UserError
from visualcloze_deft.grids.grid import Row
from visualcloze_deft.inference.request import Request, read_requests, request
from visualcloze_deft.inference.upsampling import Upsampling
from visualcloze_deft.sampling.room import ran_out
from visualcloze_deft.task_registry.task import Task

Adapter = str | Path | files.StoredAdapter
Adapters = Adapter | Mapping[Path, float] | Mapping[files.StoredAdapter, float]


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
        raise UserError("give device or device_map, not both")
    wanted = device or device_map or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.device(wanted)
    except RuntimeError:
        raise UserError(
            f"device_map {wanted!r}: name one device, e.g. 'cuda'; parts that do not fit there go "
            "to the CPU and back with enable_model_cpu_offload()"
        ) from None
    return wanted


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
    grids: str | Path | Sequence[Mapping[str, Any]] | None,
    tasks: Mapping[str, Task],
    *,
    rows: Sequence[Row] | None,
    own: Mapping[str, str | None],
    seed: int | Sequence[int] | None,
    images: int,
    upsampling: Upsampling | Sequence[Upsampling | None] | None,
) -> list[Request]:
    """The grids of a call, checked, see `InContextPipeline.__call__`. own: task and prompts that go
    with `rows`."""
    if (grids is None) == (rows is None):
        raise UserError("give either grids or rows, not both and not neither")
    if grids is not None and any(value is not None for value in own.values()):
        raise UserError("task and prompts go with rows; grids say their own")
    if isinstance(grids, str | Path):
        if not isinstance(seed, int | None) or not isinstance(upsampling, Upsampling | None):
            raise UserError("for a grid file give one seed and one upsampling, or none")
        return read_requests(Path(grids), tasks, seed=seed, images=images, upsampling=upsampling)
    given = [{"rows": rows, **own}] if grids is None else grids
    found = []
    for number, each in enumerate(given, 1):
        try:
            keys = dict(each)
            if seed is not None:
                keys["seed"] = seed
            if isinstance(keys.get("seed") or 0, int):
                keys.setdefault("images", images)
            keys = {key: value for key, value in keys.items() if value is not None}
            keys.setdefault("upsampling", upsampling)
            found.append(request([list(row) for row in keys.pop("rows", ())], tasks, **keys))
        except (TypeError, ValueError) as error:
            raise UserError(
                f"grid {number}: expected an object such as {{'rows': ..., 'seed': 0}}: {error}"
            ) from None
    return found


def stored_adapters(adapters: Adapters | None) -> dict[files.StoredAdapter, float]:
    """Each adapter read, with its scale. Raises `UserError` where one cannot be."""
    if adapters is None:
        return {}
    given = adapters if isinstance(adapters, Mapping) else {adapters: 1.0}
    return {
        one if isinstance(one, files.StoredAdapter) else files.read(Path(one)): scale
        for one, scale in given.items()
    }


def names_of(adapters: Collection[files.StoredAdapter]) -> list[str]:
    """What adapters are called in a pipeline: `name_of` their folders, where that is one's own."""
    short = [name_of(one.folder) for one in adapters]
    return [
        str(one.folder) if short.count(name) > 1 else name
        for one, name in zip(adapters, short, strict=True)
    ]


def name_of(folder: Path) -> str:
    """What an adapter is called where nothing else is said: its folder's name, or its run's.

    >>> name_of(Path("runs/demo/adapter")), name_of(Path("mugs"))
    ('demo', 'mugs')
    """
    place = folder.absolute()
    return place.parent.name if place.name == "adapter" else place.name


Word = TypeVar("Word", bound=str)


def known_or_default(told: str | None, known: tuple[Word, ...]) -> Word:
    """What an adapter's file says, or the first of `known` where it says nothing that is known."""
    return next((word for word in known if word == told), known[0])
