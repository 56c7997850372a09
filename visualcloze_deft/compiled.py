"""Compiled blocks (torch.compile): grids of many shapes, torch's limit, and the time it takes."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import FluxTransformer2DModel
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import calculate_time_spent
from torch._inductor.exc import InductorError
from tqdm import tqdm

from visualcloze_deft.errors import UserError

VARIANTS = 64
"""Compiled variants of one kind of block: torch's 8 are used up by one and several grids, known and
varying lengths, with and without gradients. Beyond its limit torch runs a new shape uncompiled."""
VARYING = (2, 12)  # the first torch whose compiler takes blocks of varying length on a GPU


def compile_blocks(transformer: FluxTransformer2DModel) -> None:
    """Compile every block, in place: blocks of one kind share what was compiled.

    The first change of a length compiles a variant for all lengths, where `lengths` allows that.
    """
    torch._dynamo.config.recompile_limit = VARIANTS
    torch._dynamo.config.accumulated_recompile_limit = 4 * VARIANTS
    logger = logging.getLogger("torch._dynamo.convert_frame")
    if limit_in_one_line not in logger.filters:
        logger.addFilter(limit_in_one_line)
    dynamic = lengths(gpu=torch.cuda.is_available(), version=torch.__version__)
    for block in [*transformer.transformer_blocks, *transformer.single_transformer_blocks]:
        block.compile(dynamic=dynamic)


def lengths(*, gpu: bool, version: str) -> bool | None:
    """torch.compile's `dynamic`: None, a variant for all lengths once one changes; False, a variant
    for each. With the former, Inductor 2.11 fails on a GPU: AssertionError in get_pw_red_splits.

    On two cores, blocks of a few thousand parameters over ten lengths: 4 variants and 124 s of
    compiling with None; with False one for each length, of 12 to 40 s.

    >>> lengths(gpu=True, version="2.11.0+cu130"), lengths(gpu=True, version="2.13.0")
    (False, None)
    """
    major, minor = version.split(".")[:2]
    return False if gpu and (int(major), int(minor)) < VARYING else None


def limit_in_one_line(record: logging.LogRecord) -> bool:
    """A logging filter: torch's five lines on a limit that was reached become one."""
    if not record.getMessage().startswith("torch._dynamo hit config."):
        return True
    tqdm.write(
        f"compile: more than {VARIANTS} variants of a block; grids of other shapes run uncompiled, "
        "slower. Fewer shapes: data.cells=square"
    )
    return False


@contextmanager
def explained() -> Iterator[None]:
    """A failure of the compiler becomes one line, with its reason and the way out."""
    try:
        yield
    except (BackendCompilerFailed, InductorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"compile: torch {torch.__version__} cannot compile these blocks ({reason}); leave "
            "compile out"
        ) from None


class Compiling:
    """The time that torch has compiled in this process since this was made."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.before = seconds_compiled()

    @property
    def seconds(self) -> float:
        return seconds_compiled() - self.before

    @property
    def share(self) -> float:
        """0..1, of all time."""
        return min(self.seconds / max(time.monotonic() - self.began, 1e-9), 1.0)

    def __str__(self) -> str:
        return f"compiling took {self.seconds:.0f} s, {self.share:.0%} of the time"


def seconds_compiled() -> float:
    """By torch in this process so far: forward and backward passes, also from its cache on disk."""
    return float(calculate_time_spent().get("total_wall_time", 0.0))
