"""The data of a run: tasks, sources, weights and resolution from its settings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from visualcloze_deft.backbones.table import backbone_of
from visualcloze_deft.config.run_settings import Run
from visualcloze_deft.config.seeds import OTHER_SCENES
from visualcloze_deft.config.source_specs import is_endless
from visualcloze_deft.data.annotation.source import annotated, check_places
from visualcloze_deft.data.base import Part, Source, units_of
from visualcloze_deft.data.eligible import eligible
from visualcloze_deft.data.mixture import Mixture
from visualcloze_deft.data.sources import open_source
from visualcloze_deft.data.unpaired import missing_tasks
from visualcloze_deft.errors import UserError
from visualcloze_deft.task_registry.files import load_tasks
from visualcloze_deft.task_registry.task import Task
from visualcloze_deft.training.subject import prior_of, under_name
from visualcloze_deft.training.task_weights import balanced, parts_of, weights_of


def mixture_of(run: Run, *, held_out: bool = False, cache: Path | None = None) -> Mixture:
    """The run's tasks over its sources: those of a weight above 0 and, of "all", groups and
    patterns, those that the sources can serve.

    held_out: over the items that `data.validation_every` keeps out of training, if it keeps any.
    cache: a folder for the sources' indexes.
    """
    sources = sources_of(run, held_out=held_out, cache=cache)
    weights, wanted = tasks_of(run)
    named = () if held_out else parts_of(run.data.tasks)  # these must have data: `Mixture` says so
    tasks = {n: t for n, t in wanted.items() if n in named or eligible(t.roles, sources)}
    if wanted and not tasks:
        raise UserError(
            f"no task can be made from {', '.join(run.data.sources)}: {why(run, sources)}"
        )
    return Mixture(
        tasks,
        sources,
        seed=run.seed,
        resolution=resolution_of(run),
        cells=run.data.cells,
        recipe=run.data.recipe,
        weights=balanced(weights, tasks, run.data),
        prior=None if held_out else prior_of(run, resolution=resolution_of(run), cache=cache),
    )


def why(run: Run, sources: Sequence[Source]) -> str:
    """What sources have of which no task can be made."""
    known = load_tasks(map(Path, run.data.task_folders))
    hints = [line for source in sources for line in missing_tasks(source, known)]
    has = [f"{s.name} has the roles {', '.join(sorted(s.roles))}" for s in sources]
    return "; ".join([*has, *hints])


def held_out_of(run: Run, *, cache: Path | None = None) -> Mixture:
    """The mixture over what is never trained on: the items that `data.validation_every` keeps or,
    of scenes alone, which have no end, those of another seed. Raises `UserError` where there is
    nothing."""
    if run.data.validation_every:
        return mixture_of(run, held_out=True, cache=cache)
    finite = [spec for spec in run.data.sources if not is_endless(spec)]
    if finite:
        raise UserError(
            f"logging.validate_every = {run.logging.validate_every}: nothing of {finite[0]} is "
            "held out; set data.validation_every, e.g. to 10, or logging.validate_every to 0"
        )
    return mixture_of(run.model_copy(update={"seed": run.seed + OTHER_SCENES}), cache=cache)


def tasks_of(run: Run) -> tuple[dict[str, float], dict[str, Task]]:
    """The weights of all that the run names, and the tasks of a weight above 0."""
    known = load_tasks(Path(folder) for folder in run.data.task_folders)
    weights = weights_of(run, known)
    return weights, {name: known[name] for name, weight in weights.items() if weight > 0}


def sources_of(run: Run, *, held_out: bool, cache: Path | None = None) -> list[Source]:
    """The run's sources, with what is annotated: the items that `data.validation_every` leaves to
    training, or those it keeps. cache: a folder for their indexes."""
    check_places(run.data.annotate)
    size, every = resolution_of(run), run.data.validation_every
    opened = [open_source(spec, size=size, seed=run.seed, cache=cache) for spec in run.data.sources]
    sources = under_name(run, annotated(opened, run.data.annotate))
    for source in sources if every else ():
        if not len(Part(source, every=every, held_out=True)):
            units = units_of(source)
            of = "" if units is None else f" of {max(units) + 1} units"
            raise UserError(
                f"data.validation_every = {every}: {source.name} has {len(source)} items{of}; "
                "give a smaller one"
            )
        if not len(Part(source, every=every, held_out=False)):
            raise UserError(
                f"data.validation_every = {every}: of {source.name} no pair would be left to train "
                "on; give 0"
            )
    return [Part(s, every=every, held_out=held_out) for s in sources] if every else sources


def resolution_of(run: Run) -> int:
    """The cell side the run trains at."""
    if run.data.resolution != "model":
        return run.data.resolution
    return backbone_of(run.model).resolution(run.model)
