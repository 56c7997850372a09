"""What tells weights from others under the same names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from visualcloze_deft.backbones.lora_places import lora_file
from visualcloze_deft.backbones.peft_files import settings_file, weights_file
from visualcloze_deft.backbones.table import fingerprint
from visualcloze_deft.storage.hashing import digest_of


def hashes_of(model: str, lora: str | None, adapters: Mapping[Path, float]) -> dict[str, Any]:
    """Of a base with a LoRA merged, and adapters with their scales."""
    return {
        "model_fingerprint": fingerprint(model) or model,
        "model_lora_sha256": lora and digest_of(lora_file(lora)),
        "adapters_sha256": [
            [digest_of(weights_file(path)), scale] for path, scale in adapters.items()
        ],
        "adapters_config_sha256": [
            file and digest_of(file) for file in map(settings_file, adapters)
        ],
    }
