"""Compiled blocks (torch.compile): grids of many shapes, torch's limit, and the time it takes."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch._inductor.config
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import calculate_time_spent
from torch._inductor.exc import InductorError
from tqdm import tqdm

from visualcloze_deft.backbones.table import blocks_of
from visualcloze_deft.errors import UserError

VARIANTS = 64
"""Compiled variants of one kind of block: torch's 8 are used up by the first block and later ones,
one and several grids, known and varying lengths, with and without gradients. Beyond its limit torch
runs a new shape uncompiled."""
LIMIT = re.compile(
    r"torch\._dynamo hit config\..*\n"
    r" *function: '(?P<function>\S+)' .*\n"
    r" *last reason: (?P<reason>.*)"
)
SYMBOLIC = (2, 12)  # the first torch whose tiling analysis compares lengths that it does not know


def compile_blocks(denoiser: nn.Module) -> None:
    """Compile every block, in place: blocks of one kind share what was compiled.

    The first change of a length or of a number of grids compiles a variant for all of them: ten
    lengths take as many variants as two do.
    """
    torch._dynamo.config.recompile_limit = VARIANTS
    torch._dynamo.config.accumulated_recompile_limit = 4 * VARIANTS
    if not analyses_tiling(torch.__version__):
        torch._inductor.config.triton.coalesce_tiling_analysis = False
    logger = logging.getLogger("torch._dynamo.convert_frame")
    if limit_in_one_line not in logger.filters:
        logger.addFilter(limit_in_one_line)
    for block in blocks_of(denoiser):
        block.compile()


def analyses_tiling(version: str) -> bool:
    """Whether torch's compiler for GPUs can choose tiles by reads and writes of varying length.

    Before 2.12 `get_pw_red_splits` fails on it with an AssertionError: it takes equal products of
    symbols for different ones. Tiles are then chosen by its older rule.

    >>> analyses_tiling("2.11.0+cu130"), analyses_tiling("2.13.0")
    (False, True)
    """
    major, minor = version.split(".")[:2]
    return (int(major), int(minor)) >= SYMBOLIC


def limit_in_one_line(record: logging.LogRecord) -> bool:
    """A logging filter: torch's five lines on a limit that was reached become one."""
    said = LIMIT.match(logging.LogRecord.getMessage(record))  # before the command line shortens it
    if said is None:
        return True
    tqdm.write(
        f"compile: more than {VARIANTS} variants of {said['function']}; grids of other shapes run "
        f"uncompiled, slower. Fewer shapes: data.cells=square. The last: {said['reason'][:200]}"
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
