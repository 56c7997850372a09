"""Attention kernels: their names, the test of their results, the choice, and the switch.

A fused kernel can be wrong for some lengths, some strides or one of both passes, and returns its
numbers as if nothing had happened. So the kernel of a GPU is chosen by comparing its results with
plain attention in float32, for the shapes of the work ahead.

Axes: b batch, s tokens, h heads, d head width.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    attention_backend,
    dispatch_attention_fn,
)
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from visualcloze_deft.backbones.attention_check import (
    AROUND,
    FAILURES,
    Attend,
    Passes,
    Shapes,
    fault_of,
    first_line,
    inputs,
    results,
)
from visualcloze_deft.errors import UserError, suggestion

Shared = Callable[[str | None], str | None]
"""The first fault that any process found, the same in all; None where none found one."""

AUTO, NATIVE = "auto", "native"
OURS = {
    "native": AttentionBackendName.NATIVE,
    "cudnn": AttentionBackendName._NATIVE_CUDNN,
    "flash": AttentionBackendName._NATIVE_FLASH,
    "efficient": AttentionBackendName._NATIVE_EFFICIENT,
    "math": AttentionBackendName._NATIVE_MATH,
    "flash_attn": AttentionBackendName.FLASH,
}
BACKENDS: dict[str, AttentionBackendName] = {
    **{name.value: name for name in AttentionBackendName},
    **OURS,
}
"""Name -> diffusers' backend. native is torch's own choice; cudnn, flash, efficient and math are
torch's kernels, each by itself. All others are named as in diffusers, but for the package
flash-attn, whose name there is "flash": it is flash_attn here."""

CANDIDATES = ("cudnn", "flash", "efficient", "math")
"""What "auto" tries, fastest first (measured on an H100)."""

MAY_BE_CUDNN = frozenset({"cudnn", NATIVE})  # on GPUs torch's own choice may be cuDNN, too

UNTESTED = frozenset({"cpu"})  # kinds of device where "auto" is torch's own choice, without a test


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The backend to use, and the line that says why; "" where nothing was tested."""

    backend: str
    line: str = ""


def alone(fault: str | None) -> str | None:
    """What one process by itself finds."""
    return fault


def decide(
    wanted: str, shapes: Shapes, *, passes: Passes, before: str = "", shared: Shared = alone
) -> Choice:
    """The backend for `wanted`: itself, or where that is "auto" the fastest one that is right.

    before: the backend that the run used until now, which "auto" tries first; "" for a new run.
    Not "native", which a run has that began on a CPU: on a GPU that may be any kernel.
    shared: agrees with other processes, which then all choose the same backend.
    Raises `UserError` where this machine lacks `wanted`, or no candidate is right.
    """
    if wanted != AUTO:
        require(wanted, shapes, passes=passes, shared=shared)
        return Choice(backend=wanted)
    if shapes.device.type in UNTESTED:
        usable = bool(before) and shared(lack(before, shapes, passes=passes)) is None
        return Choice(backend=before if usable else NATIVE)
    first = [before] if before not in ("", NATIVE) else []
    others = [name for name in candidates(shapes, passes=passes) if name not in first]
    return choose([*first, *others], shapes, passes=passes, shared=shared)


def candidates(shapes: Shapes, *, passes: Passes) -> tuple[str, ...]:
    """What "auto" tries for this work, fastest first.

    The layout of a gradient in a compiled block is the compiler's, so cuDNN's backward pass cannot
    be relied on there, see `dense_gradients`.
    """
    unsure = MAY_BE_CUDNN if shapes.compiled and passes == "both" else ()
    return tuple(name for name in CANDIDATES if name not in unsure)


def choose(
    names: Sequence[str], shapes: Shapes, *, passes: Passes, shared: Shared = alone
) -> Choice:
    """The first of `names` whose results agree with plain attention in float32.

    Raises `UserError` where none does.
    """
    refused: dict[str, str] = {}
    for name in names:
        fault = shared(fault_of(attend_as_used(name), shapes, passes=passes))
        if fault is None:
            said = "".join(f"; refused: {other}: {why}" for other, why in refused.items())
            return Choice(backend=name, line=f"attention: {name} (checked in {shapes}{said})")
        refused[name] = fault
    why = "; ".join(f"{name}: {fault}" for name, fault in refused.items())
    raise UserError(
        f"--attention auto: no kernel agrees with plain attention in {shapes} ({why}); name one, "
        "e.g. --attention native"
    )


def check_known(name: str) -> None:
    """Raise `UserError` unless `name` is "auto" or one of `BACKENDS`."""
    known = [AUTO, *BACKENDS]
    if name not in known:
        raise UserError(f"--attention {name}: {suggestion(name, known)}")


def require(name: str, shapes: Shapes, *, passes: Passes, shared: Shared = alone) -> None:
    """Raise `UserError` unless `name` is known and computes on this device in this precision."""
    check_known(name)
    why = shared(lack(name, shapes, passes=passes))
    if why is not None:
        dtype = str(shapes.dtype).removeprefix("torch.")
        here = ", ".join(one for one in OURS if lack(one, shapes, passes=passes) is None)
        raise UserError(
            f"--attention {name}: does not work here, on {shapes.device.type} in {dtype} ({why}); "
            f"give auto, or one of {here}"
        )


def lack(name: str, shapes: Shapes, *, passes: Passes) -> str | None:
    """Why the backend `name` computes nothing here; None where it does. Its numbers are not looked
    at."""
    case = inputs(replace(shapes, lengths=(AROUND,)), AROUND, layout="whole")
    try:
        results(attend_with(name), case, passes=passes)
    except FAILURES as error:
        return first_line(error)
    return None


def attend_with(name: str) -> Attend:
    """A backend as a function; it raises where a package of the backend is missing."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with attention_backend(BACKENDS[name]):
            attended: Tensor = dispatch_attention_fn(q, k, v)
        return attended

    return attend


def attend_as_used(name: str) -> Attend:
    """`attend_with(name)` as `use` has a transformer attend: cuDNN gets dense gradients."""
    attend = attend_with(name)
    return (lambda q, k, v: _densely_of(attend(q, k, v))) if name in MAY_BE_CUDNN else attend


# The switch


def use(denoiser: Any, name: str) -> None:
    """Have `denoiser` attend with the backend `name`, see `switch`. On a GPU cuDNN's gets gradients
    that it can read."""
    switch(denoiser, name)
    if name in MAY_BE_CUDNN and denoiser.device.type == "cuda":
        dense_gradients(denoiser)


def switch(denoiser: Any, name: str) -> None:
    """Have `denoiser` attend with the backend `name`, and nothing else in this process.

    diffusers' switch also makes it the default of every model that has not been given a backend;
    that is taken back. "native" undoes any other.
    """
    with without_notice(), attention_backend(AttentionBackendName.NATIVE):
        denoiser.set_attention_backend(BACKENDS[name].value)


def dense_gradients(denoiser: nn.Module) -> None:
    """Make the gradient of attention's output contiguous in all layers of `denoiser` that give one.

    In FLUX's single blocks it is part of a wider row, see `LAYOUTS`. torch up to 2.11 at least
    compiles cuDNN's backward pass for the strides of the first gradient that it meets, and reads
    all others with these (`run_cudnn_SDP_bprop` in MHA.cpp: its cache is keyed without them). On an
    H100 the second layout then lost four fifths of its rows. The numbers stay the same; a single
    block pays a copy.
    """
    for module in denoiser.modules():
        if isinstance(module, AttentionModuleMixin) and (
            _densely not in module._forward_hooks.values()
        ):
            module.register_forward_hook(_densely)


def _densely(_: nn.Module, __: Any, output: Any) -> Any:
    """A hook; several outputs, as of FLUX's double blocks, are cut apart and dense already."""
    return _densely_of(output) if isinstance(output, Tensor) else output


def _densely_of(output: Tensor) -> Tensor:
    dense: Tensor = _Dense.apply(output)
    return dense


class _Dense(torch.autograd.Function):
    """The identity, whose gradient is contiguous."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.contiguous()


@contextmanager
def without_notice() -> Iterator[None]:
    """Without diffusers' notice that its switch is experimental."""
    logger = logging.getLogger("diffusers.models.modeling_utils")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
