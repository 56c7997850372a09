"""Rows of a comparison: methods, pairs of methods, tasks."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np
import torch

from visualcloze_deft.comparison.measure import Measured
from visualcloze_deft.comparison.trainings import Training
from visualcloze_deft.reporting.plots import Lines
from visualcloze_deft.reporting.random_effects import LEVEL, Estimate, Values, estimate, holm
from visualcloze_deft.reporting.tables import markdown as tables_markdown
from visualcloze_deft.reporting.tables import p_text

GROUPS = {"new": "gain", "old": "retention"}  # what a change is called


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
        """The mean and its interval, as tables print it."""
        shown, found = self.measure.shown, self.found
        mean, low, high = (f"{shown(v):+.2f}" for v in (found.mean, found.low, found.high))
        return f"{mean} ({low} to {high})"

    @property
    def significant(self) -> bool:
        return self.p < 1 - LEVEL


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


Section = tuple[str, str, list[str], list[list[str]]]
"""A title, what to know of it, the head and the rows of a table."""


def tables(lines: Lines, steps: Mapping[str, Lines]) -> Iterator[Section]:
    yield summary(lines, steps)
    yield pairs(lines)
    yield by_task(lines)


def heads() -> list[str]:
    return [f"{word}, {m.name} [{m.unit}]" for word in GROUPS.values() for m in MEASURES]


def counted(lines: Lines, group: str) -> str:
    """How many values stand behind a mean."""
    own = matching_lines(lines, group=group)
    seeds, tasks = distinct_values(own, "seed"), distinct_values(own, "task")
    grids = sorted({line["grids"] for line in own})
    return f"{len(seeds)} seeds x {len(tasks)} tasks x {grids[0]} grids"


def summary(lines: Lines, steps: Mapping[str, Lines]) -> Section:
    rows = []
    found = list(method_rows(lines))
    for (method, rank), own in entrants(lines).items():
        match = " and ".join(matches(own))
        own_rows = [row for row in found if (row.match, row.what) == (match, (method,))]
        texts = {(row.group, row.measure.key): row.text for row in own_rows}
        spent = [sum(s["seconds"] for s in steps[run]) for run in distinct_values(own, "run")]
        rows.append(
            [
                match,
                method,
                str(rank),
                f"{own[0]['parameters']:,}",
                f"{np.mean(spent) / 60:.1f}",
                *(texts[group, m.key] for group in GROUPS for m in MEASURES),
            ]
        )
    runs = distinct_values(lines, "run")
    minutes = sum(s["seconds"] for run in runs for s in steps[run]) / 60
    of_base = {(line["group"], line["task"]): line["seconds"]["base"] for line in lines}
    measuring = sum([*of_base.values(), *(line["seconds"]["adapter"] for line in lines)]) / 60
    note = (
        f"Change from the base to the base with the adapter; above 0 is better. Gain is of the new "
        f"tasks ({counted(lines, 'new')}), retention of the old ones ({counted(lines, 'old')}), "
        "which were not trained. PSNR of generated pictures; velocity error by how many per cent "
        f"it falls (geometric mean). In brackets the {LEVEL:.0%} interval for other seeds and "
        f"grids. {len(runs)} trainings of {len(steps[runs[0]])} steps, {minutes:.0f} "
        f"minutes in their steps and {measuring:.0f} of measuring, on {machine()}."
    )
    head = ["matched by", "method", "rank", "parameters", "minutes", *heads()]
    return "Gain and retention", note, head, rows


def machine() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"{os.cpu_count()} CPU cores"


def pairs(lines: Lines) -> Section:
    rows: dict[tuple[str, ...], list[str]] = {}
    for row in pair_rows(lines):
        key = row.match, GROUPS[row.group], " - ".join(row.what)
        star = " *" if row.significant else ""
        said = f"{p_text(row.p)}{star}, {row.found.agree} of {row.found.seeds}"
        rows.setdefault(key, []).extend([row.text, said])
    note = (
        "PSNR: how much more the first method changed it than the second. Velocity error: by how "
        "many per cent the first's is below the second's. On the same grids, after the same "
        "training examples, with the interval for other seeds and grids. p: of no difference, "
        f"two-sided, adjusted for the {len(rows) // 2} pairs of gain, or of retention (Holm); * "
        f"below {1 - LEVEL:.2f}. Then in how many seeds the difference has this sign."
    )
    head = ["matched by", "of", "methods"]
    for m in MEASURES:
        head += [f"{m.name} [{m.unit}]", "p, seeds that agree"]
    return "Methods in pairs", note, head, [[*key, *texts] for key, texts in rows.items()]


def by_task(lines: Lines) -> Section:
    rows: dict[tuple[str, ...], list[str]] = {}
    for row in method_rows(lines, by_task=True):
        (method,) = row.what
        own = matching_lines(
            lines, method=method, task=row.task, group=row.group
        )  # of the base: the same
        before = np.mean([line[f"{row.measure.key}_before"] for line in own])
        digits = 1 if row.measure.key == "psnr" else 4
        key = row.match, method, GROUPS[row.group], row.task
        rows.setdefault(key, []).extend([f"{before:.{digits}f}", row.text])
    head = ["matched by", "method", "of", "task"]
    for m in MEASURES:
        head += [f"{m.name} of the base", f"change [{m.unit}]"]
    note = f"New: {counted(lines, 'new')}; old: {counted(lines, 'old')}."
    return "Each task", note, head, [[*key, *texts] for key, texts in rows.items()]


def markdown(title: str, note: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return f"### {title}\n\n{note}\n\n{tables_markdown(head, rows)}\n"


def as_csv(lines: Lines) -> str:
    """A line for each figure of all tables."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(
        "match method minus change_of task measure unit seeds grids mean low high p p_holm "
        "seeds_that_agree".split()
    )
    for row in (*method_rows(lines), *method_rows(lines, by_task=True), *pair_rows(lines)):
        measure, found = row.measure, row.found
        ends = (f"{measure.shown(value):.6g}" for value in (found.mean, found.low, found.high))
        writer.writerow(
            [
                row.match,
                row.what[0],
                row.what[1] if len(row.what) > 1 else "",
                GROUPS[row.group],
                row.task,
                measure.name,
                measure.unit,
                found.seeds,
                found.grids,
                *ends,
                f"{found.p:.6g}",
                f"{row.p:.6g}" if len(row.what) > 1 else "",
                found.agree,
            ]
        )
    return file.getvalue()
