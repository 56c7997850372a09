"""Sheets of what a run trains on, and of what a model makes of it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from visualcloze_deft import grid
from visualcloze_deft.data.item import Source
from visualcloze_deft.data.mixture import Example, Mixture, able, content
from visualcloze_deft.data.questions import questions
from visualcloze_deft.errors import UserError
from visualcloze_deft.models import Models
from visualcloze_deft.output import check_foreign, output_folder, whole_png, whole_text
from visualcloze_deft.registry import Task
from visualcloze_deft.room import NoRoom, Room
from visualcloze_deft.sample import GUIDANCE, conditions_of, pictures_of, tokens_of
from visualcloze_deft.sheet import draw_grid, draw_sheet

SHEETS = 10_000_019  # index offset: sheets show combinations that training does not draw
SHOWN = 12
"""Tasks on a sheet made while training."""
STEPS = 20
"""Steps of the sheets made while training."""
Each = Literal["task", "group"]


def query_of(mixture: Mixture, task: Task, *, index: int, rows: int = 2) -> Example:
    """A grid of `task` as inference sees it: its own targets hidden, all words said.

    From the first source that has items for it.
    """
    able = mixture.serving[task.name][0]
    places = able.choose(rows, np.random.default_rng([mixture.seed, SHEETS + index]))
    return query_at(mixture, task, places, index=index)


def query_at(mixture: Mixture, task: Task, places: Sequence[int], *, index: int) -> Example:
    """`query_of` with the items at `places` of the first source that serves the task."""
    able = mixture.serving[task.name][0]
    items, cells, skipped = mixture.read(able, places, task.roles, SHEETS + index)
    return Example(
        index=index,
        task=task.name,
        keys=tuple(item.key for item in items),
        rows=cells,
        hidden=tuple(role in task.targets for role in task.roles),
        task_sentence=task.sentence(),
        content=content(task, items[-1]),
        skipped=skipped,
    )


def queries(
    mixture: Mixture, *, count: int = 1, rows: int = 2, tasks: int | None = None
) -> list[Example]:
    """`count` grids of every task, or of the `tasks` tasks drawn most often."""
    heaviest = np.argsort(-mixture.proportions, kind="stable")[:tasks]
    return [
        query_of(mixture, task, index=index, rows=rows)
        for place, task in enumerate(mixture.tasks.values())
        if place in heaviest
        for index in range(count)
    ]


def one_of_each(mixture: Mixture, each: Each) -> list[Example]:
    """A grid of every task, or of the first task of every group, as inference sees it."""
    first: dict[str, Task] = {}
    for task in mixture.tasks.values():
        first.setdefault(task.group if each == "group" else task.name, task)
    return [query_of(mixture, task, index=k) for k, task in enumerate(first.values())]


def grids_to_try(
    tasks: Mapping[str, Task],
    sources: Sequence[Source],
    *,
    seed: int,
    resolution: int,
    count: int,
    rows: int,
) -> Iterator[Example]:
    """`count` grids of each task that there are pictures for: `questions` where a source asks it,
    else `queries`. Raises `UserError` where there are none at all."""
    asked = questions(tasks, sources, rows=rows)
    served = {n: t for n, t in tasks.items() if n not in asked and able(t.roles, sources)}
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
        lambda: tokens_of(models, given, seeds=[example.index], steps=STEPS, guidance=GUIDANCE),
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


def write_grids(examples: Iterable[Example], folder: Path) -> Path:
    """The pictures of `examples` and a grid file for `vcdeft infer`; a truth that is known stays
    beside it."""
    path = folder / "grid.json"
    if path.exists():
        raise UserError(f"--output {folder}: holds grids already; choose another")
    check_foreign(folder, (), what="grids of vcdeft")
    output_folder(folder)
    written: list[Path] = []
    try:
        entries = [
            written_grid(example, folder, number, written)
            for number, example in enumerate(examples, 1)
        ]
        whole_text(path, json.dumps(entries, indent=1))
    except BaseException:  # a full disk, or data that is broken: pictures alone are of no use
        for picture in written:
            picture.unlink(missing_ok=True)
        raise
    return path


def written_grid(
    example: Example, folder: Path, number: int, written: list[Path]
) -> dict[str, Any]:
    """The entry of a grid in its file; its pictures are written, their paths put to `written`."""
    rows: list[list[str | None]] = []
    for r, row in enumerate(example.rows):
        names: list[str | None] = []
        for c, image in enumerate(row):
            hidden = r == len(example.rows) - 1 and example.hidden[c]
            name = f"{number:03d}-{r + 1}{c + 1}{'-truth' if hidden else ''}.png"
            if image is not None:
                whole_png(folder / name, image)
                written.append(folder / name)
            names.append(None if hidden else name)
        rows.append(names)
    return {
        "task": example.task,
        "content_prompt": example.content or None,
        "rows": rows,
        "seed": example.index,
    }
