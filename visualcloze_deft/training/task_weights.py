"""How often each task is drawn: every group counts the same, unless weights say otherwise."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from visualcloze_deft.config.run_settings import Data, Run
from visualcloze_deft.errors import UserError
from visualcloze_deft.task_registry.select import matching, select, way_out
from visualcloze_deft.task_registry.task import Task


def weights_of(run: Run, known: Mapping[str, Task]) -> dict[str, float]:
    """What each task of the run counts, before groups are balanced; 0 leaves it out.

    Where two keys of `data.weights` name one task the later counts; a group or pattern there does
    not weigh what `data.tasks` names by its own name.
    """
    named = parts_of(run.data.tasks)
    given: dict[str, float] = {}
    for key, weight in run.data.weights.items():
        names = matching(known, key)
        if not names:
            raise UserError(f"data.weights names {key!r}; {way_out(key, known)}")
        given |= {name: weight for name in names if name == key or name not in named}
    return {n: said * given.get(n, 1.0) for n, said in select(known, run.data.tasks).items()}


def balanced(
    weights: Mapping[str, float], tasks: Mapping[str, Task], data: Data
) -> dict[str, float]:
    """The weights of `tasks` such that each of their groups counts as one task would.

    A task that `data.tasks` or `data.weights` calls by its own name counts by itself.
    """
    alone = {*parts_of(data.tasks), *data.weights}
    sizes = Counter(task.group for name, task in tasks.items() if name not in alone)
    return {
        name: weights[name] / (1 if name in alone else sizes[task.group])
        for name, task in tasks.items()
    }


def parts_of(tasks: str) -> list[str]:
    """The names, groups and patterns in `data.tasks`, without their weights."""
    return [part.partition("=")[0].strip() for part in tasks.split(",")]
