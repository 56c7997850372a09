"""The lines that say what a run will do, before it starts."""

from __future__ import annotations

from visualcloze_deft.config.run_settings import Run
from visualcloze_deft.reporting.numbers import counted_as


def steps_in_words(run: Run, processes: int) -> str:
    """How many steps, and the grids of each.

    >>> steps_in_words(Run(steps=200, batch=8), 2)
    '200 steps of 16 grids: 8 grids on each of 2 processes'
    >>> steps_in_words(Run(steps=200, batch=1, accumulate=8), 1)
    '200 steps of 8 grids: 8 times 1 grid on 1 process'
    >>> steps_in_words(Run(steps=9, batch_tokens=4000), 2)
    '9 steps: up to 4,000 tokens on each of 2 processes'
    """
    where = f"on each of {processes} processes" if processes > 1 else "on 1 process"
    times = f"{run.accumulate} times " if run.accumulate > 1 else ""
    if run.batch_tokens:
        return f"{run.steps:,} steps: {times}up to {run.batch_tokens:,} tokens {where}"
    part = counted_as(run.batch, "grid")
    whole = counted_as(run.batch * run.accumulate * processes, "grid")
    return f"{run.steps:,} steps of {whole}: {times}{part} {where}"


def samples_in_words(run: Run) -> str:
    """Which sample sheets a run makes."""
    if not run.sample_grids:
        return "no sample sheets"
    between = f", every {run.sample_every:,} steps" if run.sample_every else ""
    grids = counted_as(run.sample_grids, "grid")
    return f"up to {grids} before the first step{between}, and at the end"
