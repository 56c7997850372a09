"""Pictures to look at: grids as people read them, rows under rows, words above."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

GAP, PAPER, INK, MARK = 6, "white", (40, 40, 40), (214, 60, 60)
TITLE_LINES = 5

Cells = Sequence[Sequence[Image.Image | None]]


def draw_grid(
    rows: Cells, *, title: str = "", made: Sequence[tuple[int, int]] = (), cell: int = 128
) -> Image.Image:
    """One grid; `made` lists (row, column) of generated cells, which get a red frame.

    Cells keep their aspect inside `cell` x `cell` pixels; missing ones are drawn as "?".
    """
    font = caption_font()
    width = max(len(row) for row in rows) * (cell + GAP) + GAP
    lines = textwrap.wrap(title, max(width // 6, 12), max_lines=TITLE_LINES, placeholder=" ...")
    top = GAP + 14 * len(lines)
    page = Image.new("RGB", (width, top + len(rows) * (cell + GAP) + GAP), PAPER)
    pen = ImageDraw.Draw(page)
    for k, line in enumerate(lines):
        pen.text((GAP, GAP // 2 + 14 * k), line, fill=INK, font=font)
    for r, row in enumerate(rows):
        for c, image in enumerate(row):
            x, y = GAP + c * (cell + GAP), top + GAP + r * (cell + GAP)
            if image is None:
                pen.rectangle((x, y, x + cell - 1, y + cell - 1), outline=MARK)
                pen.text((x + cell // 2 - 4, y + cell // 2 - 7), "?", fill=MARK, font=font)
                continue
            shown = enlarge(image, cell)
            left, upper = x + (cell - shown.width) // 2, y + (cell - shown.height) // 2
            page.paste(shown, (left, upper))
            if (r, c) in made:
                frame = (left - 2, upper - 2, left + shown.width + 1, upper + shown.height + 1)
                pen.rectangle(frame, outline=MARK, width=2)
    return page


@cache
def caption_font() -> ImageFont.FreeTypeFont:
    """Latin, Greek and Cyrillic letters; Pillow's own font stops at ASCII."""
    from matplotlib import get_data_path  # here: importing it takes long, and sheets are rare

    return ImageFont.truetype(Path(get_data_path()) / "fonts/ttf/DejaVuSans.ttf", 10)


def enlarge(image: Image.Image, side: int) -> Image.Image:
    """`image` fitted into a square; whole multiples of small pictures keep their pixels visible."""
    small = max(image.size) <= side // 2
    return ImageOps.contain(
        image, (side, side), Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS
    )


def draw_sheet(pictures: Sequence[Image.Image], *, columns: int) -> Image.Image:
    """Pictures of any size in rows of `columns`, top left aligned."""
    rows = [pictures[k : k + columns] for k in range(0, len(pictures), columns)]
    widths = [max(row[c].width for row in rows if c < len(row)) for c in range(len(rows[0]))]
    heights = [max(picture.height for picture in row) for row in rows]
    page = Image.new("RGB", (sum(widths), sum(heights)), PAPER)
    for r, row in enumerate(rows):
        for c, picture in enumerate(row):
            page.paste(picture, (sum(widths[:c]), sum(heights[:r])))
    return page
