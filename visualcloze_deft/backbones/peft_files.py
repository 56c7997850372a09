"""An adapter's files in peft's format: what they say, before any weight is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from visualcloze_deft.backbones.model_settings import AdapterFile
from visualcloze_deft.storage.tensor_headers import read_texts
from visualcloze_deft.errors import UserError
from visualcloze_deft.storage.adapter_places import CONFIG
from visualcloze_deft.storage.settings_files import checked

WEIGHTS = "adapter_model.safetensors"  # peft's name for an adapter's tensors


def adapter_settings(folder: Path) -> dict[str, Any]:
    """What the settings file of the adapter in a folder says, see `settings_files.checked`."""
    path = folder / CONFIG
    if not path.is_file():
        raise UserError(f"adapter {folder}: no {CONFIG} there; name the folder that holds it")
    return checked(path, AdapterFile, "no settings of an adapter")


def read_metadata(adapter: Path) -> dict[str, str]:
    """What the adapter in a folder says of itself."""
    return read_texts(adapter / WEIGHTS)
