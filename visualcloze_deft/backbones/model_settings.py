"""The settings files of models and adapters, checked: a value must be of its kind, and of a size
that networks have, before a library builds one from it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from visualcloze_deft.storage.settings_files import (
    Above,
    Blocks,
    Names,
    Number,
    Rank,
    SettingsFile,
    Share,
)


class IndexFile(SettingsFile):
    """`model_index.json`."""

    resolution: Annotated[int, Field(ge=32, le=2048, multiple_of=16)] | None = None


class ShardsFile(SettingsFile):
    """An index of weight files: tensor -> file."""

    weight_map: dict[str, str]


class AdapterFile(SettingsFile):
    """peft's `LoraConfig` and `DeftConfig`."""

    peft_type: str | None = None
    r: Rank = 8
    alpha: Above | None = None
    lora_alpha: Above | None = None
    deft_dropout: Share = 0.0
    lora_dropout: Share = 0.0
    init_scale: Number = 1.0
    target_modules: Names = None
    exclude_modules: Names = None
    modules_to_save: list[str] | None = None
    layers_pattern: Names = None
    layers_to_transform: list[Blocks] | Blocks | None = None
    rank_pattern: dict[str, Rank] | None = None
    alpha_pattern: dict[str, Above] | None = None
    decomposition_method: Literal["relu", "qr"] = "qr"
    para: bool = False
    use_dora: bool = False
    use_rslora: bool = False
    fan_in_fan_out: bool = False
    lora_bias: bool = False
    init_weights: bool = True
    init_lora_weights: bool | str = True
    bias: str = "none"
    base_model_name_or_path: str | None = None
