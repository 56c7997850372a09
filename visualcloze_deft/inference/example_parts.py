"""Keys and values of examples that a causal context reads once for all queries."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch

from visualcloze_deft.backbones.base import Part
from visualcloze_deft.errors import UserError
from visualcloze_deft.grids.grid import Grid
from visualcloze_deft.grids.prompt import Prompt, of_task


def key_of(built: Grid, prompt: Prompt, *, guidance: float) -> str:
    """What tells the examples of a grid, with the text of their task, from others."""
    told = hashlib.sha256(f"{float(guidance)} {of_task(prompt)}".encode())
    for strip in built.strips[:-1]:
        told.update(f" {tuple(strip.shape)} ".encode())
        told.update(strip.numpy().tobytes())
    return told.hexdigest()


class ExampleParts:
    """The latest examples' keys and values. They are of one model with its adapters: who changes
    these makes a new one.

    given: of these examples alone, and others are refused.
    """

    def __init__(self, given: tuple[str, Part] | None = None) -> None:
        self.fixed = given is not None
        self.known = dict([given] if given else [])

    def on(self, place: torch.device, dtype: torch.dtype) -> bool:
        """Whether what is known is there, in this precision."""
        every = [keys for part in self.known.values() for keys, _ in part.values()]
        there = {(keys.device.type, keys.device.index, keys.dtype) for keys in every}
        index = place.index if place.index is not None else every[0].device.index
        return there == {(place.type, index, dtype)}

    def to(self, place: torch.device, dtype: torch.dtype) -> None:
        self.known = {
            key: {
                layer: (keys.to(place, dtype), values.to(place, dtype))
                for layer, (keys, values) in part.items()
            }
            for key, part in self.known.items()
        }

    def of(self, keys: Sequence[str], compute: Callable[[int], Part]) -> Part:
        """Those of several grids, whose keys these are. compute: told the place of a grid, gives
        its own, with b = 1. Raises `UserError` where they are given, and of other examples."""
        missing = {key: place for place, key in reversed([*enumerate(keys)])}
        missing = {key: place for key, place in missing.items() if key not in self.known}
        if self.fixed and missing:
            raise UserError("compiled examples: the grid has others; give its query row alone")
        self.known = {key: self.known[key] for key in keys if key in self.known}
        for key, place in missing.items():
            self.known[key] = compute(place)
        if len(self.known) == 1:
            return self.known[keys[0]]
        return together([self.known[key] for key in keys])


def together(parts: Sequence[Part]) -> Part:
    """One sample of each."""
    return {
        layer: (
            torch.cat([part[layer][0] for part in parts]),
            torch.cat([part[layer][1] for part in parts]),
        )
        for layer in parts[0]
    }
