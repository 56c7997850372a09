"""What `vcdeft compare` writes of its measurements: lines, tables, pictures, a page.

OUTPUT/results.jsonl          a line for each training and task, with the figures of every grid
                              before and after; all else is made from it
OUTPUT/table.md, table.csv    gain, retention and the methods in pairs
OUTPUT/gain-retention.svg, learning-curves.svg
OUTPUT/samples.png            the contact sheet, where pictures are kept
OUTPUT/report.html            all of it, in a file that opens without a server

Axes: s seeds, g grids.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from visualcloze_deft.comparison.changes import Compared, line_of
from visualcloze_deft.comparison.plots import draw_curves, draw_scatter
from visualcloze_deft.comparison.tables import Section, as_csv, markdown, tables
from visualcloze_deft.reporting import page
from visualcloze_deft.reporting.plots import svg_of
from visualcloze_deft.storage.atomic import write_png, write_text
from visualcloze_deft.storage.jsonl import StepLine, read_lines
from visualcloze_deft.training import run_folder

RESULTS, TABLE, CSV, REPORT = "results.jsonl", "table.md", "table.csv", "report.html"
SCATTER, CURVES, SAMPLES = "gain-retention.svg", "learning-curves.svg", "samples.png"
SHEET = (
    "A row is a held-out grid without its in-context example. Red frames are generated, from the "
    "same noise, by the base and by each adapter of the first seed (r: rank)."
)


def write_reports(
    found: Sequence[Compared], output: Path, *, samples: Image.Image | None = None
) -> Path:
    """Write all files; each appears whole. Returns the path of the table. samples: the sheet."""
    lines = [line_of(one) for one in found]
    texts = [json.dumps(run_folder.finite(line), ensure_ascii=False) for line in lines]
    write_text(output / RESULTS, "".join(f"{text}\n" for text in texts))
    told = read_results(output / RESULTS)
    steps = {
        line["run"]: read_lines(Path(line["run"]) / run_folder.METRICS, StepLine) for line in told
    }
    sections = list(tables(told, steps))
    write_text(output / TABLE, "\n".join(markdown(*section) for section in sections))
    write_text(output / CSV, as_csv(told))
    scatter, curves = svg_of(draw_scatter(told)), svg_of(draw_curves(told, steps))
    write_text(output / SCATTER, scatter)
    write_text(output / CURVES, curves)
    settings = (output / "compare.toml").read_text(encoding="utf-8")
    if samples is not None:
        write_png(output / SAMPLES, samples)
    write_text(output / REPORT, as_page(output, sections, [scatter, curves], settings, samples))
    return output / TABLE


def read_results(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def as_page(
    output: Path,
    sections: Sequence[Section],
    drawn: Sequence[str],
    settings: str,
    samples: Image.Image | None,
) -> str:
    """The HTML page; the samples stand after the first table."""
    found = []
    for number, (title, note, head, rows) in enumerate(sections):
        parts: list[page.Part] = [page.Text(text=note), page.Table(head=head, rows=rows)]
        if not number:
            parts += [page.Drawings(svgs=[svg]) for svg in drawn]
        found.append(page.Section(title=title, parts=parts))
    if samples is not None:
        words = page.Text(text=SHEET)
        picture = page.Picture(image=samples, alt="samples of each method")
        found.insert(1, page.Section(title="Samples", parts=[words, picture]))
    found.append(page.Section(title="Settings", parts=[page.Code(text=settings)]))
    return page.page(output.resolve().name, found)
