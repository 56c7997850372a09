"""Curves over steps as SVG."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter
from numpy.typing import NDArray

POINTS = 600  # of a curve; more cannot be told apart

UNNAMED = re.compile(r"_child\d+")  # what matplotlib calls a line that has no label

Lines = Sequence[Mapping[str, Any]]
Numbers = NDArray[np.float64]


def values(lines: Lines, *path: str) -> Numbers:
    """The number at `path` of each line; NaN where a line has none, or null for one not finite."""
    found = []
    for line in lines:
        value: Any = line
        for name in path:
            value = value.get(name, {})
        found.append(np.nan if value is None or value == {} else float(value))
    return np.array(found)


def smooth(y: Numbers, *, share: float = 1 / 30, weights: Numbers | None = None) -> Numbers:
    """A running mean without the lag of its start, over about this share of the finite values; it
    stays where a value is not finite. weights: how much each value counts."""
    keep = 1 - 1 / max(np.isfinite(y).sum() * share, 1.0)
    each = np.ones(len(y)) if weights is None else weights
    total, weight, found = 0.0, 0.0, np.full(len(y), np.nan)
    for k, (value, own) in enumerate(zip(y, each, strict=True)):
        if np.isfinite(value):
            total, weight = keep * total + own * value, keep * weight + own
        found[k] = total / weight if weight else np.nan
    return found


def thinned(x: Numbers, y: Numbers) -> tuple[Numbers, Numbers]:
    """At most `POINTS` of the finite points, the last among them."""
    known = np.isfinite(y)
    x, y = x[known], y[known]
    every = -(-len(x) // POINTS) or 1
    return x[::-1][::every][::-1], y[::-1][::every][::-1]


def picture(title: str, unit: str, draw_on: Callable[[Axes], None]) -> str:
    """One picture as SVG; empty where nothing is drawn on it."""
    figure = Figure(figsize=(6.2, 3.1), layout="constrained")
    axes = figure.subplots()
    draw_on(axes)
    if not axes.lines:
        return ""
    axes.set_title(title, fontsize=11, loc="left")
    axes.set_xlabel("step")
    axes.set_ylabel(unit)
    axes.xaxis.set_major_locator(MaxNLocator(7, integer=True, steps=[1, 2, 5, 10]))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    named = [line for line in axes.lines if not UNNAMED.fullmatch(str(line.get_label()))]
    if named:
        beside: dict[str, Any] = {"loc": "center left", "bbox_to_anchor": (1, 0.5)}
        where = beside if len(named) > 3 else {"loc": "best"}
        labels = [str(line.get_label()) for line in named]
        legend = axes.legend(named, labels, fontsize=8, frameon=False, **where)
        for text in legend.get_texts():
            text.set_parse_math(False)  # a name is no formula
    return svg_of(figure)


def svg_of(figure: Figure) -> str:
    """A picture as it stands in a page: without the head of a file."""
    file = io.StringIO()
    figure.savefig(file, format="svg")
    svg = file.getvalue()
    return svg[svg.index("<svg") :]


def keep_in_view(axes: Axes, y: Numbers, smoothed: Numbers) -> None:
    """Let single outliers of `y` leave the picture, and nothing of `smoothed`."""
    y, smoothed = y[np.isfinite(y)], smoothed[np.isfinite(smoothed)]
    if len(y):
        low = min(np.quantile(y, 0.01), *smoothed)
        high = max(np.quantile(y, 0.99), *smoothed)
        margin = 0.05 * (high - low) or 0.1
        axes.set_ylim(low - margin, high + margin)


def log_scale(axes: Axes) -> None:
    """A logarithmic height with plain numbers, also where it spans less than a power of ten."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def draw(axes: Axes, lines: Lines, name: str, *, unit: float = 1.0) -> None:
    """The figure `name` of each step and, where it is not smooth by itself, its running mean."""
    x, y = values(lines, "step"), values(lines, name) / unit
    if not np.isfinite(y).any():
        return
    smoothed = smooth(y)
    noisy = name not in ("lr", "memory")
    axes.plot(*thinned(x, y), color="C0", alpha=0.25 if noisy else 1, linewidth=0.8 + (not noisy))
    if noisy:
        axes.plot(*thinned(x, smoothed), color="C0")
        keep_in_view(axes, y, smoothed)
