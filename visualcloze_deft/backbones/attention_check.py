"""A kernel of attention against plain attention in float32."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Literal

import torch
from torch import Tensor

from visualcloze_deft.errors import UserError

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Queries, keys and values (b s h d) to (b s h d)."""
Passes = Literal["forward", "both"]
"""What is used of a kernel: inference the forward pass alone, training the backward pass, too."""
REPEATS = 3  # of each case: what a kernel finds in memory differs from call to call
BATCH = 2  # of the test: a kernel may mistake where the next sample begins
TILE = 64  # tokens whose error is judged together: a fault may lie in a kernel's last tile alone
AROUND = 128  # tokens of NaN before and behind an input: the longest tile of a kernel
WIDER = 5  # times h d: the row of a single block's output, of which attention's gradient is a part
RESULTS = ("the output", "the gradient of queries", "the gradient of keys", "that of values")
FAILURES = (RuntimeError, ValueError, TypeError, ImportError, OSError)


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """The work ahead. lengths: tokens of the grids, text and image, in ascending order. compiled:
    whether torch.compile makes the blocks."""

    lengths: tuple[int, ...]
    heads: int
    width: int
    dtype: torch.dtype
    device: torch.device
    compiled: bool = False

    def __str__(self) -> str:
        lengths = " and ".join(f"{length:,}" for length in self.lengths)
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{dtype} at {lengths} tokens, {self.heads} heads of {self.width}"


# The test

Layout = Literal["whole", "part"]
LAYOUTS: tuple[Layout, ...] = ("whole", "part")
"""Of the gradient of attention's output: contiguous, as in double blocks, or part of a wider row,
as in single blocks, which join it with the feed-forward layer's."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """Random queries, keys and values, and a gradient of the output: each (b s h d)."""

    q: Tensor
    k: Tensor
    v: Tensor
    gradient: Tensor

    def head(self, number: int) -> Case:
        """One head (b s 1 d) in float32."""
        parts = {name: part[:, :, number : number + 1] for name, part in vars(self).items()}
        return Case(**{name: part.float() for name, part in parts.items()})


def fault_of(attend: Attend, shapes: Shapes, *, passes: Passes) -> str | None:
    """What is wrong with `attend` for these shapes; None where its results are right.

    Every case is repeated with NaN in the memory around its inputs and in the memory that its
    results get, so that a kernel which reads what is not its own shows it. Raises `UserError`
    where the kernel leaves the device unusable.
    """
    try:
        for length, layout in product(shapes.lengths, LAYOUTS if passes == "both" else ("whole",)):
            fault = fault_at(attend, shapes, length, layout=layout, passes=passes)
            if fault is not None:
                return fault
    except torch.AcceleratorError as error:
        raise UserError(
            f"--attention auto: a kernel broke the GPU's context in its test ({first_line(error)});"
            " name another one, e.g. --attention math"
        ) from error
    except FAILURES as error:
        return first_line(error)
    return None


def fault_at(
    attend: Attend, shapes: Shapes, length: int, *, layout: Layout, passes: Passes
) -> str | None:
    """`fault_of` for one length and one layout of the gradient."""
    case = inputs(shapes, length, layout=layout)
    heads = [results(plain, case.head(k), passes=passes) for k in range(shapes.heads)]
    right = [torch.cat(parts, dim=2) for parts in zip(*heads, strict=True)]
    for _ in range(REPEATS):
        leave_nan(case.q)
        found = results(attend, case, passes=passes)
        for name, one, expected in zip(RESULTS, found, right, strict=False):
            error = relative_error(one, expected)
            if not math.isfinite(error):
                return f"{name} is not finite at {length:,} tokens"
            if error > bound(shapes.dtype):
                return f"{name} is off by {error:.1%} at {length:,} tokens"
    return None


def bound(dtype: torch.dtype) -> float:
    """The largest relative error that counts as rounding.

    Kernels accumulate in float32 and round inputs of their products and their results to `dtype`:
    on CPUs that comes to 0.4 eps (0.3 % in bfloat16), at every length. 3 eps leave room for other
    orders of summation and are far below what a fault does. In float32 products may be TF32's,
    whose eps is 2^-10.

    >>> round(bound(torch.bfloat16), 4)
    0.0234
    """
    return 3 * max(torch.finfo(dtype).eps, 2**-10)


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v as three operations."""
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))  # b h s d
    weights = torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), dim=-1)
    return (weights @ v).transpose(1, 2)


def results(attend: Attend, case: Case, *, passes: Passes) -> list[Tensor]:
    """The output and, of both passes, the gradients of queries, keys and values."""
    read = [part.detach().requires_grad_(passes == "both") for part in (case.q, case.k, case.v)]
    output = attend(*read)
    if passes == "forward":
        return [output]
    return [output.detach(), *torch.autograd.grad(output, read, case.gradient)]


def inputs(shapes: Shapes, length: int, *, layout: Layout) -> Case:
    """Standard normal numbers, as FLUX's normed queries and keys are, with NaN around them."""
    draw = torch.Generator(shapes.device).manual_seed(length)
    size = (BATCH, length, shapes.heads, shapes.width)

    def normal() -> Tensor:
        drawn = torch.randn(size, generator=draw, device=shapes.device)
        return drawn.to(shapes.dtype)

    q, k, v = (surrounded(normal()) for _ in range(3))
    gradient = surrounded(normal())
    if layout == "part":
        row = shapes.heads * shapes.width
        wide = q.new_full((BATCH, length, WIDER * row), torch.nan)
        wide[..., :row] = gradient.flatten(2)
        gradient = surrounded(wide)[..., :row].unflatten(-1, size[2:])
    return Case(q=q, k=k, v=v, gradient=gradient)


def surrounded(values: Tensor) -> Tensor:
    """`values` (b s ...) with NaN in memory before the first and behind the last one."""
    gap = AROUND * values[0, 0].numel()
    memory = values.new_full((values.numel() + 2 * gap,), torch.nan)
    return memory[gap:-gap].view(values.shape).copy_(values)


def leave_nan(like: Tensor) -> None:
    """Leave NaN in freed memory of the sizes that a kernel asks for: results and sums like `like`
    (b s h d), one number of a token and head. An allocator that caches gives it out next."""
    b, s, h, _ = like.shape
    sums = [like.new_full(like.shape, torch.nan, dtype=torch.float32) for _ in range(3)]
    whole = [torch.full_like(like, torch.nan) for _ in range(6)]
    rows = [like.new_full((b, h, s), torch.nan, dtype=torch.float32) for _ in range(4)]
    del sums, whole, rows


def relative_error(found: Tensor, expected: Tensor) -> float:
    """The largest relative error (Frobenius norm) of `TILE` tokens of (b s h d)."""
    off = found.float() - expected
    errors = [
        part.norm() / whole.norm()
        for part, whole in zip(off.split(TILE, dim=1), expected.split(TILE, dim=1), strict=True)
    ]
    return torch.stack(errors).max().item()


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
