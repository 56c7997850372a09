"""What `vcdeft compare` writes of its measurements: lines, tables, pictures, a page.

OUTPUT/results.jsonl          a line for each training and task, with the figures of every grid
                              before and after; all else is made from it
OUTPUT/table.md, table.csv    gain, retention and the methods in pairs
OUTPUT/gain-retention.svg, learning-curves.svg
OUTPUT/report.html            all of it, in a file that opens without a server

Axes: s seeds, g grids.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from visualcloze_deft import rundir
from visualcloze_deft.compare_config import Training
from visualcloze_deft.compare_evaluate import Measured
from visualcloze_deft.compare_statistics import LEVEL, Estimate, Values, estimate, holm
from visualcloze_deft.evaluation.tables import markdown as tables_markdown
from visualcloze_deft.evaluation.tables import told_p
from visualcloze_deft.output import whole_text
from visualcloze_deft.report import PAGE, Lines, Numbers, smooth, svg_of, table, thinned, values
from visualcloze_deft.runlines import StepLine, read_lines

RESULTS, TABLE, CSV, REPORT = "results.jsonl", "table.md", "table.csv", "report.html"
SCATTER, CURVES = "gain-retention.svg", "learning-curves.svg"
COLOURS = {"deft": "C0", "deft-relaxed": "C9", "para": "C2", "lora": "C3"}
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


def write_reports(found: Sequence[Compared], output: Path) -> Path:
    """Write all files; each appears whole. Returns the path of the table."""
    lines = [line_of(one) for one in found]
    texts = [json.dumps(rundir.finite(line), ensure_ascii=False) for line in lines]
    whole_text(output / RESULTS, "".join(f"{text}\n" for text in texts))
    told = read_results(output / RESULTS)
    steps = {line["run"]: read_lines(Path(line["run"]) / rundir.METRICS, StepLine) for line in told}
    sections = list(tables(told, steps))
    whole_text(output / TABLE, "\n".join(markdown(*section) for section in sections))
    whole_text(output / CSV, as_csv(told))
    scatter, curves = svg_of(draw_scatter(told)), svg_of(draw_curves(told, steps))
    whole_text(output / SCATTER, scatter)
    whole_text(output / CURVES, curves)
    settings = (output / "compare.toml").read_text(encoding="utf-8")
    whole_text(output / REPORT, page(output, sections, [scatter, curves], settings))
    return output / TABLE


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


def read_results(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def named(lines: Lines, key: str) -> list[Any]:
    """The values of `key`, in the order in which they come first."""
    return list(dict.fromkeys(line[key] for line in lines))


def some(lines: Lines, **wanted: object) -> list[Mapping[str, Any]]:
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
    for seed in named(lines, "seed"):
        of_tasks = []
        for line in some(lines, seed=seed):
            told = line["of_grids"][measure.key]
            before, after = (np.array(told[when], np.float64) for when in ("before", "after"))
            of_tasks.append(measure.of(before, after))
        found.append(np.mean(of_tasks, axis=0))
    return np.array(found)


def method_rows(lines: Lines, *, by_task: bool = False) -> Iterator[Row]:
    """The changes of every method, of all tasks of a group together or of each."""
    for (method, _), own in entrants(lines).items():
        for group in named(own, "group"):
            of_group = some(own, group=group)
            for task in named(of_group, "task") if by_task else [None]:
                for measure in MEASURES:
                    yield Row(
                        match=" and ".join(matches(own)),
                        what=(method,),
                        group=group,
                        task=task or "",
                        measure=measure,
                        found=estimate(changes(some(of_group, task=task), measure)),
                    )


def pair_rows(lines: Lines) -> Iterator[Row]:
    """How much more the change of one method is than that of another that it is matched with, on
    the same grids after the same examples; p is adjusted for all pairs of one group and measure."""
    for group in named(lines, "group"):
        for measure in MEASURES:
            found = []
            for (one, first), (other, second) in combinations(
                entrants(some(lines, group=group)).items(), 2
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
    own = some(lines, group=group)
    seeds, tasks = named(own, "seed"), named(own, "task")
    grids = sorted({line["grids"] for line in own})
    return f"{len(seeds)} seeds x {len(tasks)} tasks x {grids[0]} grids"


def summary(lines: Lines, steps: Mapping[str, Lines]) -> Section:
    rows = []
    found = list(method_rows(lines))
    for (method, rank), own in entrants(lines).items():
        match = " and ".join(matches(own))
        own_rows = [row for row in found if (row.match, row.what) == (match, (method,))]
        texts = {(row.group, row.measure.key): row.text for row in own_rows}
        spent = [sum(s["seconds"] for s in steps[run]) for run in named(own, "run")]
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
    runs = named(lines, "run")
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
        said = f"{told_p(row.p)}{star}, {row.found.agree} of {row.found.seeds}"
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
        own = some(lines, method=method, task=row.task, group=row.group)  # of the base: the same
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


def draw_scatter(lines: Lines) -> Figure:
    """Gain against retention: a panel for each match and measure; small points are seeds."""
    every = matches(lines)
    figure = Figure(figsize=(6.2 * len(MEASURES), 4.4 * len(every)), layout="constrained")
    panels = figure.subplots(len(every), len(MEASURES), squeeze=False)
    for match, of_match in zip(every, panels, strict=True):
        for measure, axes in zip(MEASURES, of_match, strict=True):
            for own in entrants(lines, match).values():
                ends = [estimate(changes(some(own, group=group), measure)) for group in GROUPS]
                draw_method(axes, own, ends, measure)
            axes.axhline(0, color="#888", linewidth=0.8)
            axes.axvline(0, color="#888", linewidth=0.8)
            axes.set_xlabel(f"gain on the new, {measure.name} [{measure.unit}]")
            axes.set_ylabel(f"retention of the old [{measure.unit}]")
            axes.set_title(f"matched by {match}", fontsize=11, loc="left")
            axes.grid(alpha=0.25)
            axes.legend(fontsize=8, frameon=False)
    return figure


def draw_method(axes: Axes, own: Lines, ends: Sequence[Estimate], measure: Measure) -> None:
    """One method's point with its intervals, and those of its seeds."""
    method, rank = own[0]["method"], own[0]["rank"]
    new, old = (changes(some(own, group=group), measure).mean(axis=1) for group in GROUPS)
    shown = np.vectorize(measure.shown)
    axes.plot(shown(new), shown(old), ".", color=COLOURS[method], alpha=0.5, markersize=5)
    (x, y), bars = ([measure.shown(one.mean) for one in ends], [])
    for one in ends:
        low, mean, high = (measure.shown(value) for value in (one.low, one.mean, one.high))
        bars.append([[max(mean - low, 0)], [max(high - mean, 0)]])
    label = f"{method}, rank {rank}"
    style: dict[str, Any] = {"fmt": "o", "color": COLOURS[method], "capsize": 3, "label": label}
    axes.errorbar([x], [y], xerr=bars[0], yerr=bars[1], **style)


def draw_curves(lines: Lines, steps: Mapping[str, Lines]) -> Figure:
    """Training losses, mean over seeds and smoothed, and their difference to the first method's:
    every method sees the same examples with the same noise, so that the noise goes with it."""
    every = matches(lines)
    figure = Figure(figsize=(12.4, 3.6 * len(every)), layout="constrained")
    panels = figure.subplots(len(every), 2, squeeze=False)
    for match, (left, right) in zip(every, panels, strict=True):
        own = entrants(lines, match).items()
        known = alike({method: mean_loss(told, steps) for (method, _), told in own})
        first = next(iter(known))
        for method, loss in known.items():
            x = np.arange(1.0, len(loss) + 1)
            style: dict[str, Any] = {"color": COLOURS[method], "label": method, "linewidth": 1.2}
            left.plot(*thinned(x, smooth(loss, share=1 / 15)), **style)
            right.plot(*thinned(x, smooth(loss - known[first], share=1 / 15)), **style)
        left.set_title(f"Training loss, matched by {match}", fontsize=11, loc="left")
        right.set_title(f"The same minus {first}'s", fontsize=11, loc="left")
        for axes in (left, right):
            axes.set_xlabel("step")
            axes.grid(alpha=0.25)
            axes.legend(fontsize=8, frameon=False)
    return figure


def mean_loss(lines: Lines, steps: Mapping[str, Lines]) -> Numbers:
    """The loss of each step, mean over the trainings of `lines`."""
    every = alike({run: values(steps[run], "loss") for run in named(lines, "run")})
    return np.mean([*every.values()], axis=0)


def alike(losses: Mapping[str, Numbers]) -> dict[str, Numbers]:
    """Curves of one length: the last line of a run may have been cut short."""
    shortest = min(map(len, losses.values()))
    return {name: loss[:shortest] for name, loss in losses.items()}


def page(output: Path, sections: Sequence[Section], drawn: Sequence[str], settings: str) -> str:
    """The HTML page."""
    name = output.resolve().name
    parts = [f"<h1>{escape(name)}</h1>"]
    for number, (title, note, head, rows) in enumerate(sections):
        parts += [f"<h2>{title}</h2><p>{escape(note)}</p>", table(rows, head=head)]
        if not number:
            parts += [f"<div>{svg}</div>" for svg in drawn]
    parts.append(f"<h2>Settings</h2><pre>{escape(settings)}</pre>")
    return PAGE.format(title=escape(name), body="\n".join(parts))
