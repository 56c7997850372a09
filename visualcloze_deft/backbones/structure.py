"""The layers of a network and their sides, from its class alone: built without values."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from visualcloze_deft.backbones.base import Sides


@dataclass(frozen=True, kw_only=True)
class Structure:
    """linear: inputs and outputs of all linear layers, by name. blocks: names, in the order of the
    network. parameters: how many it has."""

    linear: Mapping[str, Sides]
    blocks: tuple[str, ...]
    parameters: int


def structure_of(network: nn.Module, blocks: str) -> Structure:
    """blocks: a regular expression for the names of a network's blocks."""
    modules = dict(network.named_modules())
    return Structure(
        linear={
            name: (layer.in_features, layer.out_features)
            for name, layer in modules.items()
            if isinstance(layer, nn.Linear)
        },
        blocks=tuple(name for name in modules if re.fullmatch(blocks, name)),
        parameters=parameters_of(network),
    )


def parameters_of(network: nn.Module) -> int:
    """A tensor that several layers share counts once."""
    return sum(parameter.numel() for parameter in network.parameters())


def without_values(make: Callable[[], nn.Module]) -> nn.Module:
    """A network on torch's meta device: FLUX's 12 billion weights take no memory there."""
    with torch.device("meta"):
        return make()
