"""The mixture: example i, drawn from all tasks and sources, is a function of (seed, i) alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from visualcloze_deft import grid
from visualcloze_deft.data.derive import DERIVED, missing
from visualcloze_deft.data.item import Item, Source
from visualcloze_deft.errors import UserError
from visualcloze_deft.registry import Task, usual
from visualcloze_deft.settings import Recipe


class NoItems(UserError):
    """No item of a source has all the roles of a task."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """One training sample: complete rows, the columns hidden in the last one, and the words."""

    index: int
    task: str
    keys: tuple[str, ...]
    rows: tuple[tuple[Image.Image, ...], ...]
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
        source = sources[rng.integers(len(sources))]
        items = draw_items(source, task, self._rows(index), rng)
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


def serving(task: Task, sources: Sequence[Source]) -> list[Source]:
    """The sources that have, or from which one can derive, every role of `task`.

    Where no single item has them all, the sources whose items have them between them: drawing from
    those raises `NoItems`.
    """
    found = [source for source in sources if not missing(task.roles, source.roles)]
    if not found:
        lacks = "; ".join(
            f"{source.name} lacks {', '.join(sorted(missing(task.roles, source.roles)))}"
            for source in sources
        )
        raise UserError(f"task {task.name}: no data source has all its roles ({lacks})")
    return [source for source in found if serves(source, task)] or found


def serves(source: Source, task: Task) -> bool:
    """Whether at least one item has all the roles; looks no further than the first that has."""
    if missing(task.roles, source.roles):
        return False
    return any(
        not missing(task.roles, frozenset(source.item(i).images)) for i in range(len(source))
    )


def draw_items(
    source: Source, task: Task, count: int, rng: np.random.Generator
) -> tuple[Item, ...]:
    """`count` different items that have the task's roles; fewer where the source has no more."""
    items: list[Item] = []
    tried: set[int] = set()
    while len(items) < count:
        index = int(rng.integers(len(source)))
        if index in tried:
            if len(tried) == len(source):
                break
            continue
        tried.add(index)
        item = source.item(index)
        if not missing(task.roles, frozenset(item.images)):
            items.append(item)
    if not items:
        raise NoItems(f"{source.name}: no item has the roles of {task.name}: {task.roles}")
    return tuple(items)


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
            size = grid.cell_size(given(derived.needs[0]).size, resolution)
            parts = {need: grid.fitted(given(need), size) for need in derived.needs}
            pictures.append(derived.make(parts, rng))
    return tuple(pictures)


def content(task: Task, item: Item) -> str:
    return item.texts.get(task.content, "") if task.content else ""
