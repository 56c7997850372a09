"""What a run folder says of its adapter, in public words: no path of this machine is among it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visualcloze_deft.backbones.model_files import public_name
from visualcloze_deft.backbones.peft_files import adapter_settings, read_metadata
from visualcloze_deft.config.run_settings import Run, load_run
from visualcloze_deft.config.source_specs import name_and_place
from visualcloze_deft.errors import UserError
from visualcloze_deft.publishing.bases import PublicBase, public_base
from visualcloze_deft.storage.adapter_places import ADAPTER, CONFIG, TASKS
from visualcloze_deft.storage.jsonl import EvaluationLine, StepLine, read_lines
from visualcloze_deft.storage.step_names import by_step
from visualcloze_deft.task_registry.files import read_tasks
from visualcloze_deft.task_registry.task import Task
from visualcloze_deft.training import run_folder

METHODS = {"deft": "DEFT", "deft-relaxed": "relaxed DEFT", "para": "PaRa", "lora": "LoRA"}


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What a run trained, on what and how far.

    shares: how often each task was drawn, 0..1. steps, examples: that the adapter has seen.
    validation: the first and the last line of `evaluation.jsonl`; none where nothing was held out.
    """

    folder: Path
    run: Run
    base: PublicBase
    lora: str
    tasks: Sequence[Task]
    shares: Mapping[str, float]
    steps: int
    examples: int
    validation: Sequence[Mapping[str, Any]]
    versions: Mapping[str, str]

    @property
    def adapter(self) -> Path:
        return self.folder / ADAPTER

    @property
    def method(self) -> str:
        return METHODS[self.run.adapter.method]

    @property
    def groups(self) -> dict[str, list[Task]]:
        """The tasks by group, those with the largest share first."""
        found: dict[str, list[Task]] = {}
        for task in self.tasks:
            found.setdefault(task.group, []).append(task)
        return dict(sorted(found.items(), key=lambda pair: -self.share(pair[1])))

    def share(self, tasks: Sequence[Task]) -> float:
        return sum(self.shares.get(task.name, 0.0) for task in tasks)

    @property
    def sheet(self) -> Path | None:
        """The newest sample sheet."""
        return next(reversed(by_step(self.folder / run_folder.SHEETS, ".png")), None)


def facts_of(folder: Path, *, base: str | None) -> RunFacts:
    """What the run folder `folder` says. base: the id of its base on the hub, for a local one.

    Raises `UserError` where it is no run folder, or the run has not finished.
    """
    settings = folder / run_folder.SETTINGS
    if not settings.is_file():
        raise UserError(f"{folder}: no run there; name a folder that 'vcdeft train' wrote")
    if not (folder / ADAPTER / CONFIG).is_file():
        raise UserError(
            f"{folder}: no adapter there yet, which a run writes at its end; finish it with "
            f"'vcdeft train --output {folder} --resume'"
        )
    adapter_settings(folder / ADAPTER)
    run = load_run(str(settings))
    steps = read_lines(folder / run_folder.METRICS, StepLine)
    if not steps:
        raise UserError(f"{folder / run_folder.METRICS}: missing or empty; a run writes it")
    check_step(folder, steps[-1]["step"])
    measured = read_lines(folder / run_folder.EVALUATION, EvaluationLine)
    recorded = run_folder.recorded(folder)
    of_tasks = 1 - run.subject.class_share
    return RunFacts(
        folder=folder,
        run=run,
        base=public_base(run.model, base),
        lora=public_name(run.model_lora or ""),
        tasks=tasks_of(folder),
        shares={n: of_tasks * p for n, p in recorded.get("task_proportions", {}).items()},
        steps=steps[-1]["step"],
        examples=steps[-1]["examples"],
        validation=[measured[0], measured[-1]] if measured else [],
        versions={
            name: version
            for name in run_folder.PACKAGES
            if isinstance(version := recorded.get(name), str) and version != run_folder.MISSING
        },
    )


def check_step(folder: Path, step: int) -> None:
    """Raise `UserError` where the run in `folder` has gone on since it wrote its adapter: figures
    and samples are of `step` then, and the adapter is not."""
    told = read_metadata(folder / ADAPTER).get("step", "")
    if told not in ("", str(step)):
        raise UserError(
            f"{folder}: its adapter is of step {told}, and the run has gone on to step {step}; "
            f"finish it with 'vcdeft train --output {folder} --resume'"
        )


def tasks_of(folder: Path) -> list[Task]:
    """The tasks that the run in a folder was trained on."""
    own = folder / ADAPTER / TASKS
    found = own if own.is_dir() else folder / TASKS
    tasks = [task for path in sorted(found.glob("*.toml")) for task in read_tasks(path)]
    if not tasks:
        raise UserError(f"{found}: no task file there; a run writes one for each of its tasks")
    return tasks


def sources_of(run: Run) -> str:
    """The sources of the data by name, with their number where several have one name."""
    counts = Counter(name_and_place(spec)[0] for spec in run.data.sources)
    return ", ".join(name if n == 1 else f"{name} ({n})" for name, n in counts.items())


def settings_of(facts: RunFacts) -> list[tuple[str, str]]:
    """The settings that a reader needs to judge the adapter, or to train it again."""
    run, data, adapter = facts.run, facts.run.data, facts.run.adapter
    side = "the base's own" if data.resolution == "model" else f"{data.resolution} pixels"
    part = f"{run.batch_tokens} tokens" if run.batch_tokens else f"{run.batch} grids"
    rate = f"{run.optimiser.lr:g}, {run.optimiser.schedule}"
    made = [
        ("adapter", f"{facts.method}, rank {adapter.rank}"),
        ("base", facts.base.words + (f", with the LoRA {facts.lora} merged" if facts.lora else "")),
        ("data", sources_of(run)),
        ("tasks", str(len(facts.tasks))),
        ("steps", f"{facts.steps}, {facts.examples} examples in all"),
        ("batch", f"{part} per process"),
        ("learning rate", rate),
        ("cells", f"{data.cells}; resolution: {side}"),
        ("text for CLIP", run.clip_text),
        ("seed", str(run.seed)),
    ]
    subject = run.subject
    class_share = f"{subject.class_share:.0%} of the examples"
    changed = {
        "prior preservation": f"{name_and_place(subject.class_data)[0]}, {class_share}"
        if subject.class_data
        else None,
        "batches before a step": run.accumulate if run.accumulate > 1 else None,
        "alpha": adapter.alpha,
        "dropout": adapter.dropout or None,
        "layers": adapter.target_modules if adapter.target_modules != "default" else None,
        "started from": public_name(adapter.init_from) if adapter.init_from else None,
        "running average": run.ema or None,
        "base kept in": run.quantise if run.quantise != "none" else None,
        "guidance": run.guidance if run.guidance != 1 else None,
        "scheduled sampling": run.scheduled_sampling or None,
        "computed roles": ", ".join(data.annotate) or None,
        "held out": f"every {data.validation_every}th item" if data.validation_every else None,
    }
    return made + [(name, str(value)) for name, value in changed.items() if value is not None]
