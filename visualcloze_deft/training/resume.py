"""Whether a run may go on: what may differ from before, and what it takes again."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from visualcloze_deft.config.overrides import flat
from visualcloze_deft.config.run_settings import Run, load_run, setting_names
from visualcloze_deft.config.sameness import MAY_DIFFER, differences
from visualcloze_deft.data.mixture import Mixture
from visualcloze_deft.errors import UserError, suggestion
from visualcloze_deft.storage.atomic import write_text
from visualcloze_deft.storage.jsonl import step_of
from visualcloze_deft.storage.text_files import read_text
from visualcloze_deft.task_registry.files import is_same, read_tasks
from visualcloze_deft.training.batch_schedule import BatchSchedule
from visualcloze_deft.training.checkpoint import Progress, newest
from visualcloze_deft.training.run_folder import (
    EVALUATION,
    METRICS,
    SETTINGS,
    SKIPPED,
    items_of,
    recorded,
)

DECIDED = (
    "zero",
    "gradient_checkpointing",
)  # settings that `prepare` chooses where they are "auto"
DIVIDED = ("batch", "batch_tokens")  # settings that it may divide anew among processes
FIXED = ("model", "adapter.", "seed", "ema")  # what may never change: it is in the checkpoint


def check_resumed(
    run: Run, progress: Progress, plan: BatchSchedule, allowed: Collection[str]
) -> None:
    """Raise `UserError` unless the run goes on as what it was, with the next examples, but for the
    settings `allowed` to change."""
    known = setting_names()
    for name in allowed:
        if name not in known:
            raise UserError(f"--allow-change {name!r}: no such setting; {suggestion(name, known)}")
        if name.startswith(FIXED):
            raise UserError(
                f"--allow-change {name}: what was trained so far is for one model, adapter and "
                "order of examples; start another --output, with adapter.init_from to go on from it"
            )
    before = flat(load_run(str(Path(run.output) / SETTINGS)).model_dump(mode="json"))
    now = flat(run.model_dump(mode="json"))
    for other in differences(before, now, free=MAY_DIFFER["train --resume"] | {*allowed}):
        raise UserError(
            f"--resume: {other.name} was {other.before!r}, now it is {other.now!r}; leave it as it "
            f"was, start another --output, or say --allow-change {parent(other.name)}"
        )
    if (plan.size, run.seed) != (progress.global_batch, progress.seed):
        what = "tokens" if run.batch_tokens else "grids"
        raise UserError(
            f"--resume: the run takes {progress.global_batch} {what} a step with seed "
            f"{progress.seed}; now it would take {plan.size} with seed {run.seed}. Choose --batch, "
            "--processes and accumulate so that their product stays"
        )
    if run.steps < progress.step:
        raise UserError(f"--resume: the run is at step {progress.step}, --steps is {run.steps}")


def parent(name: str) -> str:
    """The setting that a dotted name belongs to: an entry of a table goes by the table's name."""
    known = setting_names()
    while name not in known and "." in name:
        name = name.rpartition(".")[0]
    return name


def divided(run: Run, *, processes: int) -> Run:
    """A run that goes on with `processes` processes: as many grids or tokens a step as before.

    Raises `UserError` where they cannot be divided so.
    """
    progress = newest(Path(run.output) / "checkpoints")[0].progress
    name = "batch_tokens" if run.batch_tokens else "batch"
    each, rest = divmod(progress.global_batch, processes * run.accumulate)
    if rest:
        raise UserError(
            f"--resume: {progress.global_batch} {name} a step cannot be divided among {processes} "
            f"processes x {run.accumulate} accumulated batches; choose another --processes or "
            "accumulate"
        )
    return run.model_copy(update={name: each})


def check_tasks(mixture: Mixture, before: Path) -> None:
    """Raise `UserError` unless the tasks and what their files say are what the run began with."""
    if odd := sorted(set(mixture.tasks) ^ {path.stem for path in before.glob("*.toml")}):
        raise UserError(
            f"--resume: the run began with other tasks; {odd[0]} is there only before or only now. "
            f"Name those in {before} with --tasks, or start another --output"
        )
    for name, task in mixture.tasks.items():
        kept = before / f"{name}.toml"
        if not any(is_same(task, one) for one in read_tasks(kept)):
            raise UserError(
                f"--resume: task {name} of {task.path} has changed since the run began ({kept}); "
                "put it back or start another --output"
            )


def check_items(mixture: Mixture, output: Path) -> None:
    """Raise `UserError` where a source has other items than when the run in `output` began: others
    would be drawn, and those that it held out are trained on. Older runs do not say."""
    before = recorded(output).get("items", [])
    sources = [source for one in mixture.whole for source in one.sources]
    for source, then, now in zip(sources, before, items_of(mixture), strict=False):
        if then != now:
            raise UserError(
                f"--resume: {source.name} has {now} items, and had {then} when the run began; "
                "put its files back, start another --output with adapter.init_from, or say "
                "--allow-change data.sources"
            )


def keep_lines_until(output: Path, step: int) -> None:
    """Drop the lines of steps that a resumed run will take again."""
    for path in (output / METRICS, output / SKIPPED, output / EVALUATION):
        if path.exists():
            lines = read_text(path).split("\n")
            kept = "".join(f"{line}\n" for line in lines if step_of(line) <= step)
            write_text(path, kept)
