"""What makes images of a grid: a model with its adapters, told from others under the same names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visualcloze_deft.adapters.merging import hashes_of_files
from visualcloze_deft.backbones.lora_places import lora_file
from visualcloze_deft.backbones.table import fingerprint
from visualcloze_deft.storage.hashing import digest_of

NAMED = {
    "model_fingerprint": "model",
    "model_lora_sha256": "model_lora",
    "adapters_sha256": "adapters",
    "adapters_config_sha256": "adapters",
}  # keys of `weights_of` that say whose hash it is


@dataclass(frozen=True, kw_only=True)
class Used:
    """An adapter in use. weights, config: SHA-256 of its files as they were read."""

    folder: Path
    scale: float
    weights: str
    config: str | None


def in_files(adapters: Mapping[Path, float]) -> list[Used]:
    """Adapters as their files are now."""
    return [
        Used(folder=folder, scale=scale, **hashes_of_files(folder)._asdict())
        for folder, scale in adapters.items()
    ]


def weights_of(model: str, lora: str | None, adapters: Sequence[Used]) -> dict[str, Any]:
    """Names and hashes of a base with a LoRA merged, and of adapters."""
    return {
        "model": model,
        "model_lora": lora,
        "adapters": [{"path": str(a.folder.absolute()), "scale": a.scale} for a in adapters],
        "model_fingerprint": fingerprint(model) or model,
        "model_lora_sha256": lora and digest_of(lora_file(lora)),
        "adapters_sha256": [[a.weights, a.scale] for a in adapters],
        "adapters_config_sha256": [a.config for a in adapters],
    }


def as_named(value: object) -> str:
    """What a record names, adapters with their scales.

    >>> as_named([{"path": "a", "scale": 1.0}, {"path": "b", "scale": 0.5}]), as_named(None)
    ('a=1.0, b=0.5', 'none')
    """
    entries = value if isinstance(value, list) else [value] if value is not None else []
    parts = [entry.values() if isinstance(entry, dict) else [entry] for entry in entries]
    return ", ".join("=".join(map(str, part)) for part in parts) or "none"
