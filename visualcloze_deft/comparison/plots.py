"""Pictures of a comparison: gain against retention, losses over steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from visualcloze_deft.adapters.method_table import METHODS
from visualcloze_deft.comparison.changes import (
    MEASURES,
    ONE_SEED,
    PERCENT,
    Measure,
    changes,
    distinct_values,
    entrants,
    groups_of,
    matches,
    matching_lines,
    one_seed,
)
from visualcloze_deft.config.run_settings import Method
from visualcloze_deft.reporting.plots import Lines, Numbers, smooth, thinned, values
from visualcloze_deft.reporting.random_effects import estimate


def colour_of(method: str) -> str:
    """Of a method, by the name in a results file."""
    return METHODS[cast(Method, method)].colour


def fields(lines: Lines) -> dict[str, dict[tuple[str, int], Lines]]:
    """Matches -> who takes part. Matches of the same entrants are one: their charts are equal."""
    found: dict[tuple[tuple[str, int], ...], list[str]] = {}
    for match in matches(lines):
        found.setdefault(tuple(sorted(entrants(lines, match))), []).append(match)
    return {" and ".join(same): entrants(lines, same[0]) for same in found.values()}


def draw_scatter(lines: Lines) -> Figure:
    """Gain against retention, or gain alone: a panel for each match and measure; small points are
    seeds, where there are several."""
    every, groups = fields(lines), groups_of(lines)
    height = 4.4 if len(groups) > 1 else 1.2 + 0.4 * max(map(len, every.values()))
    figure = Figure(figsize=(6.2 * len(MEASURES), height * len(every)), layout="constrained")
    panels = figure.subplots(len(every), len(MEASURES), squeeze=False)
    for (match, told), of_match in zip(every.items(), panels, strict=True):
        for measure, axes in zip(MEASURES, of_match, strict=True):
            for place, own in enumerate(told.values()):
                draw_method(axes, own, measure, place)
            axes.axvline(0, color="#888", linewidth=0.8)
            axes.set_xlabel(f"gain on the new, {measure.name} [{measure.unit}]")
            axes.set_title(f"matched by {match}", fontsize=11, loc="left")
            axes.grid(alpha=0.25)
            if len(groups) > 1:
                axes.axhline(0, color="#888", linewidth=0.8)
                axes.set_ylabel(f"retention of the old [{measure.unit}]")
                axes.legend(fontsize=8, frameon=False)
            else:
                axes.set_yticks(range(len(told)), [named(*entrant) for entrant in told])
                axes.set_ylim(len(told) - 0.5, -0.5)
    if one_seed(lines):
        figure.supxlabel(
            f"{ONE_SEED} Bars: the {PERCENT} interval for other grids alone.", fontsize=9
        )
    return figure


def named(method: str, rank: int) -> str:
    return f"{method}, rank {rank}"


def draw_method(axes: Axes, own: Lines, measure: Measure, place: int) -> None:
    """One method's point with its intervals, and those of its seeds. place: its height, where
    there is gain alone."""
    method, rank = own[0]["method"], own[0]["rank"]
    shown, at, bars, seeds = np.vectorize(measure.shown), [], [], []
    for group in groups_of(own):
        found = changes(matching_lines(own, group=group), measure)
        one = estimate(found)
        low, mean, high = (measure.shown(value) for value in (one.low, one.mean, one.high))
        at.append(mean)
        bars.append([[max(mean - low, 0)], [max(high - mean, 0)]])
        seeds.append(shown(found.mean(axis=1)))
    if len(at) == 1:
        at.append(place)
        bars.append([[0], [0]])
        seeds.append(np.full(len(seeds[0]), place))
    if not one_seed(own):
        axes.plot(*seeds, ".", color=colour_of(method), alpha=0.5, markersize=5)
    style: dict[str, Any] = {
        "fmt": "o",
        "color": colour_of(method),
        "capsize": 3,
        "label": named(method, rank),
    }
    axes.errorbar([at[0]], [at[1]], xerr=bars[0], yerr=bars[1], **style)


def draw_curves(lines: Lines, steps: Mapping[str, Lines]) -> Figure:
    """Training losses, mean over seeds and smoothed, and their difference to the first method's:
    every method sees the same examples with the same noise, so that the noise goes with it."""
    every = fields(lines)
    figure = Figure(figsize=(12.4, 3.6 * len(every)), layout="constrained")
    panels = figure.subplots(len(every), 2, squeeze=False)
    for (match, own), (left, right) in zip(every.items(), panels, strict=True):
        known = alike({method: mean_loss(told, steps) for (method, _), told in own.items()})
        first = next(iter(known))
        for method, loss in known.items():
            x = np.arange(1.0, len(loss) + 1)
            style: dict[str, Any] = {
                "color": colour_of(method),
                "label": method,
                "linewidth": 1.2,
            }
            left.plot(*thinned(x, smooth(loss, share=1 / 15)), **style)
            if len(known) > 1:
                right.plot(*thinned(x, smooth(loss - known[first], share=1 / 15)), **style)
        left.set_title(f"Training loss, matched by {match}", fontsize=11, loc="left")
        right.set_title(f"The same minus {first}'s", fontsize=11, loc="left")
        if len(known) == 1:  # which would show nothing but 0
            right.remove()
        for axes in (left, right)[: len(known)]:
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
