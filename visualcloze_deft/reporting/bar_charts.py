"""Bars with intervals."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure as Drawing

from visualcloze_deft.errors import printable
from visualcloze_deft.reporting.statistics import Figure

OURS, BASE = "#2b6cb0", "#b0b0b0"


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
