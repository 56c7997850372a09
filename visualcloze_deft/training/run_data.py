"""The data of a run: tasks, sources, weights and resolution from its settings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from visualcloze_deft.backbones.table import backbone_of
from visualcloze_deft.config.run_settings import Run
from visualcloze_deft.config.seeds import OTHER_SCENES
from visualcloze_deft.config.source_specs import is_endless, is_of_photos
from visualcloze_deft.data.annotation.source import annotated, check_places
from visualcloze_deft.data.base import Part, Source, photos_of, units_of
from visualcloze_deft.data.eligible import EligibleItems
from visualcloze_deft.data.mixture import Mixture, Prior
from visualcloze_deft.data.sources import open_source
from visualcloze_deft.data.subject import SAME_CLASS, Classmates, Named, Naming
from visualcloze_deft.errors import UserError, suggestion
from visualcloze_deft.task_registry.files import load_tasks
from visualcloze_deft.task_registry.select import matching, select
from visualcloze_deft.task_registry.task import Task

CLASS = "class"  # what the examples of prior preservation are called in logs
SUBJECT_TASK = "subject-driven"


def mixture_of(run: Run, *, held_out: bool = False, cache: Path | None = None) -> Mixture:
    """The run's tasks over its sources: those of a weight above 0, and of "all" and patterns those
    that the sources can serve.

    held_out: over the items that `data.validation_every` keeps out of training, if it keeps any.
    cache: a folder for the sources' indexes.
    """
    sources = sources_of(run, held_out=held_out, cache=cache)
    weights, tasks = tasks_of(run)
    if tasks and (held_out or leaves_out(run.data.tasks)):
        tasks = {
            n: t for n, t in tasks.items() if any(len(EligibleItems(s, t.roles)) for s in sources)
        }
        if not tasks:
            raise UserError(
                f"no task can be made from {', '.join(run.data.sources)}: "
                + "; ".join(f"{s.name} has the roles {', '.join(sorted(s.roles))}" for s in sources)
            )
    return Mixture(
        tasks,
        sources,
        seed=run.seed,
        resolution=resolution_of(run),
        cells=run.data.cells,
        recipe=run.data.recipe,
        weights=weights,
        prior=None if held_out else prior_of(run, cache=cache),
    )


def prior_of(run: Run, *, cache: Path | None = None) -> Prior | None:
    """The examples of the subject's class beside its own; None where the run has no class data.

    Items with a reference and a target are trained on as the subject's are. Of others, the targets
    are paired with each other. Raises `UserError` where there are fewer than two.
    """
    if not run.subject.class_data:
        return None
    size = resolution_of(run)
    source = open_source(run.subject.class_data, size=size, seed=run.seed, cache=cache)
    task, drawn = load_tasks()[SUBJECT_TASK], source
    if not len(EligibleItems(source, task.roles)):
        task, drawn = SAME_CLASS, Classmates(source, seed=run.seed)
    mixture = Mixture(
        {CLASS: task},
        [Named(drawn, Naming(class_word=run.subject.class_word))],
        seed=run.seed,
        resolution=size,
        cells=run.data.cells,
        recipe=run.data.recipe,
    )
    return Prior(mixture=mixture, share=run.subject.class_share)


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
    naming = Naming(trigger=run.subject.trigger, class_word=run.subject.class_word)
    sources = [
        Named(source, naming) if is_of_photos(spec) else source
        for spec, source in zip(run.data.sources, annotated(opened, run.data.annotate), strict=True)
    ]
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


def leaves_out(tasks: str) -> bool:
    """Whether tasks without data are left out and not refused: "all" or a pattern was asked for."""
    return any(part.strip() == "all" or "*" in part for part in tasks.split(","))


def weights_of(run: Run, known: Mapping[str, Task]) -> dict[str, float]:
    """How often each task of the run is drawn, relative to the others.

    Where two keys of `data.weights` name one task the later counts; a group or pattern there does
    not weigh what `data.tasks` names by its own name.
    """
    named = {part.partition("=")[0].strip() for part in run.data.tasks.split(",")}
    given: dict[str, float] = {}
    for key, weight in run.data.weights.items():
        names = matching(known, key)
        if not names:
            raise UserError(f"data.weights names {key!r}; {suggestion(key, known)}")
        given |= {name: weight for name in names if name == key or name not in named}
    return {n: said * given.get(n, 1.0) for n, said in select(known, run.data.tasks).items()}


def resolution_of(run: Run) -> int:
    """The cell side the run trains at."""
    if run.data.resolution != "model":
        return run.data.resolution
    return backbone_of(run.model).resolution(run.model)


def subject_lines(run: Run, mixture: Mixture) -> Iterator[str]:
    """What a run says of the photos of its subject, and of its class."""
    naming = Naming(trigger=run.subject.trigger, class_word=run.subject.class_word)
    called = f"called {naming.name!r}" if naming.name else "without a name"
    for source in mixture.sources:
        whole = source.source if isinstance(source, Part) else source
        counts = [len(np.unique(p)) for p in map(photos_of, (source, whole)) if p is not None]
        if counts:
            yield f"{counts[0]} photos to train on, {counts[1] - counts[0]} held out; {called}"
    for prior in mixture.whole[1:]:
        items = sum(len(source) for source in prior.sources)
        (task,) = prior.tasks.values()
        yield f"class: {items} items of {run.subject.class_data}, as {task.name}"
