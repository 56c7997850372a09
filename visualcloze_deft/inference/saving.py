"""Pipelines written to folders and pushed to the hub, as diffusers does it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from visualcloze_deft.adapters.merging import ActiveAdapters
from visualcloze_deft.backbones import tensor_files
from visualcloze_deft.backbones.quantization import is_quantised
from visualcloze_deft.errors import UserError


class SavingMethods:
    """What a pipeline with `blend`, the adapters of its transformer, writes of itself."""

    blend: ActiveAdapters
    transformer: Any
    config: Any

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """As diffusers; adapters that are merged are then part of the weights.

        Raises `UserError` where the blocks are quantised or adapters stand beside the weights.
        """
        self._check_saved("save_pretrained", options)
        super().save_pretrained(save_directory, **options)  # type: ignore[misc]
        tensor_files.open_to(Path(save_directory))

    def _check_saved(self, what: str, options: Mapping[str, Any]) -> None:
        """Raise `UserError` where the pipeline cannot be written. what: the method called."""
        if options.get("safe_serialization") is False:
            raise UserError(f"{what}: safe_serialization=False; weights are safetensors alone")
        layers = self.transformer.modules() if self.transformer is not None else ()
        if any(is_quantised(m) for m in layers if isinstance(m, torch.nn.Linear)):
            raise UserError(f"{what}: a quantised base is not saved; load it unquantised")
        if any(self.blend.scales.values()) and not self.blend.merge:
            raise UserError(f"{what}: adapters stand beside the weights; load with merge")
