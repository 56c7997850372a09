"""An evaluation on one page that needs no server: figures, bars with intervals, sheets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from visualcloze_deft.evaluation import report_tables
from visualcloze_deft.evaluation.cases import GRIDS, Case
from visualcloze_deft.evaluation.report_tables import BeforeAfter, Scored, Table
from visualcloze_deft.evaluation.scoring import SetScore
from visualcloze_deft.images.reading import read_image
from visualcloze_deft.reporting import page, tables
from visualcloze_deft.reporting.bar_charts import draw_bars
from visualcloze_deft.reporting.contact_sheet import draw_grid, draw_sheet
from visualcloze_deft.reporting.plots import svg_of

SHOWN = 4  # grids of a row on its sheet, spread over all
CELL = 128  # pixels


@dataclass(frozen=True, kw_only=True)
class Results:
    """All that an evaluation found. facts: what stands above it; notes: below the tables."""

    title: str
    facts: Sequence[tuple[str, str]]
    found: Sequence[Scored]
    table: Table
    drift: Table
    kept: Sequence[BeforeAfter]
    sets: Sequence[SetScore]
    notes: Sequence[str]
    settings: str


def as_markdown(results: Results) -> str:
    """`table.md`."""
    parts = [
        f"# {tables.as_text(results.title)}",
        tables.markdown(*report_tables.cells_of(results.table)),
    ]
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
            report_tables.before_after_cells(results.kept, results.table.metrics),
        ),
        ("Drift from the base", report_tables.cells_of(results.drift)),
        ("Distances of sets", report_tables.set_cells(results.sets)),
    ]
    return [(heading, cells) for heading, cells in drawn if cells[1]]


def as_page(results: Results, output: Path, cases: Sequence[Case]) -> str:
    """`report.html`."""
    head, rows = report_tables.cells_of(results.table)
    sections = [
        page.Section(parts=[page.Table(rows=results.facts)]),
        page.Section(title="Figures", parts=[page.Table(head=head, rows=rows)]),
    ]
    for heading, (head, rows) in further(results):
        sections.append(page.Section(title=heading, parts=[page.Table(head=head, rows=rows)]))
    notes = [page.Text(text=note) for note in results.notes]
    sections.append(page.Section(parts=[*notes, page.Drawings(svgs=bars(results))]))
    for row, sheet in sheets(results.found, output, cases).items():
        picture = page.Picture(image=sheet, alt=f"grids of {row}")
        sections.append(page.Section(title=row, parts=[picture]))
    sections.append(page.Section(title="Settings", parts=[page.Code(text=results.settings)]))
    return page.page(results.title, sections)


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
