"""An evaluation on one page that needs no server: figures, bars with intervals, sheets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure as Drawing
from PIL import Image

from visualcloze_deft.data.images import read_image
from visualcloze_deft.errors import printable
from visualcloze_deft.evaluation import tables
from visualcloze_deft.evaluation.cases import GRIDS, Case
from visualcloze_deft.evaluation.scoring import SetScore
from visualcloze_deft.evaluation.statistics import Figure
from visualcloze_deft.evaluation.tables import Kept, Scored, Table
from visualcloze_deft.report import PAGE, jpeg, svg_of, table
from visualcloze_deft.sheet import draw_grid, draw_sheet

SHOWN = 4  # grids of a row on its sheet, spread over all
CELL = 128  # pixels
OURS, BASE = "#2b6cb0", "#b0b0b0"


@dataclass(frozen=True, kw_only=True)
class Results:
    """All that an evaluation found. facts: what stands above it; notes: below the tables."""

    title: str
    facts: Sequence[tuple[str, str]]
    found: Sequence[Scored]
    table: Table
    drift: Table
    kept: Sequence[Kept]
    sets: Sequence[SetScore]
    notes: Sequence[str]
    settings: str


def as_markdown(results: Results) -> str:
    """`table.md`."""
    parts = [f"# {tables.as_text(results.title)}", tables.markdown(*tables.cells_of(results.table))]
    for heading, (head, rows) in further(results):
        parts.append(f"## {heading}")
        parts.append(tables.markdown(head, rows))
    parts += ["\n".join(f"- {tables.as_text(note)}" for note in results.notes)]
    parts += ["\n".join(f"- {tables.as_text(f'{name}: {value}')}" for name, value in results.facts)]
    return "\n\n".join(parts) + "\n"


def further(results: Results) -> list[tuple[str, tuple[list[str], list[list[str]]]]]:
    """The tables below the first one, those that have rows."""
    drawn = [
        (
            "Before and after, on the same grids and seeds",
            tables.kept_cells(results.kept, results.table.metrics),
        ),
        ("Drift from the base", tables.cells_of(results.drift)),
        ("Distances of sets", tables.set_cells(results.sets)),
    ]
    return [(heading, cells) for heading, cells in drawn if cells[1]]


def as_page(results: Results, output: Path, cases: Sequence[Case]) -> str:
    """`report.html`."""
    head, rows = tables.cells_of(results.table)
    parts = [f"<h1>{escape(results.title)}</h1>", table(results.facts)]
    parts += [f"<h2>Figures</h2>{table(rows, head=head)}"]
    for heading, (head, rows) in further(results):
        parts.append(f"<h2>{escape(heading)}</h2>{table(rows, head=head)}")
    parts += ["".join(f"<p>{escape(note)}</p>" for note in results.notes)]
    parts += [f'<div class="curves">{"".join(bars(results))}</div>']
    for row, picture in sheets(results.found, output, cases).items():
        parts.append(f"<h2>{escape(row)}</h2>{jpeg(picture, alt=f'grids of {row}')}")
    parts.append(f"<h2>Settings</h2><pre>{escape(results.settings)}</pre>")
    return PAGE.format(title=escape(results.title), body="\n".join(parts))


def bars(results: Results) -> list[str]:
    """One picture for each metric, as SVG."""
    base = {(one.row, one.metric): one.base for one in results.kept}
    found = []
    for name, metric in results.table.metrics.items():
        after = {row: f[name] for row, f in results.table.rows.items() if name in f}
        before = {row: base[row, name] for row in after if (row, name) in base}
        words = f"{metric.title}, {'more' if metric.up else 'less'} is better"
        found.append(svg_of(draw_bars(words, after, before)))
    return found


def draw_bars(title: str, after: Mapping[str, Figure], before: Mapping[str, Figure]) -> Drawing:
    """A bar for each row with its interval, grey ones of the base above."""
    each, around = (0.6, 1.15) if before else (0.3, 0.9)  # inches; two bars have a legend below
    drawing = Drawing(figsize=(6.2, around + each * len(after)), layout="constrained")
    axes = drawing.subplots()
    places = np.arange(len(after))
    kinds = (
        [("base", before, BASE), ("with the adapter", after, OURS)]
        if before
        else [("", after, OURS)]
    )
    height = 0.8 / len(kinds)
    for k, (label, figures, colour) in enumerate(kinds):
        at = [places[n] - 0.4 + (k + 0.5) * height for n, row in enumerate(after) if row in figures]
        own = [figures[row] for row in after if row in figures]
        means = np.array([one.mean for one in own])
        reach = np.array([[one.mean - one.low, one.high - one.mean] for one in own]).T
        axes.barh(at, means, height * 0.9, color=colour, label=label or None)
        axes.errorbar(means, at, xerr=np.nan_to_num(reach), fmt="none", ecolor="#222", capsize=2)
    names = [printable(name) for name in after]  # and no formulas
    axes.set_yticks(places, names, fontsize=8, parse_math=False)
    axes.invert_yaxis()
    axes.set_title(printable(title), fontsize=11, loc="left", parse_math=False)
    axes.grid(alpha=0.25, axis="x")
    axes.spines[["top", "right"]].set_visible(False)
    if before:
        drawing.legend(fontsize=8, frameon=False, ncols=2, loc="outside lower center")
    return drawing


def sheets(found: Sequence[Scored], output: Path, cases: Sequence[Case]) -> dict[str, Image.Image]:
    """For every row some of its grids: the rows shown, what was made in a red frame (first by the
    base, where it was asked), the truth last."""
    by_name = {case.name: case for case in cases}
    pages: dict[str, list[Image.Image]] = {}
    for row in dict.fromkeys(one.shot.row for one in found):
        own = [one for one in found if one.shot.row == row]
        every = max(len(own) // SHOWN, 1)
        for one in own[::every][:SHOWN]:
            case = by_name.get(one.shot.grid)
            pages.setdefault(row, []).append(shown(one, case, output))
    return {row: draw_sheet(drawn, columns=2) for row, drawn in pages.items()}


def shown(one: Scored, case: Case | None, output: Path) -> Image.Image:
    """One image in its grid, or beside what it is compared with."""
    shot = one.shot
    above: list[list[Image.Image | None]] = []
    for row in range(1, last_row(case) if case else 1):
        columns = range(1, len(case.roles) + 1) if case else ()
        names = [output / GRIDS / f"{shot.grid}-{row}{column}.png" for column in columns]
        above.append([read_image(name) for name in names])
    last: list[Image.Image | None] = [read_image(path) for path in shot.shown.values()]
    marks = [(len(above), len(last))]
    if one.base is not None:
        last.append(read_image(output / "base" / shot.image.name))
        marks.append((len(above), len(last)))
    last.append(read_image(shot.image))
    if shot.truth:
        last.append(read_image(shot.truth))
    said = f"{shot.task or shot.image.name}: {shot.prompt}" if shot.prompt else shot.task
    return draw_grid([*above, last], title=f"{said} [{shot.unit}]", made=marks, cell=CELL)


def last_row(case: Case) -> int:
    """The row of the query, counted from 1, as in the names of its pictures."""
    return int(next(iter(case.shown.values())).split("-")[1][0])
