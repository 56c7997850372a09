"""Nodes for the rows of a grid: examples, and the query whose missing images are generated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor

from .host import CATEGORY
from .pictures import pictures_of

COLUMNS = 6  # sockets of a row
Rows = tuple[tuple[Image.Image, ...], ...]


def _sockets(tooltip: str) -> dict[str, Any]:
    return {
        f"image_{k}": ("IMAGE", {"tooltip": tooltip.format(k=k)}) for k in range(1, COLUMNS + 1)
    }


def columns_of(images: Mapping[str, Tensor | None]) -> dict[int, list[Image.Image]]:
    """Column, counted from 1, -> its pictures, of the connected sockets `image_1`, ..."""
    named = {int(name.removeprefix("image_")): batch for name, batch in images.items()}
    return {
        k: pictures_of(batch, f"image_{k}")
        for k, batch in sorted(named.items())
        if batch is not None
    }


def lengthened(columns: Mapping[int, list[Image.Image]]) -> dict[int, list[Image.Image]]:
    """All columns with as many pictures as the longest; a single picture is repeated.

    Raises `ValueError` where batches differ otherwise.
    """
    most = max(map(len, columns.values()))
    for k, column in columns.items():
        if len(column) not in (1, most):
            raise ValueError(
                f"image_{k} has {len(column)} images, another column has {most}: give batches of "
                "one length, or single images"
            )
    return {k: column * (most // len(column)) for k, column in columns.items()}


class ExampleRows:
    """Complete rows that show the task. A batch in each column gives one row per image."""

    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Rows of images that show the task, in the order of its columns. Single images give one "
        "row; batches (conditions in image_1, results in image_2) give one row for each image."
    )
    FUNCTION = "add"
    RETURN_TYPES = ("VCDEFT_ROWS",)
    RETURN_NAMES = ("examples",)
    OUTPUT_TOOLTIPS = ("The rows, for a further node of this kind or for VisualCloze Generate.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        above = {"examples": ("VCDEFT_ROWS", {"tooltip": "Rows that stand above these."})}
        words = "Column {k} of the rows: one image, or a batch with one image for each row."
        return {"required": {}, "optional": above | _sockets(words)}

    def add(self, examples: Rows = (), **images: Tensor) -> tuple[Rows]:
        columns = columns_of(images)
        if not columns or list(columns) != list(range(1, len(columns) + 1)):
            raise ValueError(
                f"example rows: images in columns {list(columns)}: connect them from image_1 on, "
                "without a gap"
            )
        new = tuple(zip(*lengthened(columns).values(), strict=True))
        if examples and len(examples[0]) != len(columns):
            raise ValueError(
                f"example rows: {len(columns)} columns here and {len(examples[0])} in the rows "
                "above; give as many images"
            )
        return (examples + new,)


@dataclass(frozen=True, kw_only=True)
class Query:
    """Rows to complete, one for each picture of a batch. pictures: column from 1 -> of each row.
    generate: the columns that are generated; () for all without a picture."""

    pictures: Mapping[int, list[Image.Image]]
    generate: tuple[int, ...]

    def rows(self, columns: int) -> list[list[Image.Image | None]]:
        """Every row with None for the images to generate.

        Raises `ValueError` where a column is missing, or beyond the last one.
        """
        wanted = self.generate or tuple(k for k in range(1, columns + 1) if k not in self.pictures)
        if beyond := sorted(k for k in {*self.pictures, *wanted} if k > columns):
            k = beyond[0]
            way = f"disconnect image_{k}" if k in self.pictures else "name another to generate"
            raise ValueError(f"query row: column {k} of a grid with {columns} columns; {way}")
        known = {k: pictures for k, pictures in self.pictures.items() if k not in wanted}
        if gaps := [k for k in range(1, columns + 1) if k not in known and k not in wanted]:
            raise ValueError(
                f"query row: column {gaps[0]} has no image and is not generated; connect "
                f"image_{gaps[0]} or add {gaps[0]} to generate"
            )
        if not known:
            return [[None] * columns]
        return [
            [row.get(k) for k in range(1, columns + 1)]
            for row in (
                {k: pictures[r] for k, pictures in known.items()}
                for r in range(len(next(iter(known.values()))))
            )
        ]


def columns_named(text: str) -> tuple[int, ...]:
    """The numbers in a text such as "2" or "2, 3"; () of an empty one.

    Raises `ValueError` for other words and for numbers that are no column.
    """
    words = text.replace(",", " ").split()
    if not all(word.isdecimal() and 1 <= int(word) <= COLUMNS for word in words):
        raise ValueError(f"generate {text!r}: give numbers of columns, e.g. 2 or 2, 3, or nothing")
    return tuple(sorted({int(word) for word in words}))


class QueryRow:
    """The last row of a grid, some of whose images are to be generated."""

    CATEGORY = CATEGORY
    DESCRIPTION = (
        "The row to complete. Columns without an image are generated, or those that you name. "
        "A batch in a column gives one grid for each image."
    )
    FUNCTION = "ask"
    RETURN_TYPES = ("VCDEFT_QUERY",)
    RETURN_NAMES = ("query",)
    OUTPUT_TOOLTIPS = ("The row, for VisualCloze Generate.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        words = "Columns to generate, e.g. 2 or 2, 3. Empty: all columns without an image."
        generate = {"generate": ("STRING", {"default": "", "tooltip": words})}
        return {
            "required": generate,
            "optional": _sockets("Column {k}: one image, or a batch with one image for each grid."),
        }

    def ask(self, generate: str, **images: Tensor) -> tuple[Query]:
        wanted, columns = columns_named(generate), columns_of(images)
        columns = {k: pictures for k, pictures in columns.items() if k not in wanted}
        return (Query(pictures=lengthened(columns) if columns else {}, generate=wanted),)
