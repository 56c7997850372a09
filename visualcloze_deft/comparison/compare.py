"""What `vcdeft compare` does: train every method on the same examples, then measure gain on what
is new and retention of what is old.

OUTPUT/compare.toml          what was asked
OUTPUT/runs/NAME/            a folder of `vcdeft train` for each training
OUTPUT/evaluations/NAME/     what each adapter, and the base, was measured to do
OUTPUT/samples.png           what each made of a few grids, see `samples`
OUTPUT/results.jsonl ...     see `report`

What is there is not done again: a call that was ended goes on where it stopped, and one with more
seeds, methods or tasks adds to it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from visualcloze_deft.adapters.metadata import check_base
from visualcloze_deft.comparison.changes import Compared
from visualcloze_deft.comparison.measure import load, measure, query_sets, use
from visualcloze_deft.comparison.records import (
    BASE,
    Measured,
    QuerySet,
    asked_with,
    file_of,
    read_measured,
    write_measured,
)
from visualcloze_deft.comparison.report import write_reports
from visualcloze_deft.comparison.samples import SampleFiles, contact_sheet
from visualcloze_deft.comparison.trainings import RUNS, Training, trainings
from visualcloze_deft.config import overrides
from visualcloze_deft.config.comparison import Comparison, write_comparison
from visualcloze_deft.config.run_settings import load_run
from visualcloze_deft.config.sameness import MAY_DIFFER, differences
from visualcloze_deft.data.mixture import Mixture
from visualcloze_deft.errors import UserError
from visualcloze_deft.runtime.launch import launch, process_count
from visualcloze_deft.runtime.signals import ASKING, exit_status
from visualcloze_deft.storage.adapter_places import TASKS
from visualcloze_deft.storage.atomic import check_foreign
from visualcloze_deft.storage.locks import LOCK, only_writer
from visualcloze_deft.storage.toml_files import read_toml
from visualcloze_deft.training import preparation, resume, run_data, run_folder
from visualcloze_deft.training.files_needed import check_run
from visualcloze_deft.training.summary import steps_in_words

State = Literal["to do", "begun", "finished"]

SETTINGS, INDEX = "compare.toml", "index"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All that a comparison comes to. asked: the tasks, new ones first."""

    comparison: Comparison
    trainings: tuple[Training, ...]
    asked: tuple[QuerySet, ...]
    processes: int

    @property
    def samples(self) -> SampleFiles:
        return SampleFiles(self.comparison)

    @property
    def by_method(self) -> list[Training]:
        """The trainings in the order of the methods."""
        return sorted(self.trainings, key=lambda t: self.comparison.methods.index(t.method))

    @property
    def output(self) -> Path:
        return Path(self.comparison.output)

    def measured(self, training: Training | None, one: QuerySet) -> Measured | None:
        """What an adapter, or the base, was measured to do; None where it was not yet, or its
        pictures are missing."""
        if training is not None and state_of(training) != "finished":
            return None
        if not self.samples.complete(training, one):
            return None
        return read_measured(*self.place(training, one))

    def place(self, training: Training | None, one: QuerySet) -> tuple[Path, dict[str, object]]:
        """Where the figures of an adapter on a task lie, and what they are measured with."""
        name = training.name if training else BASE
        adapter = training.folder / "adapter" if training else None
        wanted = asked_with(self.comparison, self.trainings[0].run, one, adapter)
        return file_of(self.comparison, name, one), wanted

    def unmeasured(self, training: Training | None) -> list[QuerySet]:
        return [one for one in self.asked if self.measured(training, one) is None]


def compare(comparison: Comparison) -> Path:
    """Do all that is not done yet, and write the reports; returns the path of the table."""
    output = Path(comparison.output)
    check_output(output)
    fresh = not output.exists()
    with (
        only_writer(output),
        run_folder.undone_on_failure(output, fresh=fresh),
        ExitStack() as held,
    ):
        plan = planned(comparison, cache=output / INDEX)
        waiting = prepared(plan, held)
        write_comparison(comparison, output / SETTINGS)
        train_all(plan, waiting)
        measure_all(plan)
        sheet = contact_sheet(plan.samples, plan.asked, plan.by_method)
        return write_reports(compared(plan), output, samples=sheet)


def planned(comparison: Comparison, *, cache: Path | None = None) -> Plan:
    """What there is to do. Raises `UserError` where settings or data are wrong, or what is in the
    output folder was made with other settings."""
    output = Path(comparison.output)
    check_output(output)
    found = trainings(comparison)
    mixture = run_data.mixture_of(found[0].run, cache=cache)
    for training in found:
        check_run(training.run)
        preparation.check_settings(training.run)
        check_before(training, mixture)
    return Plan(
        comparison=comparison,
        trainings=tuple(found),
        asked=tuple(query_sets(comparison, found[0].run, cache=cache)),
        processes=process_count(found[0].run.processes),
    )


def check_output(output: Path) -> None:
    """Raise `UserError` where the folder holds anything but a comparison."""
    if not is_comparison(output):
        check_foreign(output, (LOCK, INDEX, RUNS, f".{SETTINGS}.*.part"), what="comparison")
        for folder in sorted((output / RUNS).glob("*")):  # of a call that was ended at once
            run_folder.check_output(folder)


def is_comparison(output: Path) -> bool:
    """Whether `write_comparison` has written into the folder `output`."""
    try:
        return set(read_toml(output / SETTINGS)) >= {"output", "methods", "seeds"}
    except (OSError, UserError):
        return False


def check_before(training: Training, mixture: Mixture) -> None:
    """Raise `UserError` where a training that is there had other settings or task files."""
    settings = training.folder / run_folder.SETTINGS
    if state_of(training) == "to do" or not settings.is_file():
        return
    before, now = (
        overrides.flat(run.model_dump(mode="json"))
        for run in (load_run(str(settings)), training.run)
    )
    for other in differences(before, now, free=MAY_DIFFER["compare"]):
        raise UserError(
            f"{training.folder} was trained with {other.name} = {other.before!r}, now it is "
            f"{other.now!r}; put it back, remove that folder, or choose another output"
        )
    try:
        resume.check_tasks(mixture, training.folder / TASKS)
    except UserError as error:
        raise UserError(f"{training.folder}: {str(error).removeprefix('--resume: ')}") from None


def state_of(training: Training) -> State:
    if (training.folder / "adapter").is_dir():
        return "finished"
    saved = any((training.folder / "checkpoints").glob("step-*"))
    return "begun" if saved else "to do"


def prepared(plan: Plan, held: ExitStack) -> list[Training]:
    """The trainings that are not finished, all checked and with their folders made, which are this
    process's own until `held` ends."""
    waiting = []
    for training in plan.trainings:
        if state_of(training) == "finished":
            continue
        held.enter_context(run_folder.run_lock(training.folder))
        if state_of(training) == "finished":  # by another, meanwhile
            continue
        resume = state_of(training) == "begun"
        preparation.prepare(training.run, processes=plan.processes, resume=resume)
        waiting.append(training)
    return waiting


def train_all(plan: Plan, waiting: list[Training]) -> None:
    """Run `vcdeft train` for each, one after another. Raises `UserError` where one fails."""
    began = time.monotonic()
    for done, training in enumerate(waiting):
        left = (time.monotonic() - began) / done * (len(waiting) - done) if done else None
        rest = f", about {left / 60:.0f} minutes for this and the rest" if left else ""
        place = len(plan.trainings) - len(waiting) + done + 1
        tqdm.write(f"training {place} of {len(plan.trainings)}: {training.name}{rest}")
        words = ["train", "--config", str(training.folder / run_folder.SETTINGS)]
        if state_of(training) == "begun":
            words.append("--resume")
        status = launch(words, processes=plan.processes)
        if status in map(exit_status, ASKING):
            raise SystemExit(status)
        if status or state_of(training) != "finished":
            raise UserError(
                f"training {training.name} failed (exit status {status}), for the reason above; "
                "the same command goes on with it"
            )


def measure_all(plan: Plan) -> None:
    """Ask the base and every adapter all tasks that they were not asked yet."""
    todo = [(one, plan.unmeasured(one)) for one in (None, *plan.trainings)]
    total = sum(len(tasks) for _, tasks in todo)
    if not total:
        return
    run = plan.trainings[0].run
    for training in plan.trainings:
        check_base(training.folder / "adapter", run.model, lora=run.model_lora)
    pipe = load(run)
    with tqdm(total=total, desc="measuring", unit="task") as bar:
        for adapter, tasks in todo:
            if tasks:
                use(pipe, adapter)
            for one in tasks:
                bar.set_postfix_str(f"{adapter.name if adapter else BASE}: {one.task.name}")
                path, wanted = plan.place(adapter, one)
                measured, answers = measure(pipe, run, one, plan.comparison.evaluate)
                plan.samples.write(adapter, one, answers)
                write_measured(path, measured, wanted)
                bar.update()


def compared(plan: Plan) -> list[Compared]:
    """What was measured: a value for each method, rank, seed and task, in their order."""
    found = []
    for training in plan.by_method:
        for one in plan.asked:
            before, after = plan.measured(None, one), plan.measured(training, one)
            assert before is not None
            assert after is not None
            found.append(
                Compared(
                    training=training,
                    group=one.group,
                    task=one.task.name,
                    before=before,
                    after=after,
                )
            )
    return found


def described(plan: Plan) -> Iterator[str]:
    """What `--dry-run` says."""
    comparison, run = plan.comparison, plan.trainings[0].run
    width = max(len(one.name) for one in plan.trainings)
    budget = next(one.parameters for one in plan.trainings if one.method == comparison.methods[0])
    yield f"{'training':{width}}  {'matched by':16}  rank  parameters  of the first's"
    for training in plan.trainings:
        by = " and ".join(training.matches)
        left = len(plan.unmeasured(training))
        yield (
            f"{training.name:{width}}  {by:16}  {training.rank:4}  {training.parameters:10,}  "
            f"{training.parameters / budget:13.1%}  {state_of(training)}, "
            f"{len(plan.asked) - left} of {len(plan.asked)} tasks measured"
        )
    waiting = sum(state_of(one) != "finished" for one in plan.trainings)
    each = steps_in_words(run, plan.processes)
    yield f"{waiting} of {len(plan.trainings)} trainings to do, each {each}"
    left = sum(len(plan.unmeasured(one)) for one in (None, *plan.trainings))
    yield (
        f"{left} of {(len(plan.trainings) + 1) * len(plan.asked)} times a task to measure, "
        f"{comparison.evaluate.steps} sampling steps"
    )
    for group in comparison.groups:
        own = [one for one in plan.asked if one.group == group]
        names = ", ".join(one.task.name for one in own)
        yield f"{group}  {own[0].grids} grids each: {names}"
