"""What a run will do, in the lines that `vcdeft train` prints before it starts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from visualcloze_deft.config.run_settings import Recipe, Run
from visualcloze_deft.data.base import Source, unit_count
from visualcloze_deft.data.eligible import unused_sources
from visualcloze_deft.data.mixture import Mixture
from visualcloze_deft.data.unpaired import OWN, missing_tasks
from visualcloze_deft.planning.machine import memory_here
from visualcloze_deft.planning.memory import plan_here
from visualcloze_deft.reporting.numbers import counted_as
from visualcloze_deft.task_registry.files import load_tasks
from visualcloze_deft.training.memory_report import in_short
from visualcloze_deft.training.preparation import load_in, plan_of, to_plan
from visualcloze_deft.training.subject import remarks_on_subject
from visualcloze_deft.training.task_weights import weights_of

PRIOR = "prior preservation"  # the group of examples of a subject's class
USUAL = 10  # one item in so many is held out, where there are as many
MOST = 0.6  # share of one group from which on a run is mostly about it


def summary_of(run: Run, mixture: Mixture, *, processes: int) -> Iterator[str]:
    """Model, data, what is drawn how often, what is hidden, steps, memory."""
    yield f"model    {run.model}   adapter {run.adapter.method}, rank {run.adapter.rank}"
    yield f"data     {', '.join(run.data.sources)}"
    yield from (f"         {line}" for line in remarks_on_data(run, mixture))
    yield from table_of_draws(mixture)
    yield from (f"         {line}" for line in remarks_on_tasks(run, mixture))
    yield f"hidden   {hidden_cells(run.data.recipe)}"
    yield f"training {steps_in_words(run, processes)}, ZeRO-{run.zero}"
    yield f"samples  {samples_in_words(run)}"
    yield f"output   {run.output}; the share of each task is in versions.json"
    memory = plan_here(to_plan(run), load_in(run, mixture), processes=processes)
    yield from in_short(memory, memory_here(processes))
    if run.batch_tokens:
        yield f"         {waiting(run, mixture, processes)}"


@dataclass(frozen=True, kw_only=True)
class GroupDraws:
    """One line of the table. share: of all examples, 0 to 1. items: the most of any task."""

    group: str
    share: float
    tasks: int
    items: int


def draws_of(mixture: Mixture) -> list[GroupDraws]:
    """How often each group of tasks is drawn, the most frequent first."""
    shares: dict[str, list[float]] = defaultdict(list)
    items: dict[str, int] = defaultdict(int)
    of_class = mixture.prior.share if mixture.prior else 0.0
    for prior in mixture.whole[1:]:
        shares[PRIOR].append(of_class)
        items[PRIOR] = sum(map(len, prior.sources))
    for task, share in zip(mixture.tasks.values(), mixture.proportions, strict=True):
        shares[task.group].append(float(share) * (1 - of_class))
        here = sum(len(able) for able in mixture.serving[task.name])
        items[task.group] = max(items[task.group], here)
    found = [
        GroupDraws(group=group, share=sum(each), tasks=len(each), items=items[group])
        for group, each in shares.items()
    ]
    return sorted(found, key=lambda draws: (-draws.share, draws.group))


def table_of_draws(mixture: Mixture) -> Iterator[str]:
    yield "draws     share  tasks    items  group"
    for one in draws_of(mixture):
        yield f"         {one.share:6.1%}  {one.tasks:5}  {one.items:7}  {one.group}"


def remarks_on_data(run: Run, mixture: Mixture) -> Iterator[str]:
    """Sources that are of no use, roles that no task pairs, and that nothing is held out."""
    yield from remarks_on_subject(run, mixture)
    known = load_tasks(map(Path, run.data.task_folders))
    for source in unused_sources(mixture.tasks, mixture.sources):
        yield f"{source.name} has nothing that these tasks are trained on"
    for source in mixture.sources:
        yield from missing_tasks(source, known)
    if not run.data.validation_every:
        yield from how_to_hold_out([s for s in mixture.sources if s.name == OWN])


def how_to_hold_out(folders: Sequence[Source]) -> Iterator[str]:
    """What to set to keep items out of training, where a user's folders have some to spare."""
    every = min([USUAL, *map(unit_count, folders)])
    if folders and every > 1:
        yield (
            f"nothing is held out: --validation-every {every} keeps one item in {every} for "
            "samples and vcdeft eval"
        )


def remarks_on_tasks(run: Run, mixture: Mixture) -> Iterator[str]:
    """A group that has most of the examples, and tasks that are not drawn."""
    draws = draws_of(mixture)
    if len(draws) > 1 and draws[0].share >= MOST:
        yield f"{draws[0].group} has most of it: {how_to_draw_less(draws[0], mixture)}"
    weights = weights_of(run, load_tasks(map(Path, run.data.task_folders)))
    if unweighted := sum(not weight for weight in weights.values()):
        yield f"{unweighted} more have weight 0 here; --tasks NAME trains one"
    left_out = [n for n, weight in weights.items() if weight and n not in mixture.tasks]
    if left_out:
        named = f": {', '.join(left_out)}" if len(left_out) < 5 else ""
        yield f"{len(left_out)} more are left out, for no data has their roles{named}"


def how_to_draw_less(one: GroupDraws, mixture: Mixture) -> str:
    """What to set for it. The name of a group that one of its tasks has, too, means that task."""
    if one.group == PRIOR:
        return "a lower subject.class_weight draws it less"
    named = f"{one.group}/*" if one.tasks > 1 and one.group in mixture.tasks else one.group
    key = named if named == one.group else f'"{named}"'
    return (
        f"--set 'data.weights={{{key} = 0.2}}' draws it less, --tasks 'all,-{named}' leaves it out"
    )


def hidden_cells(recipe: Recipe) -> str:
    """Which cells of a training example the model has to generate."""
    if recipe.hide_target == 1:
        return "the targets of the task, in every example"
    return (
        f"the targets of the task in {recipe.hide_target:.0%} of the examples, any one column in "
        "the others; data.recipe.hide_target = 1 hides targets alone"
    )


def steps_in_words(run: Run, processes: int) -> str:
    """How many steps, and the grids of each.

    >>> steps_in_words(Run(steps=200, batch=8), 2)
    '200 steps of 16 grids: 8 grids on each of 2 processes'
    >>> steps_in_words(Run(steps=200, batch=8), 1)
    '200 steps of 8 grids on 1 process'
    >>> steps_in_words(Run(steps=200, batch=1, accumulate=8), 1)
    '200 steps of 8 grids: 8 times 1 grid on 1 process'
    >>> steps_in_words(Run(steps=9, batch_tokens=4000), 2)
    '9 steps: up to 4,000 tokens on each of 2 processes'
    """
    where = f"on each of {processes} processes" if processes > 1 else "on 1 process"
    times = f"{run.accumulate} times " if run.accumulate > 1 else ""
    if run.batch_tokens:
        return f"{run.steps:,} steps: {times}up to {run.batch_tokens:,} tokens {where}"
    part = counted_as(run.batch, "grid")
    whole = counted_as(run.batch * run.accumulate * processes, "grid")
    if part == whole:
        return f"{run.steps:,} steps of {whole} {where}"
    return f"{run.steps:,} steps of {whole}: {times}{part} {where}"


def samples_in_words(run: Run) -> str:
    """Which sample sheets a run makes."""
    if not run.sample_grids:
        return "no sample sheets"
    between = f", every {run.sample_every:,} steps" if run.sample_every else ""
    grids = counted_as(run.sample_grids, "grid")
    return f"up to {grids} before the first step{between}, and at the end"


def waiting(run: Run, mixture: Mixture, processes: int) -> str:
    """Grids of a batch, and how long processes wait for the largest, over the first steps."""
    steps = list(islice(plan_of(run, mixture, processes=processes).steps(0), 20))
    grids = [step.examples / len(step.parts) for step in steps]
    idle = sum(step.idle for step in steps) / len(steps)
    span = f"{min(grids):.1f} to {max(grids):.1f}"
    return f"{span} grids a batch, {idle:.1%} of the time waiting for the largest"
