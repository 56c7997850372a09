"""What a LoRA file says of scales and methods, in its header or in peft's settings beside it."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from visualcloze_deft.backbones.model_settings import AdapterFile
from visualcloze_deft.backbones.peft_files import adapter_settings
from visualcloze_deft.config.patterns import matches
from visualcloze_deft.errors import UserError
from visualcloze_deft.storage.adapter_places import CONFIG
from visualcloze_deft.storage.settings_files import check_fields
from visualcloze_deft.storage.text_files import brief

_MOVED = ("pissa", "olora", "corda", "loftq", "lora_ga")  # starts that change the base


def beside(path: Path) -> dict[str, Any]:
    """The settings of an adapter that peft wrote, which lie beside its weights."""
    where, found = path.parent / CONFIG, adapter_settings(path.parent)
    if found.get("peft_type") != "LORA":
        raise UserError(
            f"{where}: an adapter of type {found.get('peft_type')!r}, not a LoRA; give its folder "
            "with --adapter"
        )
    start = found.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_MOVED):
        raise UserError(
            f"{where}: init_lora_weights {start!r} changed the base before training; have peft "
            "convert the adapter to a plain LoRA"
        )
    return found


def check_settings(about: object, where: str) -> None:
    """Raise `UserError` unless a LoRA's settings can be what they should be. where: in words."""
    if not isinstance(about, dict):
        raise UserError(f"{where} must be an object, not {brief(about)}")
    for prefix in {key.rpartition(".")[0] for key in about}:
        own = {k.rpartition(".")[2]: v for k, v in about.items() if k.rpartition(".")[0] == prefix}
        check_fields(where, AdapterFile, own)


def check_patterns(about: Mapping[str, Any], names: Collection[str], origin: object) -> None:
    """Raise `UserError` for a regular expression in a LoRA's settings that is none, or takes too
    long for these names of layers."""
    patterns = [
        rf"(.*\.)?({key})"  # as peft matches them
        for name, told in about.items()
        if name.rpartition(".")[2] in ("alpha_pattern", "rank_pattern")
        for key in told or ()
    ]
    matches(f"LoRA {origin}: its settings", patterns, names)


def header_scale(about: Mapping[str, Any], name: str, rank: int, origin: object) -> float | None:
    """The scale of a layer that settings state beside the tensors; None where they do not."""
    settings = {
        key.removeprefix("transformer."): value
        for key, value in about.items()
        if not key.startswith("text_encoder")
    }
    if settings.get("use_dora"):
        raise UserError(f"LoRA {origin}: DoRA cannot be read; give a plain LoRA")

    def of_layer(pattern: str, common: str) -> Any:
        for key, value in (settings.get(pattern) or {}).items():
            if re.fullmatch(rf"(.*\.)?({key})", name):  # as peft matches them
                return value
        return settings.get(common)

    alpha = of_layer("alpha_pattern", "lora_alpha")
    if alpha is None:
        return None
    rank = of_layer("rank_pattern", "r") or rank
    return float(alpha) / (rank**0.5 if settings.get("use_rslora") else rank)
