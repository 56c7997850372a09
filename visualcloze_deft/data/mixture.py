"""The mixture: example i, drawn from all tasks and sources, is a function of (seed, i) alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from visualcloze_deft import grid
from visualcloze_deft.data.derive import DERIVED, check_shapes, missing
from visualcloze_deft.data.item import Item, Source
from visualcloze_deft.errors import UserError
from visualcloze_deft.registry import Task, usual
from visualcloze_deft.settings import Recipe


@dataclass(frozen=True, kw_only=True)
class Example:
    """One sample: rows of pictures, the columns hidden in the last one, and the words.

    Rows are complete, but for hidden pictures that nobody has.
    """

    index: int
    task: str
    keys: tuple[str, ...]
    rows: tuple[tuple[Image.Image | None, ...], ...]
    hidden: tuple[bool, ...]
    task_sentence: str
    content: str

    @property
    def prompt(self) -> str:
        rows, columns = len(self.rows), len(self.rows[0])
        return grid.prompt(rows, columns, task=self.task_sentence, content=self.content)


class Mixture:
    """An endless sequence of examples of `tasks` drawn from `sources`.

    resolution: the side of a square cell in pixels, at which pictures are derived. weights: task
    name -> relative frequency (1 where not named). Raises `UserError` where a task finds no source
    with its roles.
    """

    def __init__(
        self,
        tasks: Mapping[str, Task],
        sources: Sequence[Source],
        *,
        seed: int,
        resolution: int,
        recipe: Recipe | None = None,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        self.tasks = dict(tasks)
        self.sources = tuple(sources)
        self.seed = seed
        self.resolution = resolution
        self.recipe = recipe or Recipe()
        self.serving = {name: serving(task, sources) for name, task in self.tasks.items()}
        given = [(weights or {}).get(name, 1.0) for name in self.tasks]
        if not any(given):
            raise UserError("every task has weight 0; see data.weights and --tasks")
        self.proportions = np.array(given) / sum(given)

    def __getitem__(self, index: int) -> Example:
        rng = np.random.default_rng([self.seed, index])
        recipe = self.recipe
        name = list(self.tasks)[rng.choice(len(self.tasks), p=self.proportions)]
        task = self.tasks[name]
        sources = self.serving[name]
        items = sources[rng.integers(len(sources))].draw(self._rows(index), rng)
        order = self._order(task, rng)
        if rng.random() < recipe.hide_target:
            hidden = tuple(role in task.targets for role in order)
        else:
            hidden = tuple(np.arange(len(order)) == rng.integers(len(order)))
        say_task, say_content = rng.random(2) < (recipe.keep_task, recipe.keep_content)
        silent = rng.random() < recipe.drop_text
        varied = rng.random() < recipe.paraphrase

        def words(phrases: Sequence[str]) -> str:
            return phrases[int(rng.integers(len(phrases)))] if varied else usual(phrases)

        return Example(
            index=index,
            task=name,
            keys=tuple(item.key for item in items),
            rows=self.rows_of(items, order, index),
            hidden=hidden,
            task_sentence=task.sentence(order, words) if say_task and not silent else "",
            content=content(task, items[-1]) if say_content and not silent else "",
        )

    def rows_of(
        self, items: Sequence[Item], order: Sequence[str], index: int
    ) -> tuple[tuple[Image.Image, ...], ...]:
        """One row of pictures in the roles of `order` for each item, for example `index`."""
        return tuple(
            row_of(item, order, self.resolution, np.random.default_rng([self.seed, index, 2, k]))
            for k, item in enumerate(items)
        )

    def _rows(self, index: int) -> int:
        """How many rows example `index` has, one number for each run of `run_length`."""
        weights = np.array(self.recipe.examples)
        rng = np.random.default_rng([self.seed, index // self.recipe.run_length, 1])
        return 1 + int(rng.choice(len(weights), p=weights / weights.sum()))

    def _order(self, task: Task, rng: np.random.Generator) -> tuple[str, ...]:
        """Conditions, shuffled if the recipe says so, then targets."""
        conditions = list(task.conditions)
        if self.recipe.shuffle_columns:
            conditions = [conditions[k] for k in rng.permutation(len(conditions))]
        return (*conditions, *task.targets)


class Able:
    """The items of a source that have all roles of `wanted`, or all that theirs are made of."""

    def __init__(self, source: Source, wanted: Sequence[str]) -> None:
        self.source = source
        self.parts = [
            indices for roles, indices in source.kinds.items() if not missing(wanted, roles)
        ]
        self.ends = np.cumsum([len(part) for part in self.parts])

    def __len__(self) -> int:
        return int(self.ends[-1]) if self.parts else 0

    def draw(self, count: int, rng: np.random.Generator) -> tuple[Item, ...]:
        """`count` different items, or all where there are no more."""
        places = rng.choice(len(self), min(count, len(self)), replace=False)
        return tuple(self.source.item(self[place]) for place in places)

    def __getitem__(self, place: int) -> int:
        """The index in the source of the item at `place` among these."""
        part = int(np.searchsorted(self.ends, place, side="right"))
        return int(self.parts[part][place - self.ends[part]])  # counted from the part's end


def able(wanted: Sequence[str], sources: Sequence[Source]) -> list[Able]:
    """What each source has with the roles `wanted`; of those that have nothing, nothing."""
    return [found for found in (Able(source, wanted) for source in sources) if len(found)]


def idle(tasks: Mapping[str, Task], sources: Sequence[Source]) -> list[Source]:
    """The sources that serve none of the tasks."""
    return [s for s in sources if not any(len(Able(s, task.roles)) for task in tasks.values())]


def serving(task: Task, sources: Sequence[Source]) -> list[Able]:
    """What each source has for `task`.

    Raises `UserError` where no source has anything.
    """
    found = able(task.roles, sources)
    if not found:
        lacks = "; ".join(
            f"{source.name} lacks {', '.join(sorted(missing(task.roles, source.roles)))}"
            if missing(task.roles, source.roles)
            else f"no item of {source.name} has them all"
            for source in sources
        )
        raise UserError(f"task {task.name}: no data source has all its roles ({lacks})")
    return found


def row_of(
    item: Item, order: Sequence[str], resolution: int, rng: np.random.Generator
) -> tuple[Image.Image, ...]:
    """The item's pictures in the roles of `order`.

    Those that the source lacks are derived at the size of a cell, so that noise or small squares
    are seen as strong as they are made.
    """
    found: dict[str, Image.Image] = {}

    def given(role: str) -> Image.Image:
        if role not in found:
            found[role] = item.image(role)
        return found[role]

    pictures = []
    for role in order:
        if role in item.images:
            pictures.append(given(role))
        else:
            derived = DERIVED[role]
            whole = {need: given(need) for need in derived.needs}
            check_shapes(item.key, whole)
            size = grid.cell_size(whole[derived.needs[0]].size, resolution)
            parts = {need: grid.fitted(image, size) for need, image in whole.items()}
            pictures.append(derived.make(parts, rng))
    return tuple(pictures)


def content(task: Task, item: Item) -> str:
    return item.texts.get(task.content, "") if task.content else ""
