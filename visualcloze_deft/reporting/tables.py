"""Figures as text: cells with intervals, Markdown, CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from html import escape

from visualcloze_deft.reporting.numbers import rounded
from visualcloze_deft.reporting.statistics import Figure

NONE = "-"


def figure_text(one: Figure, digits: int, *, sign: bool = False) -> str:
    """A figure in words, with three digits. digits: after the point at most.

    >>> figure_text(Figure(mean=0.83, low=0.8, high=0.862, count=64), 3)
    '0.830 (0.800 to 0.862, n 64)'
    >>> figure_text(Figure(mean=2.5, low=math.nan, high=math.nan, count=1), 1, sign=True)
    '+2.5 (n 1)'
    >>> figure_text(Figure(mean=24.76, low=20.13, high=30.0, count=9), 2)
    '24.8 (20.1 to 30.0, n 9)'
    """
    mean, low, high = (
        rounded(value, places=digits, sign=sign) for value in (one.mean, one.low, one.high)
    )
    return (
        f"{mean} (n {one.count})"
        if math.isnan(one.low)
        else f"{mean} ({low} to {high}, n {one.count})"
    )


def p_text(p: float) -> str:
    """A probability in words; no p is nought.

    >>> p_text(0.0004), p_text(0.04)
    ('< 0.001', '0.040')
    """
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


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


def columns(title: str) -> list[str]:
    return [title + end for end in ("", " low", " high", " n")]


def cells_of_figure(one: Figure | None) -> list[object]:
    record = one.record() if one else {}
    return [record.get(key) for key in ("mean", "low", "high", "count")]


def csv_text(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows([head, *rows])
    return file.getvalue()
