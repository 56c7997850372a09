"""A quantised network, read layer by layer: its weights are never there as a whole.

Each tensor is copied out of its file, which is unmapped before the next is read, so that a process
holds the quantised layers, one layer as it was, and no pages of the files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from visualcloze_deft.backbones import lora_names
from visualcloze_deft.backbones.lora_names import Change
from visualcloze_deft.backbones.model_files import weight_files
from visualcloze_deft.backbones.quantization import layers_of, quantised
from visualcloze_deft.backbones.table import backbone_of_network
from visualcloze_deft.config.run_settings import Bits
from visualcloze_deft.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Files:
    """The weight files of a network. paths: where each tensor is, by name."""

    paths: Mapping[str, Path]

    def tensor(self, name: str, dtype: torch.dtype) -> Tensor:
        """A copy of a tensor in `dtype`. Raises `UserError` where its file is damaged."""
        path = self.paths[name]
        try:
            with safe_open(path, "pt") as file:
                return file.get_tensor(name).to(dtype, copy=True)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: damaged or truncated ({error})") from None


def files_in(folder: Path, variant: str | None = None) -> Files:
    """The weight files of a network in a folder. variant: see diffusers."""
    paths: dict[str, Path] = {}
    for path in weight_files(folder, variant):
        try:
            with safe_open(path, "pt") as file:
                paths |= dict.fromkeys(file.keys(), path)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: damaged or truncated ({error})") from None
    return Files(paths=paths)


def load_quantised(
    kind: type[ModelMixin],
    folder: Path,
    bits: Bits,
    *,
    dtype: torch.dtype,
    device: str,
    changes: Mapping[str, Change],
    variant: str | None = None,
) -> Any:
    """The network in a folder, on `device`, its blocks' linear layers in `bits`.

    kind: its class. changes: low-rank ones, by layer, that are merged into the weights before.
    Every tensor that its settings ask for must be in the files.
    """
    files = files_in(folder, variant)
    with torch.device("meta"):
        network = kind.from_config(kind.load_config(folder))
    network.register_to_config(_name_or_path=str(folder.parent))  # as diffusers' loader does
    for name in [name for name, _ in network.named_modules()]:  # no list of the layers
        read(network, name, files, dtype)
        if name in changes:
            lora_names.merge(network, {name: changes[name]})
        keep(network, name, bits, device)
    return network.eval()


def read(network: nn.Module, name: str, files: Files, dtype: torch.dtype) -> None:
    """Give a module of `network` its own parameters, not those of modules in it."""
    module = network.get_submodule(name)
    for key in dict(module.named_parameters(recurse=False)):
        tensor = files.tensor(f"{name}.{key}" if name else key, dtype)
        setattr(module, key, nn.Parameter(tensor))


def keep(network: nn.Module, name: str, bits: Bits, device: str) -> None:
    """Move a module that was read to `device`, in `bits` where it is a linear layer of a block."""
    module = network.get_submodule(name)
    in_block = layers_of(backbone_of_network(network).blocks)
    if isinstance(module, nn.Linear) and in_block(name):
        network.set_submodule(name, quantised(module, bits).to(device))
    elif not any(module.children()):
        module.to(device)
