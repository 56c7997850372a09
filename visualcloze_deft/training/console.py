"""The console while a run trains: one bar, and a line for each validation."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from tqdm import tqdm

from visualcloze_deft.config.run_settings import Run
from visualcloze_deft.reporting.numbers import duration, three_digits
from visualcloze_deft.training.validation import why_training_is_higher

WINDOW = 50  # steps of the running means
BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} steps [{elapsed}{postfix}]"


def times_left(every: int, step: int, steps: int) -> int:
    """How often something is still done that comes every `every` steps, 0 for never between, and
    after the last.

    >>> times_left(10, 10, 30), times_left(10, 25, 30), times_left(0, 25, 30)
    (2, 1, 1)
    """
    last = steps - 1
    return last // every - min(step, last) // every + 1 if every else 1


class RunningMean:
    """The weighted mean of the last `WINDOW` values; NaN of none."""

    def __init__(self) -> None:
        self.known: deque[tuple[float, float]] = deque(maxlen=WINDOW)

    def add(self, value: float, weight: float = 1.0) -> None:
        if np.isfinite(value):
            self.known.append((value, weight))

    @property
    def mean(self) -> float:
        weight = sum(w for _, w in self.known)
        return sum(v * w for v, w in self.known) / weight if weight else float("nan")


class Console:
    """The console of a run; only the first process shows anything."""

    def __init__(self, run: Run, *, first: bool) -> None:
        self.run = run
        self.first = first
        self.loss, self.exact, self.seconds = RunningMean(), RunningMean(), RunningMean()
        self.spent: dict[str, float] = {}
        self.explained = False
        self.told = ""
        self.bar: Any = None

    @contextmanager
    def shown(self, step: int, *, leave: bool = True) -> Iterator[None]:
        """Inside, a bar shows the steps, of which so many are done. leave: it stays afterwards."""
        with tqdm(
            desc="training",
            total=self.run.steps,
            initial=step,
            disable=not self.first,
            mininterval=1.0,
            bar_format=BAR,
            leave=leave,
        ) as self.bar:
            yield
            self.bar.set_postfix_str(self.told)

    def doing(self, what: str) -> None:
        """Show what is done between steps."""
        self.bar.set_postfix_str(what)

    def step(self, step: int, line: Mapping[str, Any]) -> None:
        """A step was taken. line: of the metrics."""
        self.loss.add(line["loss"])
        exact = line.get("exact", {})
        if "loss" in exact:
            self.exact.add(exact["loss"], exact["weight"])
        self.seconds.add(line["seconds"])
        means = self.loss.mean, self.seconds.mean
        self.told = "loss {}, {} s/step".format(*map(three_digits, means))
        self.bar.set_postfix_str(f"{self.told}, {duration(self.left(step))} left", refresh=False)
        self.bar.update(1)

    @contextmanager
    def working(self, kind: str) -> Iterator[None]:
        """Inside, something else than a step is done; its time counts in what is left."""
        began = time.monotonic()
        yield
        self.spent[kind] = time.monotonic() - began

    def left(self, step: int) -> float:
        """Seconds to the end: steps at their running mean, the rest as long as it took last."""
        run = self.run
        every = {"sheet": run.sample_every, "save": run.save_every}
        if run.logging.validate_every:
            every["validation"] = run.logging.validate_every
        rest = sum(
            times_left(every[kind], step, run.steps) * seconds
            for kind, seconds in self.spent.items()
        )
        return (run.steps - step) * self.seconds.mean + rest

    def validated(self, step: int, loss: float) -> None:
        """Say what was found, beside the training loss and, once, why that is higher."""
        if not self.first:
            return
        said = f"step {step}: validation loss {three_digits(loss)}"
        if self.loss.known:
            said += f", training loss {three_digits(self.loss.mean)}"
            if self.exact.known:
                said += f" ({three_digits(self.exact.mean)} without scheduled samples)"
            said += f", mean of {len(self.loss.known)} steps"
        tqdm.write(said)
        if self.loss.known and not self.explained:
            self.explained = True
            tqdm.write(why_training_is_higher(self.run))
