"""How many files a process may have open, and how many the processes of a command need: where there
are too few, reading processes stop in the middle of a batch and nobody is told."""

from __future__ import annotations

import resource
from typing import TYPE_CHECKING

from visualcloze_deft.cells import CELL_STEP
from visualcloze_deft.errors import UserError

if TYPE_CHECKING:
    from visualcloze_deft.settings import Run

OWN = 256  # of a process: libraries, models, pictures, other processes of its group, GPUs
PIPES = 4  # to each process that it starts
AHEAD = 2  # batches that a reading process prepares: torch's prefetch_factor
TENSORS = 8  # of a grid of four rows; each that comes from a reading process has a file of its own
ENOUGH = 1 << 16  # of which no command needs more


def raise_limit() -> None:
    """Have this process, and those that it starts, open as many files as the system lets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = ENOUGH if hard == resource.RLIM_INFINITY else min(hard, ENOUGH)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def check_handles(*, readers: int = 0, lower: str = "") -> None:
    """Raise `UserError` where a process may open fewer files than it needs with so many reading
    processes. lower: what makes it need fewer, in the words of its settings."""
    check_allowed(OWN + PIPES * readers, lower=lower if readers else "")


def check_run(run: Run) -> None:
    """`check_handles` for the processes that train `run`, which receive tensors, too."""
    lower = "data.workers, batch or accumulate" if run.data.workers else ""
    check_allowed(OWN + PIPES * run.data.workers + received(run), lower=lower)


def received(run: Run) -> int:
    """The most tensors from reading processes that a training process holds."""
    grids = run.batch
    if not run.data.workers:
        return 0
    if run.batch_tokens:
        from visualcloze_deft.rundir import resolution_of

        cell = (resolution_of(run) // CELL_STEP) ** 2
        grids = -(-run.batch_tokens // (TENSORS * cell))  # two tensors a row of two cells or more
    return TENSORS * grids * (AHEAD * run.data.workers + run.accumulate)


def check_allowed(needed: int, *, lower: str) -> None:
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if allowed != resource.RLIM_INFINITY and allowed < needed:
        raise UserError(
            f"a process may open {allowed} files here, and {needed} may be needed; start in a "
            f"shell that allows 'ulimit -n {needed}'{lower and f', or lower {lower}'}"
        )
