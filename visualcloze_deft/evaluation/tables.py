"""Scores of images as rows of figures, in Markdown, CSV and JSON lines."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from visualcloze_deft.evaluation.cases import Shot
from visualcloze_deft.evaluation.scoring import Metric, Scores, SetScore, metric_of
from visualcloze_deft.evaluation.statistics import Figure, difference, figure, sign_flip_p

NONE = "-"


@dataclass(frozen=True, kw_only=True)
class Scored:
    """An image with its scores; base: those of the base at the same grid and seed, drift: how far
    the two are apart, both where they were asked for."""

    shot: Shot
    scores: Scores
    base: Scores | None = None
    drift: Scores | None = None


@dataclass(frozen=True, kw_only=True)
class Table:
    """Figures by row and metric; `metrics` in the order of columns."""

    metrics: Mapping[str, Metric]
    rows: Mapping[str, Mapping[str, Figure]]


@dataclass(frozen=True, kw_only=True)
class Kept:
    """A metric of a row before and after the adapter, on the same grids and seeds. p: of the
    difference, were the two alike."""

    row: str
    metric: str
    base: Figure
    after: Figure
    change: Figure
    p: float


def table_of(found: Sequence[Scored], *, tolerance: int = 0) -> Table:
    """The mean of every metric over the images of a row, with its interval over its units."""
    names = dict.fromkeys(name for one in found for name in one.scores)
    rows = {
        row: {name: one for name in names if (one := figure_of(found, row, name))}
        for row in dict.fromkeys(one.shot.row for one in found)
    }
    return Table(metrics={name: metric_of(name, tolerance=tolerance) for name in names}, rows=rows)


def figure_of(found: Sequence[Scored], row: str, name: str) -> Figure | None:
    own = [one for one in found if one.shot.row == row and name in one.scores]
    if not own:
        return None
    return figure([one.scores[name] for one in own], [one.shot.unit for one in own])


def kept_of(found: Sequence[Scored]) -> list[Kept]:
    """Every row and metric before and after, where the base made the same grids."""
    kept = []
    names = dict.fromkeys(name for one in found for name in one.scores)
    for row in dict.fromkeys(one.shot.row for one in found):
        for name in names:
            own = [
                (one.scores[name], one.base[name], one.shot.unit)
                for one in found
                if one.shot.row == row and name in one.scores and one.base and name in one.base
            ]
            if not own:
                continue
            after, before = [pair[0] for pair in own], [pair[1] for pair in own]
            units = [pair[2] for pair in own]
            kept.append(
                Kept(
                    row=row,
                    metric=name,
                    base=figure(before, units),
                    after=figure(after, units),
                    change=difference(after, before, units),
                    p=sign_flip_p(after, before, units),
                )
            )
    return kept


def drift_table(found: Sequence[Scored]) -> Table:
    """Drift by row; empty where the base was not asked."""
    return table_of([Scored(shot=one.shot, scores=one.drift) for one in found if one.drift])


def told(one: Figure, digits: int, *, sign: bool = False) -> str:
    """A figure in words.

    >>> told(Figure(mean=0.83, low=0.8, high=0.862, count=64), 3)
    '0.830 (0.800 to 0.862, n 64)'
    >>> told(Figure(mean=2.5, low=math.nan, high=math.nan, count=1), 1, sign=True)
    '+2.5 (n 1)'
    """
    plus = "+" if sign else ""
    mean, low, high = (f"{value:{plus}.{digits}f}" for value in (one.mean, one.low, one.high))
    return (
        f"{mean} (n {one.count})"
        if math.isnan(one.low)
        else f"{mean} ({low} to {high}, n {one.count})"
    )


def told_p(p: float) -> str:
    """A probability in words; no p is nought.

    >>> told_p(0.0004), told_p(0.04)
    ('< 0.001', '0.040')
    """
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def cells_of(table: Table) -> tuple[list[str], list[list[str]]]:
    """Heading and cells."""
    head = ["", *(f"{m.title} {'↑' if m.up else '↓'}" for m in table.metrics.values())]
    rows = [
        [
            row,
            *(
                told(figures[name], metric.digits) if name in figures else NONE
                for name, metric in table.metrics.items()
            ),
        ]
        for row, figures in table.rows.items()
    ]
    return head, rows


def kept_cells(
    kept: Sequence[Kept], metrics: Mapping[str, Metric]
) -> tuple[list[str], list[list[str]]]:
    head = ["", "metric", "base", "with the adapter", "change", "p"]
    rows = []
    for one in kept:
        metric = metrics[one.metric]
        rows.append(
            [
                one.row,
                f"{metric.title} {'↑' if metric.up else '↓'}",
                told(one.base, metric.digits),
                told(one.after, metric.digits),
                told(one.change, metric.digits, sign=True),
                told_p(one.p),
            ]
        )
    return head, rows


def set_cells(sets: Sequence[SetScore]) -> tuple[list[str], list[list[str]]]:
    head = ["", "distance of sets (encoder) ↓", "value", "deviation", "images"]
    head.append("what to think of it")
    rows = [
        [
            one.row,
            f"{one.kind} ({one.encoder})",
            f"{one.distance.value:.4g}",
            NONE if math.isnan(one.distance.deviation) else f"{one.distance.deviation:.2g}",
            str(one.distance.count),
            one.distance.warning or NONE,
        ]
        for one in sets
    ]
    return head, rows


def as_text(text: str) -> str:
    """`text` as Markdown shows it: HTML in it, of a name or a prompt, is no HTML.

    >>> as_text("<b>a & b")
    '&lt;b&gt;a &amp; b'
    """
    return escape(" ".join(text.split()), quote=False)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table.

    >>> print(markdown(["a", "b"], [["1", "x|<i>"]]))
    | a | b |
    |---|---|
    | 1 | x\\|&lt;i&gt; |
    """
    escaped = [[as_text(cell).replace("|", "\\|") for cell in row] for row in (head, *rows)]
    first, *others = (f"| {' | '.join(row)} |" for row in escaped)
    return "\n".join([first, "|" + "---|" * len(head), *others])


def as_csv(table: Table) -> str:
    """A row for each row of the table; of each metric four columns: mean, low, high, n."""
    head = ["row", *(t for metric in table.metrics.values() for t in columns(metric.title))]
    rows = [
        [row, *(cell for name in table.metrics for cell in cells_of_figure(figures.get(name)))]
        for row, figures in table.rows.items()
    ]
    return csv_text(head, rows)


def kept_csv(kept: Sequence[Kept], metrics: Mapping[str, Metric]) -> str:
    """A row for each row and metric before and after."""
    figures = ("base", "with the adapter", "change")
    head = ["row", "metric", *(title for name in figures for title in columns(name)), "p"]
    rows = [
        [
            one.row,
            metrics[one.metric].title,
            *(cell for f in (one.base, one.after, one.change) for cell in cells_of_figure(f)),
            one.p,
        ]
        for one in kept
    ]
    return csv_text(head, rows)


def sets_csv(sets: Sequence[SetScore]) -> str:
    """A row for each row of the table and distance of sets."""
    head = ["row", "distance", "encoder", "value", "deviation", "n", "what to think of it"]
    rows = [
        [
            one.row,
            one.kind,
            one.encoder,
            one.distance.value,
            None if math.isnan(one.distance.deviation) else one.distance.deviation,
            one.distance.count,
            one.distance.warning,
        ]
        for one in sets
    ]
    return csv_text(head, rows)


def columns(title: str) -> list[str]:
    return [title + end for end in ("", " low", " high", " n")]


def cells_of_figure(one: Figure | None) -> list[object]:
    record = one.record() if one else {}
    return [record.get(key) for key in ("mean", "low", "high", "count")]


def csv_text(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows([head, *rows])
    return file.getvalue()


def lines_of(found: Sequence[Scored], output: Path) -> list[dict[str, Any]]:
    """`results.jsonl`: one object for each image, paths as seen from the folder `output`."""

    def seen(path: Path | None) -> str | None:
        if path is None:
            return None
        own = path.is_relative_to(output)
        return str(path.relative_to(output) if own else path)

    lines = []
    for one in found:
        shot = one.shot
        line: dict[str, Any] = {
            "image": seen(shot.image),
            "row": shot.row,
            "unit": shot.unit,
            "grid": shot.grid,
            "task": shot.task,
            "role": shot.role,
            "seed": shot.seed,
            "prompt": shot.prompt,
            "truth": seen(shot.truth),
            "scores": one.scores,
        }
        lines.append(line | {k: v for k, v in (("base", one.base), ("drift", one.drift)) if v})
    return lines


def as_jsonl(lines: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
