"""Where the file of a LoRA lies: a file, a folder or a repository on the hub."""

from __future__ import annotations

from pathlib import Path

from visualcloze_deft.backbones.model_files import file_of, hub_files
from visualcloze_deft.backbones.peft_files import WEIGHTS
from visualcloze_deft.errors import UserError
from visualcloze_deft.storage.adapter_places import CONFIG
from visualcloze_deft.storage.hub import may_be_hub_id

USUAL = "pytorch_lora_weights.safetensors"  # diffusers' name


def check_lora(name: str) -> None:
    """Raise `UserError` if `name` is no LoRA that `lora_file` finds; none is downloaded for it."""
    if not Path(name).is_file():
        file_in(name)


def lora_file(name: str, file: str | None = None) -> Path:
    """The .safetensors file of a LoRA: a file, the one in a folder, or the one of a hub id.

    file: its name there, where not the only or usual one. On the hub it is downloaded where the
    cache lacks it, with an adapter's settings beside it.
    """
    path = Path(name)
    if path.is_file():
        return path
    check_place(name)
    if file and path.is_dir() and not (path / file).is_file():
        raise UserError(f"weight_name {file!r}: no such file in {path}")
    file = file or file_in(name)
    if path.is_dir():
        return path / file
    if CONFIG in hub_files(name):
        file_of(name, CONFIG)
    return file_of(name, file)


def check_place(name: str) -> None:
    """Raise `UserError` where `name` is no folder and can be no hub id."""
    if not Path(name).is_dir() and not may_be_hub_id(name):
        raise UserError(f"LoRA {name!r}: no such file or folder, and no hub id")


def file_in(name: str) -> str:
    """The LoRA file in a folder or repository: the only one, or the one with a usual name."""
    check_place(name)
    path = Path(name)
    files = {p.name for p in path.iterdir()} if path.is_dir() else hub_files(name)
    found = sorted(file for file in files if file.endswith(".safetensors") and "/" not in file)
    usual = [file for file in (USUAL, WEIGHTS) if file in found]
    if not found:
        raise UserError(f"LoRA {name!r}: no .safetensors file in it")
    chosen, *others = usual or found
    if others:
        raise UserError(
            f"LoRA {name!r}: {len(found)} .safetensors files, {chosen} and {others[0]} among them; "
            "name the file itself"
        )
    return chosen
