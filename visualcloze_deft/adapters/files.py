"""Adapters on disk, in peft's format: saved, loaded and checked against the model."""

from __future__ import annotations

import json
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import DeftConfig, LoraConfig, PeftConfig, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from visualcloze_deft.adapters.deft import deft_linear
from visualcloze_deft.adapters.injection import (
    add,
    check_bare,
    detach,
    keep_single_precision,
    state,
)
from visualcloze_deft.adapters.methods import NAME, file_name
from visualcloze_deft.backbones import tensor_files
from visualcloze_deft.backbones.peft_files import WEIGHTS, adapter_settings
from visualcloze_deft.config.patterns import matches
from visualcloze_deft.errors import UserError, reading
from visualcloze_deft.storage.adapter_places import CONFIG, adapter_folder
from visualcloze_deft.storage.hub import loading


def save(
    transformer: Any,
    folder: Path,
    *,
    base: str,
    tensors: dict[str, Tensor] | None = None,
    metadata: dict[str, str] | None = None,
) -> None:
    """Write peft's two files to `folder`, which must exist. `tensors`: `state` gathered before."""
    config = transformer.peft_config[NAME].to_dict()
    config |= {"base_model_name_or_path": base, "inference_mode": True}
    for key, value in config.items():
        if isinstance(value, set):
            config[key] = sorted(value)
    (folder / CONFIG).write_text(json.dumps(config, indent=2, default=str), encoding="utf-8")
    tensor_files.save(tensors or state(transformer), folder / WEIGHTS, metadata)


@dataclass(frozen=True, kw_only=True, eq=False)
class StoredAdapter:
    """An adapter as it was read from a folder, once for all who want it. tensors: by the names in
    peft's file."""

    folder: Path
    config: PeftConfig
    tensors: dict[str, Tensor]


def read(folder: Path) -> StoredAdapter:
    """The adapter in a folder, or of a run folder. Raises `UserError` where files are missing or
    truncated, or hold what is not finite."""
    folder = adapter_folder(folder)
    return StoredAdapter(folder=folder, config=read_config(folder), tensors=read_weights(folder))


def load(
    transformer: Any,
    adapter: Path | StoredAdapter,
    *,
    trainable: bool = False,
    dropout: float | None = None,
) -> None:
    """Add an adapter, or the one saved in a folder (peft's format), to `transformer`.

    dropout: instead of the one in its settings.

    Raises `UserError` where files are missing or truncated, or made for another model or rank.
    """
    check_bare(transformer)
    stored = read(adapter) if isinstance(adapter, Path) else adapter
    folder, tensors, config = stored.folder, stored.tensors, copy(stored.config)
    config.inference_mode = not trainable
    if dropout is not None:
        setattr(
            config, "deft_dropout" if isinstance(config, DeftConfig) else "lora_dropout", dropout
        )
    check_patterns(transformer, folder, config)
    check_ranks(folder, config, tensors)
    transformer.requires_grad_(False)
    try:
        with loading(f"adapter {folder}", "its settings do not fit this model"):
            add(transformer, config)
        check_fit(transformer, folder, config, tensors)
    except UserError:
        detach(transformer)
        raise
    keep_single_precision(transformer)
    if not trainable:
        transformer.requires_grad_(False)  # diffusers makes what it adds trainable
    deft_linear.adopt(transformer)
    deft_linear.share_factors(transformer)
    set_peft_model_state_dict(
        transformer, {k.removeprefix("base_model.model."): v for k, v in tensors.items()}, NAME
    )


def check_patterns(transformer: nn.Module, folder: Path, config: PeftConfig) -> None:
    """Raise `UserError` for a regular expression in an adapter's settings that is none, or takes
    too long: peft matches each with every layer's name."""
    found: list[str] = []
    for name in ("target_modules", "exclude_modules", "layers_pattern"):
        told = getattr(config, name)
        found += [told] if isinstance(told, str) else []
    for name in ("rank_pattern", "alpha_pattern") if isinstance(config, LoraConfig) else ():
        found += [rf"(.*\.)?({key})" for key in getattr(config, name) or ()]
    names = [name for name, _ in transformer.named_modules()]
    matches(f"{folder / CONFIG}", found, names)


def check_ranks(folder: Path, config: PeftConfig, tensors: dict[str, Tensor]) -> None:
    """Raise `UserError` where settings name a rank that no tensor has: layers of it would be made
    first, however large."""
    ranks = {config.r}
    if isinstance(config, LoraConfig):
        ranks |= {*(config.rank_pattern or {}).values()}
    sides = [side for tensor in tensors.values() for side in tensor.shape]
    if max(ranks) > max(sides, default=0):
        raise UserError(
            f"{folder / CONFIG}: rank {max(ranks)}, and no tensor of {WEIGHTS} is that large"
        )


def check_fit(
    transformer: nn.Module, folder: Path, config: PeftConfig, tensors: dict[str, Tensor]
) -> None:
    """Raise `UserError` unless a file's tensors are those of the layers that were added."""
    expected = {
        file_name(name): parameter.shape
        for name, parameter in transformer.named_parameters()
        if f".{NAME}" in name
    }
    if set(expected) != set(tensors):
        odd = sorted(set(expected) ^ set(tensors))
        raise UserError(
            f"adapter {folder}: made for another model; {len(odd)} of its layers and the model's "
            f"do not pair, e.g. {odd[0]}"
        )
    for name, tensor in tensors.items():
        if tensor.shape != expected[name]:
            raise UserError(
                f"adapter {folder}: {name} has shape {tuple(tensor.shape)}, this model and rank "
                f"{config.r} need {tuple(expected[name])}"
            )


def read_config(folder: Path) -> PeftConfig:
    fields, path = adapter_settings(folder), folder / CONFIG
    kind = fields.get("peft_type")
    if kind not in ("DEFT", "LORA"):
        raise UserError(f"{path}: peft_type {kind!r}; DEFT (with PaRa) and LORA are known")
    with reading(path, "no settings of an adapter"):
        return PeftConfig.from_peft_type(**fields)


def read_weights(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    if not path.is_file():
        raise UserError(f"adapter {folder}: no {WEIGHTS} there")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: damaged or truncated ({error}); save or copy it again") from None
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise UserError(f"{path}: {name} holds values that are not finite; use another step's")
    return tensors
