"""What a comparison found: lines of results, and figures of methods, pairs and tasks from them.

Axes: s seeds, g grids.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np

from visualcloze_deft.comparison.records import Measured
from visualcloze_deft.comparison.trainings import Training
from visualcloze_deft.reporting.numbers import rounded
from visualcloze_deft.reporting.plots import Lines
from visualcloze_deft.reporting.random_effects import LEVEL, Estimate, Values, estimate, holm

GROUPS = {"new": "gain", "old": "retention"}  # what a change is called
MARKED = 8  # grids, of which fewer mark no difference
PERCENT = f"{100 * LEVEL:.0f} %"  # of intervals, in words
ONE_SEED = "One seed: no spread between trainings is known."


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One task before and after one training."""

    training: Training
    group: str
    task: str
    before: Measured
    after: Measured


@dataclass(frozen=True, kw_only=True)
class Measure:
    """How a change is told. key: its figures in a line. of: the change of each grid from (before,
    after), above 0 where it is for the better; such values are averaged. shown: a mean of them in
    `unit`."""

    key: str
    name: str
    unit: str
    of: Callable[[Values, Values], Values]
    shown: Callable[[float], float]


MEASURES = (
    Measure(
        key="psnr",
        name="PSNR",
        unit="dB",
        of=lambda before, after: after - before,
        shown=lambda mean: mean,
    ),
    Measure(  # of errors that differ by factors between tasks and grids
        key="error",
        name="velocity error",
        unit="%",
        of=lambda before, after: np.log(before / after),
        shown=lambda mean: -100 * math.expm1(min(-mean, 100)),
    ),
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One figure of the tables. match: by what it is matched, "rank", "parameters" or both. what: a
    method, or a pair of them as (one, minus the other).

    p: of no difference, adjusted for all pairs of its group and measure (Holm); nan of a method."""

    match: str
    what: tuple[str, ...]
    group: str
    task: str
    measure: Measure
    found: Estimate
    p: float = float("nan")

    @property
    def text(self) -> str:
        """The mean and its interval, as tables print it, which says where it is of grids alone."""
        found = [self.measure.shown(v) for v in (self.found.mean, self.found.low, self.found.high)]
        mean, low, high = (rounded(value, places=2, sign=True) for value in found)
        return f"{mean} ({'grids ' if self.found.seeds == 1 else ''}{low} to {high})"

    @property
    def significant(self) -> bool:
        """Whether a table marks it: not where few grids or one seed tell little of others."""
        told = self.found
        return self.p < 1 - LEVEL and told.grids >= MARKED and told.seeds > 1


def line_of(one: Compared) -> dict[str, Any]:
    training = one.training
    return {
        "matches": training.matches,
        "method": training.method,
        "rank": training.rank,
        "parameters": training.parameters,
        "seed": training.seed,
        "group": one.group,
        "task": one.task,
        "grids": len(one.before.psnr),
        "psnr_before": float(np.mean(one.before.psnr)),
        "psnr_after": float(np.mean(one.after.psnr)),
        "error_before": float(np.mean(one.before.errors)),
        "error_after": float(np.mean(one.after.errors)),
        "of_grids": {
            "psnr": {"before": one.before.psnr, "after": one.after.psnr},
            "error": {"before": one.before.errors, "after": one.after.errors},
        },
        "seconds": {"base": one.before.seconds, "adapter": one.after.seconds},
        "run": str(training.folder),
    }


def distinct_values(lines: Lines, key: str) -> list[Any]:
    """The values of `key`, in the order in which they come first."""
    return list(dict.fromkeys(line[key] for line in lines))


def matching_lines(lines: Lines, **wanted: object) -> list[Mapping[str, Any]]:
    """The lines that have these values, keys of no value (None) aside."""
    asked = {key: value for key, value in wanted.items() if value is not None}
    return [line for line in lines if all(line[key] == value for key, value in asked.items())]


def groups_of(lines: Lines) -> list[str]:
    """The groups of tasks that were asked, new ones first."""
    return [group for group in GROUPS if matching_lines(lines, group=group)]


def one_seed(lines: Lines) -> bool:
    return len(distinct_values(lines, "seed")) == 1


def matches(lines: Lines) -> list[str]:
    return list(dict.fromkeys(match for line in lines for match in line["matches"]))


def entrants(lines: Lines, match: str | None = None) -> dict[tuple[str, int], Lines]:
    """(method, rank) -> its lines; those that take part in a match, or all."""
    found: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for line in lines:
        if match is None or match in line["matches"]:
            found.setdefault((line["method"], line["rank"]), []).append(line)
    return dict(found)


def changes(lines: Lines, measure: Measure) -> Values:
    """(s g) the change of each grid of each seed, mean over the tasks of `lines`."""
    found = []
    for seed in distinct_values(lines, "seed"):
        of_tasks = []
        for line in matching_lines(lines, seed=seed):
            told = line["of_grids"][measure.key]
            before, after = (np.array(told[when], np.float64) for when in ("before", "after"))
            of_tasks.append(measure.of(before, after))
        found.append(np.mean(of_tasks, axis=0))
    return np.array(found)


def method_rows(lines: Lines, *, by_task: bool = False) -> Iterator[Row]:
    """The changes of every method, of all tasks of a group together or of each."""
    for (method, _), own in entrants(lines).items():
        for group in distinct_values(own, "group"):
            of_group = matching_lines(own, group=group)
            for task in distinct_values(of_group, "task") if by_task else [None]:
                for measure in MEASURES:
                    yield Row(
                        match=" and ".join(matches(own)),
                        what=(method,),
                        group=group,
                        task=task or "",
                        measure=measure,
                        found=estimate(changes(matching_lines(of_group, task=task), measure)),
                    )


def pair_rows(lines: Lines) -> Iterator[Row]:
    """How much more the change of one method is than that of another that it is matched with, on
    the same grids after the same examples; p is adjusted for all pairs of one group and measure."""
    for group in distinct_values(lines, "group"):
        for measure in MEASURES:
            found = []
            for (one, first), (other, second) in combinations(
                entrants(matching_lines(lines, group=group)).items(), 2
            ):
                if shared := [match for match in matches(first) if match in matches(second)]:
                    apart = changes(first, measure) - changes(second, measure)
                    found.append(
                        Row(
                            match=" and ".join(shared),
                            what=(one[0], other[0]),
                            group=group,
                            task="",
                            measure=measure,
                            found=estimate(apart),
                        )
                    )
            adjusted = holm([row.found.p for row in found])
            for row, p in zip(found, adjusted, strict=True):
                yield replace(row, p=p)
