"""One grid to complete, checked: its pictures, task, texts and seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from visualcloze_deft.config.numbers import is_whole
from visualcloze_deft.errors import UserError
from visualcloze_deft.grids import grid
from visualcloze_deft.grids.prompt import Prompt
from visualcloze_deft.inference.pictures import picture
from visualcloze_deft.inference.upsampling import Enlarging, Upsampling, each
from visualcloze_deft.storage.text_files import brief, sound
from visualcloze_deft.task_registry.select import way_out
from visualcloze_deft.task_registry.task import Task

MOST_SEED = 2**63 - 1


@dataclass(frozen=True, kw_only=True)
class Request:
    """One grid to complete, checked: rows end in the query, None marks what to generate.

    paths: where each image of `rows` was read; digests: SHA-256 of what was read there; both ()
    where images were given. seeds: one for each image to make of it. upsampling: one for each
    target, or () for none.
    """

    rows: tuple[tuple[Image.Image | None, ...], ...]
    paths: tuple[tuple[Path | None, ...], ...] = ()
    digests: tuple[tuple[str | None, ...], ...] = ()
    task: str | None = None
    task_prompt: str
    content_prompt: str
    seeds: tuple[int, ...] = (0,)
    upsampling: tuple[Upsampling | None, ...] = ()

    @property
    def prompt(self) -> Prompt:
        rows, columns = len(self.rows), len(self.rows[0])
        return Prompt(
            rows=rows, columns=columns, task=self.task_prompt, content=self.content_prompt
        )

    @property
    def sizes(self) -> list[list[tuple[int, int] | None]]:
        """(width, height) of every image, row by row."""
        return [[image.size if image else None for image in row] for row in self.rows]

    @property
    def targets(self) -> tuple[int, ...]:
        """The columns of the last row that are generated."""
        return tuple(c for c, image in enumerate(self.rows[-1]) if image is None)


def request(
    rows: Sequence[Sequence[object]],
    tasks: Mapping[str, Task],
    *,
    task: str | None = None,
    task_prompt: str | None = None,
    content_prompt: str | None = None,
    seed: int | Sequence[int] = 0,
    images: int = 1,
    upsampling: Enlarging | Sequence[Enlarging | None] | None = None,
) -> Request:
    """Check one grid. `task` names a registered task; `task_prompt` says the instruction itself.

    seed: one for each image to make of it, or the first of `images` that follow one another.

    A cell is a picture of any kind, see `pictures.picture`. All become 8-bit RGB as files do, masks
    and depth maps in the sense of their role where `task` tells it: see `maps.as_role`.
    """
    grid.check_rows(rows)
    seeds = seeds_of(seed, images)
    if task is not None:
        if task not in tasks:
            raise UserError(f"unknown task {task!r}; {way_out(task, tasks)}")
        roles = tasks[task].roles
        if len(roles) != len(rows[0]):
            raise UserError(
                f"task {task} has {len(roles)} columns ({', '.join(roles)}), the rows have "
                f"{len(rows[0])}"
            )
        task_prompt = task_prompt if task_prompt is not None else tasks[task].sentence()
    roles = roles_of(task, tasks, len(rows[0]))
    read = tuple(
        tuple(
            picture(cell, role, f"row {r}, {role or f'image {c}'}")
            for c, (role, cell) in enumerate(zip(roles, row, strict=True), 1)
        )
        for r, row in enumerate(rows, 1)
    )
    grid.check_rows(read)
    return Request(
        rows=read,
        task=task,
        task_prompt=sound(task_prompt or ""),
        content_prompt=sound(content_prompt or ""),
        seeds=seeds,
        upsampling=each(upsampling, sum(image is None for image in rows[-1]))
        if upsampling is not None
        else (),
    )


def roles_of(task: object, tasks: Mapping[str, Task], columns: int) -> tuple[str, ...]:
    """The role of each column; "" where no task that has as many columns tells it."""
    roles = tasks[task].roles if isinstance(task, str) and task in tasks else ()
    return roles if len(roles) == columns else ("",) * columns


def seeds_of(seed: int | Sequence[int], images: int = 1) -> tuple[int, ...]:
    """The seeds of a grid's images, checked.

    >>> seeds_of(7, 3), seeds_of([2, 9])
    ((7, 8, 9), (2, 9))
    """
    if not is_whole(images) or images < 1:
        raise UserError(f"num_images_per_prompt {brief(images)}: give a whole number, 1 or more")
    if not isinstance(seed, list | tuple | range) and not is_whole(seed):
        raise UserError(f"seed {brief(seed)}: a seed is a whole number from 0 to 2**63 - 1")
    if isinstance(seed, int):
        seeds = tuple(range(seed, seed + images))
    elif images > 1:
        raise UserError(f"seed {brief(list(seed))}: one for each image; leave the number of images")
    else:
        seeds = tuple(seed)
    for one in seeds:
        if not is_whole(one) or not 0 <= one <= MOST_SEED:
            raise UserError(f"seed {brief(one)}: a seed is a whole number from 0 to 2**63 - 1")
    if not seeds or len(set(seeds)) < len(seeds):
        raise UserError(f"seed {brief(list(seeds))}: give one or more, each once")
    return seeds
