"""An adapter's files in peft's format: what they say, before any weight is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from visualcloze_deft.backbones.model_settings import AdapterFile
from visualcloze_deft.errors import UserError
from visualcloze_deft.storage.adapter_places import CONFIG
from visualcloze_deft.storage.settings_files import checked
from visualcloze_deft.storage.tensor_headers import read_texts

WEIGHTS = "adapter_model.safetensors"  # peft's name for an adapter's tensors


def adapter_settings(folder: Path) -> dict[str, Any]:
    """What the settings file of the adapter in a folder says, see `settings_files.checked`."""
    path = folder / CONFIG
    if not folder.exists():
        raise UserError(f"adapter {folder}: no such file or folder")
    if folder.is_file():
        raise UserError(
            f"adapter {folder}: a file; name an adapter's folder or a .safetensors file"
        )
    if not path.is_file():
        raise UserError(f"adapter {folder}: no {CONFIG} there; name the folder that holds it")
    return checked(path, AdapterFile, "no settings of an adapter")


def weights_file(adapter: Path) -> Path:
    """The file with an adapter's tensors: the one in its folder, or a LoRA file itself."""
    return adapter if adapter.is_file() else adapter / WEIGHTS


def settings_file(adapter: Path) -> Path | None:
    """The file with an adapter's settings; None for a LoRA file, which tells them itself."""
    if not adapter.is_file():
        return adapter / CONFIG
    beside = adapter.parent / CONFIG
    return beside if adapter.name == WEIGHTS and beside.is_file() else None


def read_metadata(adapter: Path) -> dict[str, str]:
    """What the adapter in a folder, or in a LoRA file, says of itself."""
    return read_texts(weights_file(adapter))
