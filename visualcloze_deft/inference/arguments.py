"""What a caller may give the pipeline, checked and completed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch

from visualcloze_deft.backbones.attention import AUTO, check_known, require
from visualcloze_deft.backbones.attention_check import Shapes
from visualcloze_deft.backbones.model_files import check_folder, folder_of, index_of, on_hub
from visualcloze_deft.backbones.table import backbone_of
from visualcloze_deft.errors import UserError
from visualcloze_deft.sampling.room import ran_out

Adapters = str | Path | Mapping[Path, float]


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


def strengths_of(adapter: Adapters | None) -> dict[Path, float]:
    if adapter is None:
        return {}
    if isinstance(adapter, Mapping):
        return {Path(folder): strength for folder, strength in adapter.items()}
    return {Path(adapter): 1.0}


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
