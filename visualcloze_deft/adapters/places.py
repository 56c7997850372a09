"""Where adapters lie: the one place in which a path, or a hub id, becomes an adapter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from visualcloze_deft.adapters import files
from visualcloze_deft.adapters.files import StoredAdapter
from visualcloze_deft.adapters.import_lora import as_adapter
from visualcloze_deft.backbones import lora_files
from visualcloze_deft.backbones.lora_names import Shapes
from visualcloze_deft.backbones.lora_places import USUAL, lora_file
from visualcloze_deft.backbones.peft_files import WEIGHTS, settings_file
from visualcloze_deft.errors import UserError
from visualcloze_deft.storage.adapter_places import ADAPTER, CHECKPOINTS, run_folder_of
from visualcloze_deft.storage.hub import may_be_hub_id
from visualcloze_deft.storage.text_files import brief

SUFFIX = ".safetensors"


def adapter_at(place: str | Path, shapes: Callable[[], Shapes]) -> StoredAdapter:
    """The adapter at `place`: a folder in peft's format, a LoRA file of any tool, or a hub id.

    Text alone can be a hub id. shapes: gives (outputs, inputs) of the layers of the base.
    Raises `UserError` where there is none, or it is damaged or does not fit `shapes`.
    """
    path = found(place)
    if path.suffix != SUFFIX or path.is_dir():
        return files.read(path)
    if not path.is_file():
        raise UserError(f"adapter {path}: no such file")
    if settings_file(path):
        return files.read(path.parent)
    return as_adapter(lora_files.read(path, shapes=shapes()), origin=path)


def found(place: str | Path) -> Path:
    """Where the adapter lies here; that of a hub id is downloaded where the cache lacks it."""
    if not isinstance(place, str | Path):
        raise UserError(f"adapter {brief(place)}: give a folder, a LoRA file, or a hub id")
    path = Path(place)
    if isinstance(place, Path) or path.exists() or not may_be_hub_id(place):
        return path
    try:
        return lora_file(place)
    except UserError as error:
        raise UserError(f"adapter {place!r}: no file or folder here; {error}") from None


def name_of(place: Path) -> str:
    """What an adapter is called where nothing else is said: its file, folder, run or repository.

    >>> name_of(Path("runs/demo/adapter")), name_of(Path("mugs")), name_of(Path("a/b.safetensors"))
    ('demo', 'mugs', 'b')
    """
    place = place.absolute()
    if place.parent.name == CHECKPOINTS:
        return f"{run_folder_of(place).name}-{place.name}"
    usual = place.name in (ADAPTER, USUAL, WEIGHTS)
    folder = place.parent if usual else place
    if folder.parent.name == "snapshots":  # of the hub's cache
        return folder.parent.parent.name.rpartition("--")[2]
    return folder.name.removesuffix(SUFFIX)
