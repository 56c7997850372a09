"""Scores of images as rows of figures, in Markdown, CSV and JSON lines."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visualcloze_deft.evaluation.cases import Shot
from visualcloze_deft.evaluation.score_metrics import Metric, metric_of
from visualcloze_deft.evaluation.scoring import Scores, SetScore
from visualcloze_deft.reporting.numbers import three_digits
from visualcloze_deft.reporting.statistics import Figure, difference, mean_ci, sign_flip_p
from visualcloze_deft.reporting.tables import (
    NONE,
    cells_of_figure,
    columns,
    csv_text,
    figure_text,
    p_text,
)


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
class BeforeAfter:
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
    return mean_ci([one.scores[name] for one in own], [one.shot.unit for one in own])


def before_after_of(found: Sequence[Scored]) -> list[BeforeAfter]:
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
                BeforeAfter(
                    row=row,
                    metric=name,
                    base=mean_ci(before, units),
                    after=mean_ci(after, units),
                    change=difference(after, before, units),
                    p=sign_flip_p(after, before, units),
                )
            )
    return kept


def drift_table(found: Sequence[Scored]) -> Table:
    """Drift by row; empty where the base was not asked."""
    return table_of([Scored(shot=one.shot, scores=one.drift) for one in found if one.drift])


def cells_of(table: Table) -> tuple[list[str], list[list[str]]]:
    """Heading and cells."""
    head = ["", *(f"{m.title} {'↑' if m.up else '↓'}" for m in table.metrics.values())]
    rows = [
        [
            row,
            *(
                figure_text(figures[name], metric.digits) if name in figures else NONE
                for name, metric in table.metrics.items()
            ),
        ]
        for row, figures in table.rows.items()
    ]
    return head, rows


def before_after_cells(
    kept: Sequence[BeforeAfter], metrics: Mapping[str, Metric]
) -> tuple[list[str], list[list[str]]]:
    head = ["", "metric", "base", "with the adapter", "change", "p"]
    rows = []
    for one in kept:
        metric = metrics[one.metric]
        rows.append(
            [
                one.row,
                f"{metric.title} {'↑' if metric.up else '↓'}",
                figure_text(one.base, metric.digits),
                figure_text(one.after, metric.digits),
                figure_text(one.change, metric.digits, sign=True),
                p_text(one.p),
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
            three_digits(one.distance.value),
            NONE if math.isnan(one.distance.deviation) else f"{one.distance.deviation:.2g}",
            str(one.distance.count),
            one.distance.warning or NONE,
        ]
        for one in sets
    ]
    return head, rows


def as_csv(table: Table) -> str:
    """A row for each row of the table; of each metric four columns: mean, low, high, n."""
    head = ["row", *(t for metric in table.metrics.values() for t in columns(metric.title))]
    rows = [
        [row, *(cell for name in table.metrics for cell in cells_of_figure(figures.get(name)))]
        for row, figures in table.rows.items()
    ]
    return csv_text(head, rows)


def before_after_csv(kept: Sequence[BeforeAfter], metrics: Mapping[str, Metric]) -> str:
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
