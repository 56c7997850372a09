"""A run on one page: curves, the last sheet and the settings, in a file that needs no server."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from visualcloze_deft.config.run_settings import Run, load_run
from visualcloze_deft.errors import UserError, printable
from visualcloze_deft.images.reading import read_image
from visualcloze_deft.reporting import page
from visualcloze_deft.reporting.numbers import duration, three_digits
from visualcloze_deft.reporting.plots import (
    Lines,
    Numbers,
    draw,
    keep_in_view,
    log_scale,
    picture,
    smooth,
    thinned,
    values,
)
from visualcloze_deft.storage.atomic import write_text
from visualcloze_deft.storage.jsonl import EvaluationLine, SkippedLine, StepLine, read_lines
from visualcloze_deft.storage.step_names import by_step, step_of
from visualcloze_deft.storage.text_files import read_text
from visualcloze_deft.training import run_folder
from visualcloze_deft.training.validation import why_training_is_higher

REPORT = "report.html"
EXACT = "training loss without scheduled samples"
TASKS = 10  # curves in one picture, those with most examples; the table has all tasks


def write_report(folder: Path) -> Path:
    """Write the page of the run in `folder`, also of one under way; the file appears whole.

    Raises `UserError` where `folder` holds no run, or one that has not taken a step.
    """
    settings = folder / run_folder.SETTINGS
    if not settings.is_file():
        raise UserError(f"{folder}: no run there; name a folder that 'vcdeft train' wrote")
    steps = read_lines(folder / run_folder.METRICS, StepLine)
    if not steps:
        raise UserError(f"{folder}: the run has not taken a step yet")
    evaluations = read_lines(folder / run_folder.EVALUATION, EvaluationLine)
    skipped = read_lines(folder / run_folder.SKIPPED, SkippedLine)
    run = load_run(str(settings))
    above = [*facts(run, steps, evaluations), *kernels(folder)]
    curves = page.Drawings(svgs=pictures(steps, evaluations))
    why = [page.Text(text=text) for text in why_apart(run, steps, evaluations)]
    sections = [
        page.Section(parts=[page.Table(rows=above), *why, curves]),
        page.Section(title="Tasks", parts=[task_table(steps, evaluations)]),
        *last_sheet(folder),
        page.Section(title="Skipped", parts=skipped_parts(skipped)),
        page.Section(title="Settings", parts=[page.Code(text=read_text(settings))]),
    ]
    path = folder / REPORT
    write_text(path, page.page(folder.resolve().name, sections))
    return path


def facts(run: Run, steps: Lines, evaluations: Lines) -> list[tuple[str, str]]:
    """What stands at the top of the page."""
    last, spent = steps[-1], sum(line["seconds"] for line in steps)
    found = [
        ("model", run.model + (f" with {run.model_lora}" if run.model_lora else "")),
        ("adapter", f"{run.adapter.method}, rank {run.adapter.rank}"),
        ("data", ", ".join(run.data.sources)),
        ("steps", f"{last['step']} of {run.steps}, {last['examples']} examples"),
        (
            "time in steps",
            f"{duration(spent)}, {three_digits(last['examples'] / (spent or 1))} examples/s",
        ),
        ("training loss", eighths(*ends(values(steps, "loss")))),
    ]
    if np.isfinite(values(steps, "exact", "loss")).any():
        found.append((EXACT, eighths(*exact_ends(steps))))
    if evaluations:
        first, last_one = evaluations[0], evaluations[-1]
        text = ", ".join(
            f"{three_digits(line['loss'])} at step {line['step']}" for line in (first, last_one)
        )
        found.append(("validation loss", text))
    if last.get("memory") is not None:
        found.append(("memory", f"{three_digits(last['memory'] / 2**30)} GiB at most in a process"))
    return found


def eighths(before: float, now: float) -> str:
    return (
        f"{three_digits(before)} in the first eighth of the steps, {three_digits(now)} in the last"
    )


def why_apart(run: Run, steps: Lines, evaluations: Lines) -> list[str]:
    """Why the training and the validation loss differ, where both stand."""
    if not evaluations:
        return []
    said = why_training_is_higher(run)
    if np.isfinite(values(steps, "exact", "loss")).any():
        said += f" Compare the validation loss with the {EXACT}, which leaves those samples out."
    return [said]


def kernels(folder: Path) -> list[tuple[str, str]]:
    """The attention that the run computes with, why, and where another one failed."""
    recorded = run_folder.recorded(folder)
    if "attention" not in recorded:  # a run of before it was chosen
        return []
    versions = run_folder.VersionsFile(**recorded)
    why = versions.attention_check.removeprefix("attention: ") or versions.attention
    failed = [f"not finite after {where}" for where in versions.not_finite.values()]
    changed = f"now {versions.attention}, norms {versions.norms}"
    return [("attention", "; ".join([why, *failed, changed] if failed else [why]))]


def ends(y: Numbers) -> tuple[float, float]:
    """The means of the first and of the last eighth of the finite values."""
    y = y[np.isfinite(y)]
    part = -(-len(y) // 8)
    return (float(y[:part].mean()), float(y[-part:].mean())) if part else (np.nan, np.nan)


def exact_ends(steps: Lines) -> tuple[float, float]:
    """`ends` of the loss without scheduled samples, each step by its weight."""
    loss, weight = values(steps, "exact", "loss"), values(steps, "exact", "weight")
    known = np.isfinite(loss)
    loss, weight = loss[known], weight[known]
    part = -(-len(loss) // 8)
    first, last = (
        np.average(loss[at], weights=weight[at]) for at in (slice(part), slice(-part, None))
    )
    return float(first), float(last)


def pictures(steps: Lines, evaluations: Lines) -> list[str]:
    """The curves as SVG; those that the run has no numbers for are left out."""
    drawn: list[tuple[str, str, Callable[[Axes], None]]] = [
        ("Loss", "mean squared error", lambda axes: draw_loss(axes, steps, evaluations)),
        ("Loss by task, smoothed", "", lambda axes: draw_tasks(axes, steps)),
        ("Validation loss, mean and by time", "", lambda axes: draw_times(axes, evaluations)),
        ("Learning rate", "", lambda axes: draw(axes, steps, "lr")),
        ("Examples per second", "", lambda axes: draw(axes, rates(steps), "examples_per_second")),
        ("Image tokens per second", "", lambda axes: draw_tokens(axes, steps)),
        ("Waiting", "share of a step", lambda axes: draw_waiting(axes, steps)),
        ("Use of the GPUs' peak", "share", lambda axes: draw(axes, steps, "utilisation")),
        ("Memory", "GiB", lambda axes: draw(axes, steps, "memory", unit=2**30)),
        ("Gradient norm, before clipping", "", lambda axes: draw(axes, steps, "gradient_norm")),
        ("Adapter norms, change since the first", "%", lambda axes: draw_norms(axes, steps)),
    ]
    return [svg for title, unit, draw_on in drawn if (svg := picture(title, unit, draw_on))]


def draw_loss(axes: Axes, steps: Lines, evaluations: Lines) -> None:
    x, y = values(steps, "step"), values(steps, "loss")
    smoothed = smooth(y)
    axes.plot(*thinned(x, y), color="C0", alpha=0.25, linewidth=0.8)
    axes.plot(*thinned(x, smoothed), color="C0", label="training, smoothed")
    exact = values(steps, "exact", "loss")
    if np.isfinite(exact).any():
        exact = smooth(exact, weights=values(steps, "exact", "weight"))
        axes.plot(*thinned(x, exact), color="C1", label="without scheduled samples, smoothed")
        smoothed = np.concatenate([smoothed, exact])
    if evaluations:
        x, held_out = values(evaluations, "step"), values(evaluations, "loss")
        axes.plot(x, held_out, "o-", color="C3", markersize=4, label="validation")
        smoothed = np.concatenate([smoothed, held_out])
    if np.nanmax(smoothed) > 10 * np.nanmin(smoothed):
        log_scale(axes)
    else:
        keep_in_view(axes, y, smoothed)


def draw_tasks(axes: Axes, steps: Lines) -> None:
    x, seen = values(steps, "step"), seen_tasks(steps)
    if len(seen) == 1:  # the loss of all
        return
    for task in [task for task, _ in seen.most_common(TASKS)]:
        y = values(steps, "tasks", task)
        known = np.isfinite(y)
        axes.plot(
            *thinned(x[known], smooth(y[known], share=1 / 8)), linewidth=1.2, label=printable(task)
        )
        log_scale(axes)  # a map is a tenth of a photo's loss


def seen_tasks(steps: Lines) -> Counter[str]:
    """In how many steps each task was seen."""
    return Counter(task for line in steps for task in line["tasks"])


def draw_times(axes: Axes, evaluations: Lines) -> None:
    x = values(evaluations, "step")
    if evaluations:
        axes.plot(x, values(evaluations, "loss"), "o-", color="C3", linewidth=2.5, label="mean")
    for time in evaluations[0]["times"] if evaluations else ():
        axes.plot(x, values(evaluations, "times", time), "--", linewidth=1, label=f"t = {time}")


def rates(steps: Lines) -> Lines:
    """Steps with their rate in examples, also those written before it was."""
    before = [0, *(line["examples"] for line in steps[:-1])]
    return [
        {"examples_per_second": (line["examples"] - seen) / (line["seconds"] or 1), **line}
        for line, seen in zip(steps, before, strict=True)
    ]


def draw_tokens(axes: Axes, steps: Lines) -> None:
    """Nothing where all grids have one size: the curve of examples then shows the same."""
    sizes = values(steps, "tokens_per_second") / values(steps, "examples_per_second")
    sizes = sizes[np.isfinite(sizes)]
    if len(sizes) and np.ptp(sizes) > 1e-3 * sizes.max():
        draw(axes, steps, "tokens_per_second")


def draw_waiting(axes: Axes, steps: Lines) -> None:
    x = values(steps, "step")
    names = {"waiting": "for data, mean", "idle": "for the largest part, planned"}
    for name, label in names.items():
        y = values(steps, name)
        if np.isfinite(y).any():
            axes.plot(*thinned(x, smooth(y)), label=label)
    axes.set_ylim(0, None)


def draw_norms(axes: Axes, steps: Lines) -> None:
    x = values(steps, "step")
    for kind in sorted({kind for line in steps for kind in line.get("norms", ())}):
        y = values(steps, "norms", kind)
        first = y[np.isfinite(y)][0]
        axes.plot(
            *thinned(x, 100 * (y / first - 1)),
            "o-",
            markersize=3,
            label=f"{kind}, first {first:.3g}",
        )


def task_table(steps: Lines, evaluations: Lines) -> page.Table:
    """Each task's losses."""
    head = ["task", "steps", "training, first eighth", "last eighth"]
    head += ["validation, first", "last"] if evaluations else []
    rows = []
    for task, count in seen_tasks(steps).most_common():
        before, now = ends(values(steps, "tasks", task))
        held = values(evaluations, "tasks", task)
        held = held[np.isfinite(held)]
        row = [task, str(count), three_digits(before), three_digits(now)]
        rows.append(row + ([*map(three_digits, held[[0, -1]])] if len(held) else ["", ""]))
    return page.Table(rows=rows, head=head)


def last_sheet(folder: Path) -> list[page.Section]:
    """The newest sample sheet, where there is one."""
    sheets = by_step(folder / run_folder.SHEETS, ".png")
    if not sheets:
        return []
    picture = page.Picture(image=read_image(sheets[-1]), alt="sample sheet")
    words = (
        "Each grid: an example above, the query below. Red frames are generated, from the same "
        "noise by the base and by the adapter."
    )
    steps = [f"{step_of(sheet):,}" for sheet in sheets]
    if earlier := steps[:-1]:
        some = earlier if len(earlier) < 6 else [earlier[0], "...", *earlier[-4:]]
        words += f" Earlier ones lie in the folder {run_folder.SHEETS}: step {', '.join(some)}."
    parts: list[page.Part] = [page.Text(text=words), picture]
    return [page.Section(title=f"Samples at step {steps[-1]}", parts=parts)]


def skipped_parts(skipped: Lines) -> list[page.Part]:
    """What could not be read."""
    if not skipped:
        return [page.Text(text="Every item drawn could be read.")]
    items = Counter((line["source"], line["item"], line["why"]) for line in skipped)
    rows = [(*item, count) for item, count in items.most_common(50)]
    parts: list[page.Part] = [page.Table(rows=rows, head=["source", "item", "why", "times"])]
    if len(items) > 50:
        parts.append(page.Text(text=f"and {len(items) - 50} more in {run_folder.SKIPPED}"))
    return parts
