"""Pictures to look at: grids as people read them, rows under rows, words above."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin

from visualcloze_deft.errors import UserError
from visualcloze_deft.images.reading import opened
from visualcloze_deft.storage.atomic import atomic_write
from visualcloze_deft.storage.text_files import parse_json

METADATA = "vcdeft"  # the text of a PNG file that holds the record of its image
PREVIEW = "preview"  # what a record says of a picture that may be drawn anew
GAP, PAPER, INK, MARK = 6, "white", (40, 40, 40), (214, 60, 60)
TITLE_LINES = 5
FONT, LINE = 12, 16  # pixels: of letters, and from line to line
HEAD = 32  # pixels of the title of a sheet
LETTER = 7  # pixels of a letter's width, about
NO_LABELS: Mapping[int, Sequence[str]] = MappingProxyType({})

Cells = Sequence[Sequence[Image.Image | None]]


def draw_grid(
    rows: Cells,
    *,
    title: str = "",
    made: Sequence[tuple[int, int]] = (),
    cell: int = 128,
    labels: Mapping[int, Sequence[str]] = NO_LABELS,
    title_lines: int = TITLE_LINES,
) -> Image.Image:
    """One grid; `made` lists (row, column) of generated cells, which get a red frame.

    Cells keep their aspect inside `cell` x `cell` pixels; missing ones are drawn as "?". labels:
    row -> a text above each of its cells. title_lines: at most, the rest of the title is cut.
    """
    width = max(len(row) for row in rows) * (cell + GAP) + GAP
    lines = textwrap.wrap(
        title, max(width // LETTER, 12), max_lines=title_lines, placeholder=" ..."
    )
    heights = [cell + GAP + (LINE if r in labels else 0) for r in range(len(rows))]
    top = GAP + LINE * len(lines)
    page = Image.new("RGB", (width, top + sum(heights) + GAP), PAPER)
    pen = ImageDraw.Draw(page)
    for k, line in enumerate(lines):
        pen.text((GAP, GAP // 2 + LINE * k), line, fill=INK, font=caption_font())
    for r, row in enumerate(rows):
        y = top + sum(heights[: r + 1]) - cell
        for c, image in enumerate(row):
            x = GAP + c * (cell + GAP)
            draw_cell(page, image, (x, y), cell=cell, framed=(r, c) in made)
        for c, label in enumerate(labels.get(r, ())):
            at = GAP + c * (cell + GAP), y - LINE
            pen.text(at, fitting(label, cell), fill=INK, font=caption_font())
    return page


def draw_cell(
    page: Image.Image, image: Image.Image | None, at: tuple[int, int], *, cell: int, framed: bool
) -> None:
    """One picture in the middle of its square, which begins at `at`; a missing one as "?"."""
    pen, (x, y) = ImageDraw.Draw(page), at
    if image is None:
        pen.rectangle((x, y, x + cell - 1, y + cell - 1), outline=MARK)
        pen.text((x + cell // 2 - 4, y + cell // 2 - 7), "?", fill=MARK, font=caption_font())
        return
    shown = enlarge(image, cell)
    left, upper = x + (cell - shown.width) // 2, y + (cell - shown.height) // 2
    page.paste(shown, (left, upper))
    if framed:
        frame = (left - 2, upper - 2, left + shown.width + 1, upper + shown.height + 1)
        pen.rectangle(frame, outline=MARK, width=2)


def fitting(text: str, width: int) -> str:
    """`text`, cut where it is wider than so many pixels."""
    if caption_font().getlength(text) <= width:
        return text
    while text and caption_font().getlength(f"{text}...") > width:
        text = text[:-1]
    return f"{text}..."


@cache
def caption_font(size: int = FONT) -> ImageFont.FreeTypeFont:
    """Latin, Greek and Cyrillic letters; Pillow's own font stops at ASCII."""
    from matplotlib import get_data_path  # here: importing it takes long, and sheets are rare

    return ImageFont.truetype(Path(get_data_path()) / "fonts/ttf/DejaVuSans.ttf", size)


def enlarge(image: Image.Image, side: int) -> Image.Image:
    """`image` fitted into a square; whole multiples of small pictures keep their pixels visible."""
    small = max(image.size) <= side // 2
    return ImageOps.contain(
        image, (side, side), Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS
    )


def draw_sheet(
    pictures: Sequence[Image.Image], *, columns: int, gap: int = 0, title: str = ""
) -> Image.Image:
    """Pictures of any size in rows of `columns`, top left aligned, `gap` pixels apart."""
    rows = [pictures[k : k + columns] for k in range(0, len(pictures), columns)]
    widths = [max(row[c].width for row in rows if c < len(row)) + gap for c in range(len(rows[0]))]
    heights = [max(picture.height for picture in row) + gap for row in rows]
    top = HEAD if title else 0
    page = Image.new("RGB", (sum(widths) - gap, top + sum(heights) - gap), PAPER)
    ImageDraw.Draw(page).text((GAP, GAP), title, fill=INK, font=caption_font(HEAD // 2))
    for r, row in enumerate(rows):
        for c, picture in enumerate(row):
            page.paste(picture, (sum(widths[:c]), top + sum(heights[:r])))
    return page


def write_preview(picture: Image.Image, path: Path, *, of: str) -> None:
    """Write a PNG file, whole or not at all, that `check_replaceable` knows again. of: in words."""
    atomic_write(path, partial(picture.save, format="PNG", pnginfo=metadata_text({PREVIEW: of})))


def check_replaceable(path: Path, *, way_out: str) -> None:
    """Raise `UserError` where anything but a preview that this project wrote stands at `path`."""
    there = path.exists() or path.is_symlink()
    if there and not (path.is_file() and PREVIEW in image_metadata(path)):
        raise UserError(f"{path}: already there, and no preview of vcdeft; {way_out}")


def metadata_text(record: Mapping[str, Any]) -> PngImagePlugin.PngInfo:
    """The text of a PNG file that holds the record of its image."""
    told = PngImagePlugin.PngInfo()
    told.add_itxt(METADATA, json.dumps(record))
    return told


def image_metadata(path: Path) -> dict[str, Any]:
    """The record that an image holds; {} where it holds none."""
    try:
        with opened(path) as image:
            text = image.info.get(METADATA)
        found = parse_json(str(path), text) if isinstance(text, str) else None
    except UserError:
        return {}
    return found if isinstance(found, dict) else {}
