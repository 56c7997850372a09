"""Tables of a comparison: methods, pairs of methods, tasks."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch

from visualcloze_deft.comparison.changes import (
    GROUPS,
    MARKED,
    MEASURES,
    ONE_SEED,
    PERCENT,
    distinct_values,
    entrants,
    groups_of,
    matches,
    matching_lines,
    method_rows,
    one_seed,
    pair_rows,
)
from visualcloze_deft.reporting.numbers import counted_as, three_digits
from visualcloze_deft.reporting.plots import Lines
from visualcloze_deft.reporting.random_effects import LEVEL
from visualcloze_deft.reporting.tables import markdown as tables_markdown
from visualcloze_deft.reporting.tables import p_text

Section = tuple[str, str, list[str], list[list[str]]]
"""A title, what to know of it, the head and the rows of a table."""


def tables(lines: Lines, steps: Mapping[str, Lines]) -> Iterator[Section]:
    yield summary(lines, steps)
    if len(entrants(lines)) > 1:
        yield pairs(lines)
    yield by_task(lines)


def heads(lines: Lines) -> list[str]:
    words = [GROUPS[group] for group in groups_of(lines)]
    return [f"{word}, {m.name} [{m.unit}]" for word in words for m in MEASURES]


def counted(lines: Lines, group: str) -> str:
    """How many values stand behind a mean."""
    own = matching_lines(lines, group=group)
    seeds, tasks = distinct_values(own, "seed"), distinct_values(own, "task")
    grids = sorted({line["grids"] for line in own})
    parts = counted_as(len(seeds), "seed"), counted_as(len(tasks), "task")
    return f"{parts[0]} x {parts[1]} x {counted_as(grids[0], 'grid')}"


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
                minutes_text(float(np.mean(spent)) / 60),
                *(texts[group, m.key] for group in groups_of(lines) for m in MEASURES),
            ]
        )
    runs = distinct_values(lines, "run")
    minutes = sum(s["seconds"] for run in runs for s in steps[run]) / 60
    of_base = {(line["group"], line["task"]): line["seconds"]["base"] for line in lines}
    measuring = sum([*of_base.values(), *(line["seconds"]["adapter"] for line in lines)]) / 60
    asked = f"Gain is of the new tasks ({counted(lines, 'new')})"
    if "old" in groups_of(lines):
        asked += f", retention of the old ones ({counted(lines, 'old')}), which were not trained"
    note = (
        f"Change from the base to the base with the adapter; above 0 is better. {asked}. PSNR of "
        "generated pictures; velocity error by how many per cent it falls (geometric mean). "
        f"{interval_in_words(lines)} {counted_as(len(runs), 'training')} of {len(steps[runs[0]])} "
        f"steps, {minutes_text(minutes)} minutes in their steps and {minutes_text(measuring)} of "
        f"measuring, on {machine()}."
    )
    head = ["matched by", "method", "rank", "parameters", "minutes", *heads(lines)]
    title = " and ".join(GROUPS[group] for group in groups_of(lines)).capitalize()
    return title, note, head, rows


def minutes_text(minutes: float) -> str:
    """Whole ones, of few with one place."""
    return f"{minutes:.0f}" if minutes >= 9.5 else f"{minutes:.1f}"


def interval_in_words(lines: Lines) -> str:
    """What the brackets hold."""
    if one_seed(lines):
        return f"{ONE_SEED} In brackets the {PERCENT} interval for other grids alone."
    return f"In brackets the {PERCENT} interval for other seeds and grids."


def machine() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"{os.cpu_count()} CPU cores"


def pairs(lines: Lines) -> Section:
    rows: dict[tuple[str, ...], list[str]] = {}
    alone = one_seed(lines)
    names = ", or of ".join(GROUPS[group] for group in groups_of(lines))
    for row in pair_rows(lines):
        key = row.match, GROUPS[row.group], " - ".join(row.what)
        star = " *" if row.significant else ""
        agree = "" if alone else f", {row.found.agree} of {row.found.seeds}"
        rows.setdefault(key, []).extend([row.text, f"{p_text(row.p)}{star}{agree}"])
    note = (
        "PSNR: how much more the first method changed it than the second. Velocity error: by how "
        "many per cent the first's is below the second's. On the same grids, after the same "
        f"training examples. {interval_in_words(lines)} p: of no difference, two-sided, adjusted "
        f"for the {counted_as(len(rows) // len(groups_of(lines)), 'pair')} of {names} (Holm). "
        f"{marks_in_words(lines)}"
    )
    head = ["matched by", "of", "methods"]
    for m in MEASURES:
        head += [f"{m.name} [{m.unit}]", "p" if alone else "p, seeds that agree"]
    return "Methods in pairs", note, head, [[*key, *texts] for key, texts in rows.items()]


def marks_in_words(lines: Lines) -> str:
    """Which differences are marked, see `Row.significant`."""
    if one_seed(lines):
        return "With one seed, p is of other grids alone, and no difference is marked."
    few = min(line["grids"] for line in lines) < MARKED
    but = f", but none over fewer than {MARKED} grids" if few else ""
    return f"* below {1 - LEVEL:.2f}{but}. Then in how many seeds the difference has this sign."


def by_task(lines: Lines) -> Section:
    rows: dict[tuple[str, ...], list[str]] = {}
    for row in method_rows(lines, by_task=True):
        (method,) = row.what
        own = matching_lines(
            lines, method=method, task=row.task, group=row.group
        )  # of the base: the same
        before = np.mean([line[f"{row.measure.key}_before"] for line in own])
        key = row.match, method, GROUPS[row.group], row.task
        rows.setdefault(key, []).extend([three_digits(before), row.text])
    head = ["matched by", "method", "of", "task"]
    for m in MEASURES:
        head += [f"{m.name} of the base", f"change [{m.unit}]"]
    parts = [f"{group}: {counted(lines, group)}" for group in groups_of(lines)]
    note = f"{'; '.join(parts).capitalize()}."
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
