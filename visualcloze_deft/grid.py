"""The VisualCloze grid (arXiv 2504.07960): rows of images to strips, tokens, ids, text, and back.

A row joined side by side is a strip; every strip is encoded as one picture and stays a sequence of
its own. Axes: b batch, c channels, h w pixels or latents, p q patch (2 x 2), i j pixels of one
latent (8 x 8), n tokens. Pixels are in -1..1.
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

VAE_SCALE = 8  # pixels a side per latent, FLUX's autoencoder
PATCH = 2  # latents a side per token
CELL_STEP = VAE_SCALE * PATCH
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


@dataclass(frozen=True, kw_only=True)
class Latents:
    """Grids of one shape as tokens. clean, seen: (b, n, 64); mask: (b, n, 256); ids: (n, 3)."""

    clean: Tensor
    seen: Tensor
    mask: Tensor
    ids: Tensor

    def inputs(self, noisy: Tensor) -> Tensor:
        """What the transformer reads: 64 noisy + 64 seen + 256 mask values per token."""
        return torch.cat([noisy, self.seen, self.mask], dim=-1)  # b n 384

    @property
    def is_target(self) -> Tensor:
        """(b, n), 1 for tokens that are generated."""
        return self.mask.mean(dim=-1)


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


def fitted(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resized to cover `size` (width, height), the rest cropped evenly."""
    if image.size == size:
        return image
    return ImageOps.fit(image, size, Image.Resampling.LANCZOS)


def to_pixels(image: Image.Image, size: tuple[int, int]) -> Tensor:
    """(3, h, w) in -1..1; `fitted` to `size`."""
    values = np.array(fitted(image, size).convert("RGB"))
    return torch.from_numpy(values).permute(2, 0, 1).float() / 127.5 - 1


def to_image(pixels: Tensor) -> Image.Image:
    """The inverse of `to_pixels` for one (3, h, w) tensor."""
    values = ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte()
    return Image.fromarray(rearrange(values, "c h w -> h w c").cpu().numpy())


def check_rows(rows: Sequence[Row]) -> None:
    """Raise `UserError` unless `rows` is a grid with something to generate in its last row."""
    if not rows or not rows[-1]:
        raise UserError("the grid has no rows; give at least the query row")
    for k, row in enumerate(rows, 1):
        if len(row) != len(rows[0]):
            raise UserError(
                f"rows differ in length: row 1 has {len(rows[0])} images, row {k} has {len(row)}"
            )
        if k < len(rows) and any(image is None for image in row):
            raise UserError(f"row {k} is an example and has a hole; only the last row may have one")
    if all(image is not None for image in rows[-1]):
        raise UserError("no target: the last row has no null, so there is nothing to generate")
    if len(rows) == 1 and all(image is None for image in rows[0]):
        raise UserError("the grid shows no image at all; give at least one")


def build(rows: Sequence[Row], *, resolution: int, hidden: Sequence[bool] | None = None) -> Grid:
    """Rows of images to a `Grid`. A row takes its size from its first image.

    `hidden` marks the columns to hide in the last row; by default those that are None. A query
    row without any image takes the size of the row above.
    """
    hidden = hidden or [image is None for image in rows[-1]]
    strips, masks, widths = [], [], []
    size = (resolution, resolution)
    for r, row in enumerate(rows):
        known = [image for image in row if image is not None]
        size = cell_size(known[0].size, resolution) if known else size
        width, height = size
        blank = torch.full((3, height, width), BLANK)
        cells = [blank if image is None else to_pixels(image, size) for image in row]
        marks = hidden if r == len(rows) - 1 else [False] * len(row)
        strips.append(torch.cat(cells, dim=2))
        masks.append(torch.cat([torch.full((1, height, width), float(m)) for m in marks], dim=2))
        widths.append((width,) * len(row))
    return Grid(strips=tuple(strips), hidden=tuple(masks), widths=tuple(widths))


def cells(strip: Tensor, widths: Sequence[int]) -> tuple[Tensor, ...]:
    """A (..., h, w) strip of pixels cut into its cells."""
    return strip.split(list(widths), dim=-1)


def pack(latent: Tensor) -> Tensor:
    """(b, c, h, w) latents to (b, n, 4 c) tokens, FLUX's order."""
    return rearrange(latent, "b c (h p) (w q) -> b (h w) (c p q)", p=PATCH, q=PATCH)


def unpack(tokens: Tensor, shape: Sequence[tuple[int, int]]) -> tuple[Tensor, ...]:
    """The inverse of `pack` for a whole grid: (b, n, 64) to one (b, 16, h, w) latent a strip.

    `shape`: (height, width) of each strip in pixels, as in `Grid.shape`.
    """
    sides = [(h // CELL_STEP, w // CELL_STEP) for h, w in shape]
    parts = tokens.split([h * w for h, w in sides], dim=1)
    return tuple(
        rearrange(part, "b (h w) (c p q) -> b c (h p) (w q)", h=h, p=PATCH, q=PATCH)
        for part, (h, w) in zip(parts, sides, strict=True)
    )


def pack_mask(mask: Tensor) -> Tensor:
    """(b, 1, h, w) pixel masks to (b, n, 256) tokens: 8 x 8 pixels become channels, then pack."""
    folded = rearrange(mask, "b 1 (h i) (w j) -> b (i j) h w", i=VAE_SCALE, j=VAE_SCALE)
    return pack(folded)


def position_ids(shape: Sequence[tuple[int, int]]) -> Tensor:
    """(n, 3) ids: row of the grid counted from 1, then y and x over the joined strip."""
    rows = []
    for index, (height, width) in enumerate(shape, 1):
        y, x = torch.meshgrid(
            torch.arange(height // CELL_STEP), torch.arange(width // CELL_STEP), indexing="ij"
        )
        rows.append(torch.stack([torch.full_like(y, index), y, x], dim=-1).reshape(-1, 3))
    return torch.cat(rows).float()


def layout_sentence(rows: int, columns: int) -> str:
    """VisualCloze's first sentence, word for word what its released weights were trained on."""
    return (
        f"A grid layout with {rows} rows and {columns} columns, "
        f"displaying {rows * columns} images arranged side by side."
    )


CONTENT_PREFIX = "The last image of the last row depicts:"  # VisualCloze's words


def prompt(rows: int, columns: int, *, task: str = "", content: str = "") -> str:
    """The whole text of a grid: layout, task and content sentence; empty parts are left out."""
    depicts = f"{CONTENT_PREFIX} {content}" if content else ""
    return " ".join(part for part in (layout_sentence(rows, columns), task, depicts) if part)
