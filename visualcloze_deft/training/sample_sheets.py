"""Sheets of what a run trains on, and of what a model generates for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain

import numpy as np
from PIL import Image

from visualcloze_deft.backbones.base import Models
from visualcloze_deft.data.base import Source
from visualcloze_deft.data.eligible import eligible
from visualcloze_deft.data.example import Example
from visualcloze_deft.data.mixture import Mixture
from visualcloze_deft.data.queries import queries
from visualcloze_deft.data.query_sources import query_sources
from visualcloze_deft.grids import grid
from visualcloze_deft.reporting.contact_sheet import draw_grid, draw_sheet
from visualcloze_deft.sampling.denoising import (
    conditions_of,
    draw_of,
    pictures_of,
    tokens_of,
)
from visualcloze_deft.sampling.room import NoRoom, Room
from visualcloze_deft.task_registry.task import Task

SHOWN = 12
"""Tasks on a sheet made while training."""
STEPS = 20
"""Steps of the sheets made while training."""


def grids_to_try(
    tasks: Mapping[str, Task],
    sources: Sequence[Source],
    *,
    seed: int,
    resolution: int,
    count: int,
    rows: int,
) -> Iterator[Example]:
    """`count` grids of each task that there are pictures for: `query_sources` where a source asks
    it, else `queries`. Raises `UserError` where there are none at all."""
    asked = query_sources(tasks, sources, rows=rows)
    served = {n: t for n, t in tasks.items() if n not in asked and eligible(t.roles, sources)}
    known: list[Example] = []
    if served or not asked:
        mixture = Mixture(served or tasks, sources, seed=seed, resolution=resolution)
        known = queries(mixture, count=count, rows=rows)
    fields = {"count": count, "rows": rows, "seed": seed, "resolution": resolution}
    return chain(*(each.grids(**fields) for each in asked.values()), known)


def sample_sheet(
    models: Models, mixture: Mixture, room: Room
) -> tuple[Image.Image | None, list[str]]:
    """For each of the tasks drawn most often a grid with the model's answer framed, and the truth
    beside it; and the tasks of grids that memory is too small for. None where all are."""
    pages, left_out = [], []
    for example in queries(mixture, tasks=SHOWN):
        try:
            made = answer(models, example, room)
        except NoRoom:
            left_out.append(example.task)
        else:
            pages.append(sample_page(example, made))
    page = draw_sheet(pages, columns=min(4, len(pages))) if pages else None
    return page, left_out


def answer(models: Models, example: Example, room: Room) -> list[Image.Image]:
    """The images that the model makes of the hidden cells. Raises `NoRoom`."""
    built = [grid.join(example.complete, hidden=example.hidden)]
    given = room.attempt(lambda: conditions_of(models, built, [example.prompt]))
    tokens = room.attempt(
        lambda: tokens_of(
            models, given, [draw_of(example.index)], steps=STEPS, guidance=models.guidance
        ),
        transformer=True,
    )
    return room.attempt(lambda: pictures_of(models, tokens, built))[0]


def sample_page(example: Example, made: Sequence[Image.Image]) -> Image.Image:
    """One grid with the images `made` in its hidden cells framed, and the truth beside it."""
    answers = iter(made)
    last = [
        next(answers) if hidden else image
        for image, hidden in zip(example.rows[-1], example.hidden, strict=True)
    ]
    truth = [
        image for image, hidden in zip(example.rows[-1], example.hidden, strict=True) if hidden
    ]
    rows = [*example.rows[:-1], [*last, *truth]]
    framed = [(len(rows) - 1, c) for c, hidden in enumerate(example.hidden) if hidden]
    words = f"{example.task}: {example.content}" if example.content else example.task
    return draw_grid(rows, title=words, made=framed)


def example_sheet(examples: list[Example]) -> Image.Image:
    """Training examples as they are drawn: hidden cells framed, the prompt above."""
    pages = []
    for example in examples:
        last = len(example.rows) - 1
        framed = [(last, c) for c, hidden in enumerate(example.hidden) if hidden]
        pages.append(draw_grid(example.rows, title=str(example.prompt), made=framed))
    return draw_sheet(pages, columns=min(4, len(pages)))


def item_sheet(source: Source, *, count: int, seed: int) -> Image.Image:
    """Different items of a source drawn by `seed`, each with all its pictures and its caption."""
    rng = np.random.default_rng(seed)
    pages = []
    for index in np.sort(rng.choice(len(source), min(count, len(source)), replace=False)):
        item = source.item(int(index))
        roles = sorted(item.images, key=lambda role: (role != "target", role))
        title = f"{item.key}: {', '.join(roles)}. {' / '.join(item.texts.values())}"
        pages.append(draw_grid([[item.image(role) for role in roles]], title=title))
    return draw_sheet(pages, columns=1 if max(page.width for page in pages) > 600 else 2)
