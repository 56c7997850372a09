"""The VisualCloze grid (arXiv 2504.07960): rows of images to strips of pixels, and back.

A row joined side by side is a strip; every strip is encoded as one picture. Axes: c channels,
h w pixels. Pixels are in -1..1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageOps
from torch import Tensor

from visualcloze_deft.errors import UserError
from visualcloze_deft.grids.cell_sizes import Cells, row_sizes

MOST_ASPECT = 16  # longer side over shorter: what is longer is no picture of a cell
BLANK = -1.0  # what a hidden cell shows: black, as in diffusers' VisualClozeProcessor

Row = Sequence[Image.Image | None]


@dataclass(frozen=True, kw_only=True)
class Grid:
    """One sample in pixels, row by row.

    strips: (3, h, w) each, hidden cells as they are known (training) or blank (inference).
    hidden: (1, h, w) each, 1 where the model must generate.
    widths: the cells' widths in pixels, left to right.
    """

    strips: tuple[Tensor, ...]
    hidden: tuple[Tensor, ...]
    widths: tuple[tuple[int, ...], ...]

    @property
    def seen(self) -> tuple[Tensor, ...]:
        """The strips as the model sees them: hidden cells blank."""
        return tuple(
            torch.where(hidden > 0, BLANK, strip)
            for strip, hidden in zip(self.strips, self.hidden, strict=True)
        )

    @property
    def shape(self) -> tuple[tuple[int, int], ...]:
        """(height, width) of each strip; samples of one shape can share a batch."""
        return tuple((strip.shape[1], strip.shape[2]) for strip in self.strips)


def fitted(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resized to cover `size` (width, height), the rest cropped evenly."""
    if image.size == size:
        return image
    return ImageOps.fit(image, size, Image.Resampling.LANCZOS)


def to_pixels(image: Image.Image) -> Tensor:
    """(3, h, w) in -1..1."""
    return pixels_of(np.asarray(image.convert("RGB")))


def pixels_of(values: np.ndarray) -> Tensor:
    """(h, w, 3) bytes to (3, h, w) in -1..1."""
    channels = np.array(rearrange(values, "h w c -> c h w"), order="C")  # its own, to be written
    return torch.from_numpy(channels).float().div_(127.5).sub_(1)


def to_image(pixels: Tensor) -> Image.Image:
    """The inverse of `to_pixels` for one (3, h, w) tensor."""
    values = ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte()
    return Image.fromarray(rearrange(values, "c h w -> h w c").cpu().numpy())


def check_aspect(size: tuple[int, int]) -> None:
    """Raise `UserError` for a picture too long for a cell, whose strip would be longer still."""
    width, height = size
    if max(width, height) > MOST_ASPECT * min(width, height):
        raise UserError(
            f"a picture of {width} x {height} pixels: more than {MOST_ASPECT} times as long as "
            "wide; cut it"
        )


def check_rows(rows: Sequence[Sequence[object]]) -> None:
    """Raise `UserError` unless `rows` is a grid with something to generate in its last row."""
    if not rows or not rows[-1]:
        raise UserError("rows: the grid has no rows; give at least the query row")
    for k, row in enumerate(rows, 1):
        if len(row) != len(rows[0]):
            raise UserError(
                f"rows differ in length: row 1 has {len(rows[0])} images, row {k} has {len(row)}"
            )
        if k < len(rows) and any(image is None for image in row):
            raise UserError(f"row {k} is an example and has a hole; only the last row may have one")
    for row in rows:
        for image in row:
            if isinstance(image, Image.Image):
                check_aspect(image.size)
    if all(image is not None for image in rows[-1]):
        raise UserError(
            "no target: the last row has no null (None), so there is nothing to generate"
        )
    if len(rows) == 1 and all(image is None for image in rows[0]):
        raise UserError("rows: the grid shows no image at all; give at least one")


def build(
    rows: Sequence[Row],
    *,
    resolution: int,
    hidden: Sequence[bool] | None = None,
    cells: Cells = "row",
) -> Grid:
    """Rows of pictures of any size to a `Grid`, see `row_sizes`.

    `hidden` marks the columns to hide in the last row; by default those that are None.
    """
    found: list[list[Image.Image]] = []
    sizes: list[tuple[int, int]] = []
    for row in rows:
        sizes = row_sizes(
            [image.size if image else None for image in row], resolution, cells, sizes
        )
        found.append(
            [
                Image.new("RGB", size) if image is None else fitted(image, size)
                for image, size in zip(row, sizes, strict=True)
            ]
        )
    return join(found, hidden=hidden or [image is None for image in rows[-1]])


def join(rows: Sequence[Sequence[Image.Image]], *, hidden: Sequence[bool]) -> Grid:
    """Rows of cells, those of a row of one height, to a `Grid`; `hidden` marks columns of the
    last."""
    strips, masks, widths = [], [], []
    for r, row in enumerate(rows):
        values = np.concatenate([np.asarray(image.convert("RGB")) for image in row], axis=1)
        strips.append(pixels_of(values))
        own = tuple(image.width for image in row)
        mask = torch.zeros(1, row[0].height, sum(own))
        if r == len(rows) - 1:
            for cell, mark in zip(cells(mask, own), hidden, strict=True):
                cell.fill_(float(mark))
        masks.append(mask)
        widths.append(own)
    return Grid(strips=tuple(strips), hidden=tuple(masks), widths=tuple(widths))


def cells(strip: Tensor, widths: Sequence[int]) -> tuple[Tensor, ...]:
    """A (..., h, w) strip of pixels cut into its cells."""
    return strip.split(list(widths), dim=-1)
