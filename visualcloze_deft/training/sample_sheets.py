"""Sheets of what a run trains on, and of what a model generates for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
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
from visualcloze_deft.data.unpaired import place
from visualcloze_deft.grids import grid
from visualcloze_deft.reporting.contact_sheet import draw_grid, draw_sheet
from visualcloze_deft.sampling.context import FULL, Context
from visualcloze_deft.sampling.denoising import (
    conditions_of,
    draw_of,
    pictures_of,
    tokens_of,
)
from visualcloze_deft.sampling.room import Room
from visualcloze_deft.task_registry.task import Task

STEPS = 20
"""Sampling steps of the sheets made while training."""
TRUTH = "truth"
CELL, GAP, WIDTH = 144, 12, 1240  # pixels: of a cell, between grids, of a page of HTML

Made = Sequence[Image.Image]
"""The pictures of a grid's hidden cells, left to right."""


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


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A grid and what was made of its hidden cells. roles: of its columns. made: label -> pictures,
    None where there are none."""

    example: Example
    roles: Sequence[str]
    made: Mapping[str, Made | None]


def answer(
    models: Models, example: Example, room: Room, *, context: Context = FULL
) -> list[Image.Image]:
    """The images that the model makes of the hidden cells. Raises `NoRoom`."""
    built = [grid.join(example.complete, hidden=example.hidden)]
    given = room.attempt(lambda: conditions_of(models, built, [example.prompt], seen=context.seen))
    tokens = room.attempt(
        lambda: tokens_of(
            models,
            given,
            [draw_of(example.index)],
            steps=STEPS,
            guidance=models.guidance,
            context=context,
        ),
        transformer=True,
    )
    return room.attempt(lambda: pictures_of(models, tokens, built))[0]


def sheet_of(samples: Sequence[Sample], *, title: str) -> Image.Image:
    """Samples beside each other, all cells of one size, as many in a row as a page shows in full
    size."""
    pages = [sample_page(one) for one in samples]
    fitting = WIDTH // (max(page.width for page in pages) + GAP)
    columns = max(1, min(fitting, -(-len(pages) // 2)))
    return draw_sheet(pages, columns=columns, gap=GAP, title=title)


def sample_page(sample: Sample) -> Image.Image:
    """One grid, its visible columns first. Below the examples the query: its conditions, the
    pictures `made` with a red frame, then the truth."""
    example = sample.example
    order = sorted(range(len(example.hidden)), key=lambda c: example.hidden[c])
    seen = order[: len(order) - sum(example.hidden)]
    targets = order[len(seen) :]
    *above, query = [[row[c] for c in order] for row in example.rows]
    last, labels, framed = query[: len(seen)], [sample.roles[c] for c in seen], []
    for label, pictures in {**sample.made, TRUTH: query[len(seen) :]}.items():
        if label != TRUTH:
            framed += [(len(above), len(last) + k) for k in range(len(targets))]
        last += pictures or [None] * len(targets)
        labels += [f"{label}: {sample.roles[c]}" if len(targets) > 1 else label for c in targets]
    words = f"{example.task}: {example.content}" if example.content else example.task
    heads = {0: [sample.roles[c] for c in order], len(above): labels}
    return draw_grid(
        [*above, last], title=words, title_lines=2, made=framed, cell=CELL, labels=heads
    )


def example_sheet(examples: list[Example]) -> Image.Image:
    """Training examples as they are drawn: hidden cells framed, the prompt above."""
    pages = []
    for example in examples:
        last = len(example.rows) - 1
        framed = [(last, c) for c, hidden in enumerate(example.hidden) if hidden]
        pages.append(draw_grid(example.rows, title=str(example.prompt), made=framed))
    return draw_sheet(pages, columns=min(4, len(pages)))


def item_sheet(source: Source, *, count: int, seed: int) -> Image.Image:
    """Different items of a source drawn by `seed`, each with all its pictures, what sounds
    generated last, and its texts."""
    rng = np.random.default_rng(seed)
    pages = []
    for index in np.sort(rng.choice(len(source), min(count, len(source)), replace=False)):
        item = source.item(int(index))
        roles = sorted(item.images, key=place)
        title = f"{item.key}: {', '.join(roles)}. {' / '.join(item.texts.values())}"
        pages.append(draw_grid([[item.image(role) for role in roles]], title=title))
    return draw_sheet(pages, columns=1 if max(page.width for page in pages) > 600 else 2)
