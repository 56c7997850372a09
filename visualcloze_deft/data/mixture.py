"""The mixture: example i, drawn from all tasks and sources, is a function of (seed, i) alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from visualcloze_deft.config.run_settings import Recipe
from visualcloze_deft.data.base import Item, Source
from visualcloze_deft.data.derive import DERIVED, misfits
from visualcloze_deft.data.eligible import EligibleItems, sources_for
from visualcloze_deft.data.example import Example, Skipped
from visualcloze_deft.errors import UserError
from visualcloze_deft.grids import grid
from visualcloze_deft.grids.cell_sizes import CELL_STEP, Cells, row_sizes
from visualcloze_deft.task_registry.task import Task, Words, first_phrase

MOST_SKIPPED = 20  # items for one grid that cannot be read, before the data is called broken
NONE_LEFT = -1


@dataclass(frozen=True, kw_only=True)
class Prior:
    """Examples of the class of a subject, for prior preservation (arXiv 2208.12242).

    share: of all examples, spread evenly over them.
    """

    mixture: Mixture
    share: float

    def takes(self, index: int) -> bool:
        """Whether example `index` is one of the class."""
        return math.floor((index + 1) * self.share) > math.floor(index * self.share)


class Mixture:
    """An endless sequence of examples of `tasks` drawn from `sources`.

    resolution: the side of a square cell in pixels. cells: their shape, see `cell_sizes.Cells`.
    weights: task name -> relative frequency (1 where not named). prior: what is drawn beside
    `tasks`. Raises `UserError` where a task finds no source with its roles.
    """

    def __init__(
        self,
        tasks: Mapping[str, Task],
        sources: Sequence[Source],
        *,
        seed: int,
        resolution: int,
        cells: Cells = "row",
        recipe: Recipe | None = None,
        weights: Mapping[str, float] | None = None,
        prior: Prior | None = None,
    ) -> None:
        self.tasks = dict(tasks)
        self.names = list(tasks)
        self.sources = tuple(sources)
        self.seed = seed
        self.resolution = resolution
        self.cells = cells
        self.recipe = recipe or Recipe()
        self.prior = prior
        self.serving = {name: sources_for(task, sources) for name, task in self.tasks.items()}
        given = [(weights or {}).get(name, 1.0) for name in self.tasks]
        if not any(given):
            raise UserError("every task has weight 0; see data.weights and --tasks")
        self.proportions = np.array(given) / sum(given)

    def tokens(self, index: int) -> int:
        """About how many tokens the grid of example `index` has; no picture is read."""
        if self.prior and self.prior.takes(index):
            return self.prior.mixture.tokens(index)
        columns = len(self.tasks[self._name(np.random.default_rng([self.seed, index]))].roles)
        return self._rows(index) * columns * (self.resolution // CELL_STEP) ** 2

    @property
    def whole(self) -> tuple[Mixture, ...]:
        """This mixture, and that of its prior."""
        return (self, self.prior.mixture) if self.prior else (self,)

    @property
    def most_tokens(self) -> int:
        """The most that `tokens` gives for any example."""
        return max(self._sizes())

    @property
    def least_tokens(self) -> int:
        """The least that `tokens` gives for any example."""
        return min(self._sizes())

    @property
    def widest_strip(self) -> int:
        """About the most tokens of one row of any example."""
        return max(self._strips())

    def _sizes(self) -> list[int]:
        """What `tokens` gives: for each number of rows and of columns that are drawn."""
        rows = [k for k, weight in enumerate(self.recipe.examples, 1) if weight]
        return [r * strip for r in rows for strip in self._strips()]

    def _strips(self) -> set[int]:
        """About the tokens of a row, for each number of columns that are drawn."""
        cell = (self.resolution // CELL_STEP) ** 2
        return {
            len(one.tasks[name].roles) * cell
            for one in self.whole
            for name, p in zip(one.names, one.proportions, strict=True)
            if p
        }

    def _name(self, rng: np.random.Generator) -> str:
        """The task of the example whose generator this is: the first that is drawn."""
        return self.names[rng.choice(len(self.names), p=self.proportions)]

    def __getitem__(self, index: int) -> Example:
        if self.prior and self.prior.takes(index):
            return self.prior.mixture[index]
        rng = np.random.default_rng([self.seed, index])
        name = self._name(rng)
        task, recipe = self.tasks[name], self.recipe
        sources = self.serving[name]
        able = sources[rng.integers(len(sources))]
        places = able.choose(self._rows(index), rng)
        order = self._order(task, rng)
        if rng.random() < recipe.hide_target:
            hidden = tuple(role in task.targets for role in order)
        else:
            hidden = tuple(np.arange(len(order)) == rng.integers(len(order)))
        say_task, say_content = rng.random(2) < (recipe.keep_task, recipe.keep_content)
        silent = rng.random() < recipe.caption_dropout
        varied = rng.random() < recipe.paraphrase

        def words(phrases: Sequence[str]) -> str:
            return phrases[int(rng.integers(len(phrases)))] if varied else first_phrase(phrases)

        items, rows, skipped = self.read(able, places, order, index)
        return Example(
            index=index,
            task=name,
            keys=tuple(item.key for item in items),
            rows=rows,
            hidden=hidden,
            task_sentence=task.sentence(order, words) if say_task and not silent else "",
            content=content(task, items[-1], words) if say_content and not silent else "",
            skipped=skipped,
        )

    def read(
        self, able: EligibleItems, places: Sequence[int], order: Sequence[str], index: int
    ) -> tuple[tuple[Item, ...], tuple[tuple[Image.Image, ...], ...], tuple[Skipped, ...]]:
        """The items at `places`, a row of cells in the roles of `order` of each, and what could
        not be read: in its place comes another, drawn from (seed, index)."""
        items, rows, skipped = [], [], []
        others = able.others(places, np.random.default_rng([self.seed, index, 3]))
        for k, place in enumerate(places):
            while isinstance(found := self.row(able, place, order, index, k), Skipped):
                skipped.append(found)
                place = next(others, NONE_LEFT)
                if place == NONE_LEFT or len(skipped) == MOST_SKIPPED:
                    raise UserError(
                        f"{found.source}: {len(skipped)} items in turn cannot be read, the last: "
                        f"{found.why}"
                    )
            item, row = found
            items.append(item)
            rows.append(row)
        return tuple(items), tuple(rows), tuple(skipped)

    def row(
        self, able: EligibleItems, place: int, order: Sequence[str], index: int, number: int
    ) -> tuple[Item, tuple[Image.Image, ...]] | Skipped:
        """An item and its pictures, as row `number` of example `index`."""
        rng = np.random.default_rng([self.seed, index, 2, number])
        key = f"item {able.index(place)}"
        try:
            item = able.item(place)
            key = item.key
            return item, row_of(item, order, self.resolution, self.cells, rng)
        except UserError as error:
            return Skipped(source=able.source.name, item=key, why=str(error))

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


def row_of(
    item: Item, order: Sequence[str], resolution: int, cells: Cells, rng: np.random.Generator
) -> tuple[Image.Image, ...]:
    """The item's pictures in the roles of `order`, as cells. Raises `UserError` where they do not
    lie upon one another, see `misfits`.

    Those that the source lacks are derived at the size of a cell, so that noise or small squares
    are seen as strong as they are made.
    """
    given: dict[str, Image.Image] = {}
    fits: dict[tuple[str, tuple[int, int]], Image.Image] = {}

    def picture(role: str) -> Image.Image:
        if role not in given:
            given[role] = item.image(role)
        return given[role]

    def cell(role: str, size: tuple[int, int]) -> Image.Image:
        if (role, size) not in fits:
            fits[role, size] = grid.fitted(picture(role), size)
        return fits[role, size]

    shown = [role if role in item.images else DERIVED[role].needs[0] for role in order]
    made = [DERIVED[role].needs for role in order if role not in item.images]
    used = dict.fromkeys([*shown, *(need for needs in made for need in needs)])
    for why in misfits({role: picture(role).size for role in used}).values():
        raise UserError(f"{item.key}: {why}")
    for role in shown:
        grid.check_aspect(picture(role).size)
    sizes = row_sizes([picture(role).size for role in shown], resolution, cells)
    pictures = []
    for role, size in zip(order, sizes, strict=True):
        if role in item.images:
            pictures.append(cell(role, size))
        else:
            derived = DERIVED[role]
            pictures.append(derived.make({need: cell(need, size) for need in derived.needs}, rng))
    return tuple(pictures)


def content(task: Task, item: Item, words: Words = first_phrase) -> str:
    """The content sentence of an item; words: chooses where it can be said in several ways."""
    if said := item.phrasings.get(task.content):
        return words(said)
    read = item.texts.get(task.content) or item.texts.get(item.instead.get(task.content, ""))
    return read or ""
