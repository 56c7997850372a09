"""How many files the processes of a run need to have open."""

from __future__ import annotations

from typing import TYPE_CHECKING

from visualcloze_deft.grids.cell_sizes import CELL_STEP
from visualcloze_deft.runtime.open_files import OWN, PIPES, check_allowed

if TYPE_CHECKING:
    from visualcloze_deft.config.run_settings import Run

AHEAD = 2  # batches that a reading process prepares: torch's prefetch_factor
TENSORS = 8  # of a grid of four rows; each that comes from a reading process has a file of its own


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
        from visualcloze_deft.training.run_data import resolution_of

        cell = (resolution_of(run) // CELL_STEP) ** 2
        grids = -(-run.batch_tokens // (TENSORS * cell))  # two tensors a row of two cells or more
    return TENSORS * grids * (AHEAD * run.data.workers + run.accumulate)
