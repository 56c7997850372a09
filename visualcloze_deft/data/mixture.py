"""The mixture: example i, drawn from all tasks and sources, is a function of (seed, i) alone."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from visualcloze_deft import grid
from visualcloze_deft.cells import CELL_STEP, Cells, row_sizes
from visualcloze_deft.data.derive import DERIVED, check_shapes, missing
from visualcloze_deft.data.item import Item, Source
from visualcloze_deft.errors import UserError
from visualcloze_deft.prompt import Prompt
from visualcloze_deft.registry import Task, usual
from visualcloze_deft.settings import Recipe

MOST_SKIPPED = 20  # items for one grid that cannot be read, before the data is called broken
NONE_LEFT = -1


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """An item that could not be read, and why."""

    source: str
    item: str
    why: str


@dataclass(frozen=True, kw_only=True)
class Example:
    """One sample: rows of cells, the columns hidden in the last one, and the words.

    Rows are complete, but for hidden pictures that nobody has. skipped: what was drawn first and
    could not be read.
    """

    index: int
    task: str
    keys: tuple[str, ...]
    rows: tuple[tuple[Image.Image | None, ...], ...]
    hidden: tuple[bool, ...]
    task_sentence: str
    content: str
    skipped: tuple[Skipped, ...] = ()

    @property
    def complete(self) -> tuple[tuple[Image.Image, ...], ...]:
        """The rows of an example all of whose pictures are known."""
        rows = tuple(tuple(cell for cell in row if cell is not None) for row in self.rows)
        assert [*map(len, rows)] == [*map(len, self.rows)]
        return rows

    @property
    def prompt(self) -> Prompt:
        rows, columns = len(self.rows), len(self.rows[0])
        return Prompt(rows=rows, columns=columns, task=self.task_sentence, content=self.content)


class Mixture:
    """An endless sequence of examples of `tasks` drawn from `sources`.

    resolution: the side of a square cell in pixels. cells: their shape, see `cells.Cells`. weights:
    task name -> relative frequency (1 where not named). Raises `UserError` where a task finds no
    source with its roles.
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
    ) -> None:
        self.tasks = dict(tasks)
        self.names = list(tasks)
        self.sources = tuple(sources)
        self.seed = seed
        self.resolution = resolution
        self.cells = cells
        self.recipe = recipe or Recipe()
        self.serving = {name: serving(task, sources) for name, task in self.tasks.items()}
        given = [(weights or {}).get(name, 1.0) for name in self.tasks]
        if not any(given):
            raise UserError("every task has weight 0; see data.weights and --tasks")
        self.proportions = np.array(given) / sum(given)

    def tokens(self, index: int) -> int:
        """About how many tokens the grid of example `index` has; no picture is read."""
        columns = len(self.tasks[self._name(np.random.default_rng([self.seed, index]))].roles)
        return self._rows(index) * columns * (self.resolution // CELL_STEP) ** 2

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
        drawn = zip(self.names, self.proportions, strict=True)
        return {len(self.tasks[name].roles) * cell for name, p in drawn if p}

    def _name(self, rng: np.random.Generator) -> str:
        """The task of the example whose generator this is: the first that is drawn."""
        return self.names[rng.choice(len(self.names), p=self.proportions)]

    def __getitem__(self, index: int) -> Example:
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
        silent = rng.random() < recipe.drop_text
        varied = rng.random() < recipe.paraphrase

        def words(phrases: Sequence[str]) -> str:
            return phrases[int(rng.integers(len(phrases)))] if varied else usual(phrases)

        items, rows, skipped = self.read(able, places, order, index)
        return Example(
            index=index,
            task=name,
            keys=tuple(item.key for item in items),
            rows=rows,
            hidden=hidden,
            task_sentence=task.sentence(order, words) if say_task and not silent else "",
            content=content(task, items[-1]) if say_content and not silent else "",
            skipped=skipped,
        )

    def read(
        self, able: Able, places: Sequence[int], order: Sequence[str], index: int
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
        self, able: Able, place: int, order: Sequence[str], index: int, number: int
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

    def choose(self, count: int, rng: np.random.Generator) -> list[int]:
        """The places of `count` different items, or of all where there are no more."""
        found: list[int] = rng.choice(len(self), min(count, len(self)), replace=False).tolist()
        return found

    def others(self, taken: Collection[int], rng: np.random.Generator) -> Iterator[int]:
        """The places of all items but those `taken`, in a drawn order."""
        for place in rng.permutation(len(self)).tolist():  # drawn when the first one is asked for
            if place not in taken:
                yield place

    def item(self, place: int) -> Item:
        return self.source.item(self.index(place))

    def index(self, place: int) -> int:
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
    item: Item, order: Sequence[str], resolution: int, cells: Cells, rng: np.random.Generator
) -> tuple[Image.Image, ...]:
    """The item's pictures in the roles of `order`, as cells.

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
    sizes = row_sizes([picture(role).size for role in shown], resolution, cells)
    pictures = []
    for role, size in zip(order, sizes, strict=True):
        if role in item.images:
            pictures.append(cell(role, size))
        else:
            derived = DERIVED[role]
            check_shapes(item.key, {need: picture(need) for need in derived.needs})
            pictures.append(derived.make({need: cell(need, size) for need in derived.needs}, rng))
    return tuple(pictures)


def content(task: Task, item: Item) -> str:
    return item.texts.get(task.content, "") if task.content else ""
