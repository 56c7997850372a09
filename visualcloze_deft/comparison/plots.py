"""Pictures of a comparison: gain against retention, losses over steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from visualcloze_deft.adapters.method_table import METHODS
from visualcloze_deft.comparison.tables import (
    GROUPS,
    MEASURES,
    Measure,
    changes,
    distinct_values,
    entrants,
    matches,
    matching_lines,
)
from visualcloze_deft.config.run_settings import Method
from visualcloze_deft.reporting.plots import Lines, Numbers, smooth, thinned, values
from visualcloze_deft.reporting.random_effects import Estimate, estimate


def colour_of(method: str) -> str:
    """Of a method, by the name in a results file."""
    return METHODS[cast(Method, method)].colour


def draw_scatter(lines: Lines) -> Figure:
    """Gain against retention: a panel for each match and measure; small points are seeds."""
    every = matches(lines)
    figure = Figure(figsize=(6.2 * len(MEASURES), 4.4 * len(every)), layout="constrained")
    panels = figure.subplots(len(every), len(MEASURES), squeeze=False)
    for match, of_match in zip(every, panels, strict=True):
        for measure, axes in zip(MEASURES, of_match, strict=True):
            for own in entrants(lines, match).values():
                ends = [
                    estimate(changes(matching_lines(own, group=group), measure)) for group in GROUPS
                ]
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
    new, old = (changes(matching_lines(own, group=group), measure).mean(axis=1) for group in GROUPS)
    shown = np.vectorize(measure.shown)
    axes.plot(shown(new), shown(old), ".", color=colour_of(method), alpha=0.5, markersize=5)
    (x, y), bars = ([measure.shown(one.mean) for one in ends], [])
    for one in ends:
        low, mean, high = (measure.shown(value) for value in (one.low, one.mean, one.high))
        bars.append([[max(mean - low, 0)], [max(high - mean, 0)]])
    label = f"{method}, rank {rank}"
    style: dict[str, Any] = {
        "fmt": "o",
        "color": colour_of(method),
        "capsize": 3,
        "label": label,
    }
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
            style: dict[str, Any] = {
                "color": colour_of(method),
                "label": method,
                "linewidth": 1.2,
            }
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
    every = alike({run: values(steps[run], "loss") for run in distinct_values(lines, "run")})
    return np.mean([*every.values()], axis=0)


def alike(losses: Mapping[str, Numbers]) -> dict[str, Numbers]:
    """Curves of one length: the last line of a run may have been cut short."""
    shortest = min(map(len, losses.values()))
    return {name: loss[:shortest] for name, loss in losses.items()}
