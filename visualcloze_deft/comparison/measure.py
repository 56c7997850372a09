"""What `vcdeft compare` measures of an adapter: its error on held-out grids of each task.

Axes: g grids, the same ones for every adapter.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from PIL import Image

from visualcloze_deft.backbones.base import Models
from visualcloze_deft.backbones.precision import dtype_of
from visualcloze_deft.comparison.records import Measured, QuerySet
from visualcloze_deft.comparison.trainings import Training
from visualcloze_deft.config import seeds
from visualcloze_deft.config.comparison import SEED, Comparison, Evaluate, Group
from visualcloze_deft.config.run_settings import Run
from visualcloze_deft.config.source_specs import (
    PROCEDURAL,
    is_endless,
    name_and_place,
    place_and_split,
)
from visualcloze_deft.data.annotation.models import fastest
from visualcloze_deft.data.base import units_of
from visualcloze_deft.data.eligible import EligibleItems
from visualcloze_deft.data.example import Example
from visualcloze_deft.data.mixture import Mixture
from visualcloze_deft.data.queries import query_at
from visualcloze_deft.errors import UserError
from visualcloze_deft.evaluation.metrics import fidelity
from visualcloze_deft.inference.pipeline import InContextPipeline
from visualcloze_deft.sampling.encoding import PixelExample, in_pixels
from visualcloze_deft.sampling.examples import complete_examples, truths_of
from visualcloze_deft.task_registry.task import Task
from visualcloze_deft.training import run_data, validation
from visualcloze_deft.training.objective import GridLoss

ROWS = 2  # one in-context example, and the query


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A held-out grid and the pictures that a model made of its hidden cells, left to right."""

    example: Example
    made: Sequence[Image.Image]


def query_sets(comparison: Comparison, run: Run, *, cache: Path | None = None) -> list[QuerySet]:
    """All tasks that are asked, the new ones first. run: any of the trainings'; cache: a folder
    for indexes.

    Raises `UserError` where an old task is trained or a new one is not, and where there is no data
    that is not trained on, or less than is asked for.
    """
    trained = run_data.mixture_of(run, cache=cache).tasks
    found = [
        QuerySet(
            group=name,
            grids=group.grids or comparison.evaluate.grids,
            task=task,
            mixture=mixture,
        )
        for name, group in comparison.groups.items()
        for mixture in [held_out(name, group, run, cache=cache)]
        for task in mixture.tasks.values()
    ]
    names = [one.task.name for one in found]
    twice = [name for name in names if names.count(name) > 1]
    if twice and len({group.sources for group in comparison.groups.values()}) == 1:
        raise UserError(f"{twice[0]} is both new and old; name it once, or give new.sources")
    for one in found:
        if (one.task.name in trained) != (one.group == "new"):
            what = "is trained" if one.group == "old" else "is not trained"
            raise UserError(
                f"{one.group}.tasks names {one.task.name}, which {what} by run.data.tasks = "
                f"{run.data.tasks!r}; change one of the two"
            )
        check_enough(one)
    return found


def check_enough(one: QuerySet) -> None:
    """Raise `UserError` where a task cannot be asked so many different questions."""
    able = one.mixture.serving[one.task.name][0]
    there = len(able)
    if there >= max(one.grids, ROWS) and units_of(able.source) is not None:
        there = len(questions(one.mixture, one.task, one.grids))
    if there < max(one.grids, ROWS):
        raise UserError(
            f"evaluate.grids = {one.grids}: {able.source.name} has {there} held-out items for "
            f"{one.task.name}; ask for fewer ({one.group}.grids), or give {one.group}.sources more"
        )


def held_out(name: str, group: Group, run: Run, *, cache: Path | None) -> Mixture:
    """The mixture of a group's tasks over data that is never trained on."""
    trained = {place_of(spec) for spec in run.data.sources} - {None}
    if shared := [spec for spec in group.sources if place_of(spec) in trained]:
        raise UserError(f"{name}.sources names {shared[0]}, which is trained on")
    update: dict[str, Any] = {"tasks": group.tasks, "weights": {}}
    if group.sources:
        update |= {"sources": group.sources, "validation_every": 0}
    data = run.data.model_copy(update=update)
    asked = run.model_copy(update={"seed": SEED, "data": data})
    finite = [spec for spec in data.sources if not is_endless(spec)]
    if finite and not (group.sources or data.validation_every):
        raise UserError(
            f"{name}: nothing of {finite[0]} is held out; set run.data.validation_every, or give "
            f"{name}.sources"
        )
    if group.sources:  # as a whole, its scenes of another seed
        other = asked.model_copy(update={"seed": SEED + seeds.OTHER_SCENES})
        return run_data.mixture_of(other, cache=cache)
    return run_data.held_out_of(asked, cache=cache)


def place_of(spec: str) -> tuple[str, str] | None:
    """What a source reads, however it is spelled; None of scenes, which another seed makes anew.

    >>> place_of("subject"), place_of("subject=0"), place_of("scenes=9")
    (('subject', '0'), ('subject', '0'), None)
    """
    name, argument = name_and_place(spec)
    if is_endless(spec):
        return None
    if name in PROCEDURAL:
        return name, argument or "0"
    folder, split = place_and_split(argument)
    whole = str(Path(folder).resolve()) if Path(folder).exists() else folder
    return name, whole if split == "train" else f"{whole}@{split}"


def load(run: Run) -> InContextPipeline:
    """The base that a run trains on, for any of its adapters, which stay beside it as in training:
    merged into bfloat16 weights, small changes would be rounded away."""
    return InContextPipeline.from_pretrained(
        run.model,
        lora=run.model_lora,
        torch_dtype=dtype_of(run.precision, fastest()),
        quantise=run.quantise,
        clip_text=run.clip_text,
        cells=run.data.cells,
        merge=False,
    )


def use(pipe: InContextPipeline, training: Training | None) -> None:
    """Have the pipeline use this adapter alone, or none."""
    pipe.delete_adapters(pipe.get_active_adapters())
    if training is not None:
        pipe.load_adapter(training.folder / "adapter", training.name)


def measure(
    pipe: InContextPipeline, run: Run, one: QuerySet, settings: Evaluate
) -> tuple[Measured, list[Answer]]:
    """Velocity errors and PSNR of the pipeline on held-out grids of a task, and its answers."""
    began = time.monotonic()
    examples = questions(one.mixture, one.task, one.grids)
    errors = errors_of(pipe.models, run, examples)
    made = complete_examples(
        pipe.models, examples, steps=settings.steps, batch=settings.batch, context=pipe.context
    )
    answers = [Answer(example=e, made=m) for e, m in zip(examples, made, strict=True)]
    measured = Measured(
        errors=tuple(errors),
        psnr=tuple(psnr(one.made, truths_of(one.example)) for one in answers),
        seconds=time.monotonic() - began,
    )
    return measured, answers


def questions(mixture: Mixture, task: Task, count: int) -> list[Example]:
    """`count` grids of `task` as inference sees them, no two with the same query: an item of the
    first source that serves the task, below another one of its own.

    Where items share pictures, no two ask for the same picture, and none shows what it asks for;
    there may be fewer then.
    """
    able = mixture.serving[task.name][0]
    rng = np.random.default_rng([mixture.seed, *task.name.encode()])
    if units_of(able.source) is not None:
        return distinct(mixture, task, able, count, rng)
    queries = able.choose(count, rng)
    shown = [(place + 1 + int(rng.integers(len(able) - 1))) % len(able) for place in queries]
    return [
        query_at(mixture, task, places, index=index)
        for index, places in enumerate(zip(shown, queries, strict=True), validation.FIRST)
    ]


def distinct(
    mixture: Mixture, task: Task, able: EligibleItems, count: int, rng: np.random.Generator
) -> list[Example]:
    """`questions` about items that share pictures."""
    found: list[Example] = []
    asked: set[bytes] = set()
    for query in able.choose(len(able), rng):
        for shown in able.others([query], rng):
            one = query_at(mixture, task, (shown, query), index=validation.FIRST + len(found))
            own = {picture.tobytes() for picture in truths_of(one)}
            above = {picture.tobytes() for picture in one.complete[0]}
            if own & asked or not own & above:
                break
        if not own & (asked | above):
            found.append(one)
            asked |= own
        if len(found) == count:
            break
    return found


def errors_of(models: Models, run: Run, examples: Sequence[Example]) -> list[float]:
    """The loss of `validation.losses`, of tokens that are generated alone, for each grid."""
    loss_of = GridLoss(
        models.denoiser, context_weight=0.0, guidance=run.guidance, process=models.process
    ).eval()
    found = validation.losses(
        loss_of,
        models,
        {example.index: in_pixels(example) for example in examples},
        run.model_copy(update={"seed": SEED}),
        own=[example.index for example in examples],
        agreed=lambda drawn: cast(Sequence[PixelExample], drawn),
    )
    return [found[example.index].error for example in examples]


def psnr(made: Sequence[Image.Image], truths: Sequence[Image.Image]) -> float:
    """Mean over a grid's pictures of what `vcdeft eval` measures of each."""
    pairs = zip(made, truths, strict=True)
    return float(np.mean([fidelity.psnr(image, truth) for image, truth in pairs]))
