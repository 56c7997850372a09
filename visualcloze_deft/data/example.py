"""An example: the rows of a grid before they are pixels, and what could not be read for it."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image

from visualcloze_deft.grids.prompt import Prompt


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
