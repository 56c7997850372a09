"""The shapes of cells in pixels: FLUX's latents, VisualCloze's area, and no pictures."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Literal

VAE_SCALE = 8  # pixels a side per latent, FLUX's autoencoder
PATCH = 2  # latents a side per token
CELL_STEP = VAE_SCALE * PATCH

Shape = tuple[tuple[int, int], ...]  # (height, width) of each strip of a grid, in pixels
Cells = Literal["row", "own", "square"]
"""The shape of cells: "row", all of a row in that of its first picture, as VisualCloze generates;
"own", each in its picture's; "square", as VisualCloze was trained."""


def cell_size(image_size: tuple[int, int], resolution: int) -> tuple[int, int]:
    """(width, height) of a cell: area near `resolution` squared, sides divisible by 16.

    The same rounding as diffusers' VisualClozeProcessor.

    >>> cell_size((640, 480), 384)
    (432, 320)
    """
    width, height = image_size
    new_height = int((resolution**2 * height / width) ** 0.5)
    new_width = int(new_height * width / height)
    return (
        max(new_width // CELL_STEP, 1) * CELL_STEP,
        max(new_height // CELL_STEP, 1) * CELL_STEP,
    )


def by_shape(shapes: Sequence[Hashable]) -> list[list[int]]:
    """The places of equal shapes together, in the order in which each shape comes first: grids of
    one shape share a batch. Padding would not do better: mixed lists have many of each shape.

    >>> by_shape([((16, 32),), ((32, 32),), ((16, 32),)])
    [[0, 2], [1]]
    """
    places: dict[Hashable, list[int]] = {}
    for place, shape in enumerate(shapes):
        places.setdefault(shape, []).append(place)
    return list(places.values())


def strip_shapes(
    sizes: Sequence[Sequence[tuple[int, int] | None]], resolution: int, cells: Cells = "row"
) -> Shape:
    """(height, width) of each strip of a grid whose images have these (width, height).

    >>> strip_shapes([[(64, 32), None], [None, None]], 64)
    ((32, 160), (32, 160))
    """
    rows = grid_cells(sizes, resolution, cells)
    return tuple((row[0][1], sum(width for width, _ in row)) for row in rows)


def grid_cells(
    sizes: Sequence[Sequence[tuple[int, int] | None]], resolution: int, cells: Cells = "row"
) -> list[list[tuple[int, int]]]:
    """(width, height) of every cell of a grid, see `row_sizes`."""
    rows: list[list[tuple[int, int]]] = []
    for row in sizes:
        rows.append(row_sizes(row, resolution, cells, rows[-1] if rows else ()))
    return rows


def row_sizes(
    sizes: Sequence[tuple[int, int] | None],
    resolution: int,
    cells: Cells = "row",
    above: Sequence[tuple[int, int]] = (),
) -> list[tuple[int, int]]:
    """(width, height) of each cell of a row, from those of its pictures, None where there is none.

    All of one height, divisible by 16, with about `resolution` squared pixels a cell. above: the
    cells of the row before, whose shape a row without pictures takes, with "own" also a cell.

    >>> row_sizes([(640, 480), (480, 640)], 384)
    [(432, 320), (432, 320)]
    >>> row_sizes([(640, 480), (480, 640)], 384, "own")
    [(512, 384), (288, 384)]
    """
    if cells == "square":
        return [(resolution, resolution)] * len(sizes)
    if not any(sizes) and above:
        return list(above)
    first = next((size for size in sizes if size), (resolution, resolution))
    if cells == "row":
        return [cell_size(first, resolution)] * len(sizes)
    shapes = [size or (above[k] if above else first) for k, size in enumerate(sizes)]
    aspects = [width / height for width, height in shapes]
    exact = (len(aspects) * resolution**2 / sum(aspects)) ** 0.5
    height = max(round(exact / CELL_STEP), 1) * CELL_STEP
    return [(max(round(height * a / CELL_STEP), 1) * CELL_STEP, height) for a in aspects]
