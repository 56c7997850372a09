"""The subject of a run: its photos under their name, and examples of its class beside them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from visualcloze_deft.config.run_settings import Run
from visualcloze_deft.config.source_specs import is_of_photos, name_and_place
from visualcloze_deft.data.base import Part, Source, photos_of
from visualcloze_deft.data.eligible import EligibleItems
from visualcloze_deft.data.mixture import Mixture, Prior
from visualcloze_deft.data.sources import open_source
from visualcloze_deft.data.subject import SAME_CLASS, Classmates, Named, Naming
from visualcloze_deft.errors import UserError
from visualcloze_deft.task_registry.files import load_tasks

CLASS = "class"  # what the examples of prior preservation are called in logs
SUBJECT_TASK = "subject-driven"


def naming_of(run: Run) -> Naming:
    return Naming(trigger=run.subject.trigger, class_word=run.subject.class_word)


def under_name(run: Run, sources: Sequence[Source]) -> list[Source]:
    """The run's sources, those of photos under the subject's name."""
    pairs = zip(run.data.sources, sources, strict=True)
    return [Named(one, naming_of(run)) if is_of_photos(spec) else one for spec, one in pairs]


def prior_of(run: Run, *, resolution: int, cache: Path | None = None) -> Prior | None:
    """The examples of the subject's class beside its own; None where the run has no class data.

    Items with a reference and a target are trained on as the subject's are. Of others, the targets
    are paired with each other. Raises `UserError` where there are fewer than two.
    """
    if not run.subject.class_data:
        return None
    source = open_source(run.subject.class_data, size=resolution, seed=run.seed, cache=cache)
    task, drawn = load_tasks()[SUBJECT_TASK], source
    if not len(EligibleItems(source, task.roles)):
        task, drawn = SAME_CLASS, Classmates(source, seed=run.seed)
    mixture = Mixture(
        {CLASS: task},
        [Named(drawn, Naming(class_word=run.subject.class_word))],
        seed=run.seed,
        resolution=resolution,
        cells=run.data.cells,
        recipe=run.data.recipe,
    )
    return Prior(mixture=mixture, share=run.subject.class_share)


def check_subject(run: Run) -> None:
    """Raise `UserError` where settings of the subject have no photos that they hold for, or class
    data is missing or holds the subject's own."""
    subject = run.subject
    photos = [name_and_place(spec)[1] for spec in run.data.sources if is_of_photos(spec)]
    for name, value in subject.model_dump().items():
        if value not in ("", "auto") and not photos:
            raise UserError(
                f"subject.{name} = {value!r}: no photos of a subject are trained on; name their "
                "folder, --data photos=PATH"
            )
    if subject.class_weight != "auto" and not subject.class_data:
        raise UserError(
            f"subject.class_weight = {subject.class_weight}: no pictures of the class are there; "
            "name them, e.g. subject.class_data=folder=PATH"
        )
    place = Path(name_and_place(subject.class_data)[1] or os.devnull).resolve()
    for own in (Path(path).resolve() for path in photos):
        if place == own or place in own.parents:
            raise UserError(
                f"subject.class_data = {subject.class_data!r} holds the subject's own photos "
                f"({own}); name a folder of others of its class"
            )


def remarks_on_subject(run: Run, mixture: Mixture) -> Iterator[str]:
    """How many photos are trained on, and what they and the class are called."""
    name = naming_of(run).name
    called = f"called {name!r}" if name else "without a name; see subject.trigger"
    for source in mixture.sources:
        whole = source.source if isinstance(source, Part) else source
        counts = [len(np.unique(p)) for p in map(photos_of, (source, whole)) if p is not None]
        if counts:
            yield f"{counts[0]} photos to train on, {counts[1] - counts[0]} held out; {called}"
    for prior in mixture.whole[1:]:
        sentence = prior.tasks[CLASS].sentence()
        yield f"prior preservation by {run.subject.class_data}: {sentence}"
