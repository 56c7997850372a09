"""Attention backends for tests, some of which fail on a CPU as kernels do on GPUs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry as Registry
from torch import Tensor, nn

from visualcloze_deft.backbones import attention
from visualcloze_deft.backbones.attention import BACKENDS
from visualcloze_deft.backbones.attention_check import plain

Backend = Callable[..., Tensor]
NATIVE = Registry._backends[BACKENDS["native"]]


class SpoiledGradient(torch.autograd.Function):
    """Its gradient is NaN."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return values.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return torch.full_like(gradient, torch.nan)


def right(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return plain(query, key, value)


def nan_backward(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return plain(query, SpoiledGradient.apply(key), value)


def nan_in_models(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Right in a test of attention alone, whose queries nothing has made."""
    return (plain if query.is_leaf else nan_backward)(query, key, value)


def nan_forward(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return plain(query, key, value) * torch.nan


def wrong(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The gradient of keys is 10 % too large, and nothing else."""
    return plain(query, key * 1.1 - key.detach() * 0.1, value)


def raises(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    raise RuntimeError("no kernel image for this device\nand more")


def reads_behind(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Multiplies by 0 what lies behind the values: right wherever that is a finite number."""
    behind = value.detach().as_strided((1,), (1,), value.storage_offset() + value.numel())
    return plain(query, key, value + 0 * behind)


def spoiled_norm(norm: nn.RMSNorm, x: Tensor) -> Tensor:
    """torch's, with NaN for the gradient of what it reads."""
    x = SpoiledGradient.apply(x)
    return nn.functional.rms_norm(x, norm.normalized_shape, norm.weight, norm.eps)


def once(function: Backend) -> Backend:
    """`function` in the first call of each process with a gradient, and torch's own otherwise:
    samples come before the first step."""
    calls: list[None] = []

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if not query.requires_grad or calls:
            return NATIVE(query=query, key=key, value=value)
        calls.append(None)
        return function(query=query, key=key, value=value)

    return attend


def stand_in(name: str, function: Backend) -> None:
    """Let the backend `name` be `function`."""
    Registry._backends[BACKENDS[name]] = function
    if function is not NATIVE:
        Registry._supported_arg_names[BACKENDS[name]] = {"query", "key", "value"}


@contextmanager
def standing_in(**functions: Backend) -> Iterator[None]:
    """Inside, these backends are other functions."""
    before = dict(Registry._backends), dict(Registry._supported_arg_names)
    try:
        for name, function in functions.items():
            stand_in(name, function)
        yield
    finally:
        Registry._backends, Registry._supported_arg_names = before


BACKENDS_BY_NAME: dict[str, Backend] = {
    one.__name__: one
    for one in (right, nan_backward, nan_in_models, nan_forward, wrong, raises, reads_behind)
}


def vcdeft_with(stands: str, *words: str) -> None:
    """`vcdeft WORDS` in a process whose backends are others.

    stands: "native=wrong,flash=raises", with "@1" behind a function: in process 1 alone, with
    "@step3": from step 3 on, and torch's own before, or with "@once". "test" has "auto" choose on a
    CPU as on a GPU, "norms" spoils the gradients of torch's RMSNorm.
    """
    from visualcloze_deft.cli import main

    for part in stands.split(","):
        if part == "test":
            attention.UNTESTED = frozenset()  # type: ignore[misc]
            continue
        if part == "norms":
            nn.RMSNorm.forward = spoiled_norm  # type: ignore[method-assign]
            continue
        name, _, function = part.partition("=")
        function, _, when = function.partition("@")
        chosen = BACKENDS_BY_NAME[function]
        if when.startswith("step"):
            output = Path(words[words.index("--output") + 1])
            chosen = from_step(int(when.removeprefix("step")), chosen, output)
        elif when == "once":
            chosen = once(chosen)
        if not when.isdecimal() or when == os.environ["RANK"]:
            stand_in(name, chosen)
    main(list(words))


def from_step(step: int, function: Backend, output: Path) -> Backend:
    """torch's own choice, and `function` once the run in `output` has come to `step`."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        lines = output / "metrics.jsonl"
        taken = len(lines.read_text().splitlines()) if lines.exists() else 0
        return (function if taken >= step - 1 else NATIVE)(query=query, key=key, value=value)

    return attend
