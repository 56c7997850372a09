"""What goes wrong in a run without ending it, counted, until it is too much."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from visualcloze_deft.config.run_settings import Run
from visualcloze_deft.errors import UserError
from visualcloze_deft.training import run_folder
from visualcloze_deft.training.batch_schedule import StepPlan
from visualcloze_deft.training.checkpoint import Progress
from visualcloze_deft.training.metrics_log import ExampleLoss
from visualcloze_deft.training.step import Stepper

ENOUGH_ITEMS = 100  # drawn before their unreadable share is judged


class Faults:
    """Items that could not be read, and steps whose gradient was not finite.

    skipped: items so far, in this process group's life. not_finite: steps of the whole run;
    in_a_row: the last ones of them. Every process counts the same, the first one writes.
    """

    def __init__(self, run: Run, *, first: bool, start: Progress | None) -> None:
        self.run = run
        self.first = first
        self.items = self.skipped = 0
        self.not_finite = start.not_finite if start else 0
        self.in_a_row = start.in_a_row if start else 0

    @property
    def list(self) -> Path:
        """The file that lists what could not be read."""
        return Path(self.run.output) / run_folder.SKIPPED

    def count_skipped(self, seen: Mapping[int, ExampleLoss], *, step: int) -> None:
        """List what could not be read; where it is too much, every process stops."""
        skipped = [(index, one) for index, found in seen.items() for one in found.skipped]
        self.items += sum(one.items for one in seen.values()) + len(skipped)
        self.skipped += len(skipped)
        if self.first:
            for index, one in skipped:
                line = {"step": step, "example": index, **asdict(one)}
                run_folder.append_line(self.list, line)
        most = self.run.data.skip_at_most
        if skipped and self.items >= ENOUGH_ITEMS and self.skipped > most * self.items:
            raise UserError(
                f"{self.skipped} of {self.items} items drawn could not be read, more than "
                f"data.skip_at_most = {most:g}; {self.list} lists them, the last: "
                f"{skipped[-1][1].why}"
            )

    def count_step(
        self, planned: StepPlan, seen: Mapping[int, ExampleLoss], stepper: Stepper, *, step: int
    ) -> None:
        """A step without a finite gradient changed nothing, in no process; too many end the run.

        Under every ZeRO stage the norm of all gradients decides, so all processes find the same.
        """
        if stepper.engine.was_step_applied():
            self.in_a_row = 0
            return
        self.not_finite += 1
        self.in_a_row += 1
        odd = [index for index, one in seen.items() if not math.isfinite(one.error)]
        first, last = planned.first, planned.first + planned.examples - 1
        where = f"examples {', '.join(map(str, odd))}" if odd else f"examples {first} to {last}"
        if self.first:
            but = "" if odd else ", whose losses are finite"
            tqdm.write(f"step {step} skipped, its gradient is not finite: {where}{but}")
        if self.in_a_row > self.run.not_finite_at_most:
            came = stepper.origin(loss_finite=not odd)
            if odd:
                blamed = f"The last in {where}: look at them (`vcdeft tasks preview`)"
            else:
                blamed = "Their losses are finite: try another --attention or precision"
            raise UserError(
                f"step {step}: loss or gradient not finite {self.in_a_row} times in a row, "
                f"more than not_finite_at_most = {self.run.not_finite_at_most}; the first after "
                f"{came}. {blamed}, or lower optimiser.lr and go on with another --output"
            )
