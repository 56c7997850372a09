"""Whether an instance stands in the box that it was put into, for an encoder to tell.

Boxes are left, top, right, bottom in pixels of the picture. Axes: m candidates, v views.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from visualcloze_deft.data.sources.insdet import LIGHT_GREY
from visualcloze_deft.errors import UserError
from visualcloze_deft.images.reading import Box

STEPS = 4  # of a candidate to the side of a box
OVERLAP = 0.5  # intersection over union of a hit (PASCAL VOC, Everingham et al. 2010)


def crop(image: Image.Image, box: Box) -> Image.Image:
    """The part of `image` in `box`, rounded to whole pixels, at least one.

    Raises `UserError` where none of it lies in the picture.
    """
    left, top = max(round(box[0]), 0), max(round(box[1]), 0)
    right, bottom = min(round(box[2]), image.width), min(round(box[3]), image.height)
    if right <= left or bottom <= top:
        corners = ", ".join(f"{edge:g}" for edge in box)
        raise UserError(
            f"no pixel of the box {corners} lies in a picture of {image.width} x {image.height}"
        )
    return image.crop((left, top, right, bottom))


def squared(image: Image.Image) -> Image.Image:
    """`image` in the middle of a square of light grey that just holds it, as `insdet.alone`
    shows objects: encoders cut a square from the middle of what is longer than wide.

    >>> squared(Image.new("RGB", (2, 6))).size
    (6, 6)
    """
    side = max(image.size)
    square = Image.new("RGB", (side, side), LIGHT_GREY)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def box_of(mask: Image.Image) -> Box:
    """The smallest box around the white of a mask."""
    found = ImageOps.grayscale(mask).point(lambda value: 255 * (value > 127)).getbbox()
    if found is None:
        raise UserError("a mask without white marks no box")
    return found


def overlap(one: Box, other: Box) -> float:
    """Intersection over union of two boxes, 0..1.

    >>> overlap((0, 0, 2, 2), (1, 0, 3, 2))
    0.3333333333333333
    """
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    shared = max(width, 0) * max(height, 0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return shared / (sum(areas) - shared)


def candidates(asked: Box, size: tuple[int, int]) -> list[Box]:
    """The box asked for, then all others of its size in steps of a quarter of its sides that lie in
    a picture of `size` (width, height). One step away the overlap is 0.6, further it is below half.

    >>> [left for left, *_ in candidates((8, 0, 16, 8), (20, 8))]
    [8, 0.0, 2.0, 4.0, 6.0, 10.0, 12.0]
    """
    lefts, tops = (_steps(asked[k], (asked[k + 2] - asked[k]) / STEPS, size[k]) for k in (0, 1))
    width, height = asked[2] - asked[0], asked[3] - asked[1]
    others = [
        (left, top, left + width, top + height)
        for top in tops
        for left in lefts
        if (left, top) != (asked[0], asked[1])
    ]
    return [asked, *others]


def _steps(start: float, step: float, length: int) -> list[float]:
    """`start` and all that lie whole steps from it, `STEPS` more of them ending within `length`."""
    first, last = -int(start // step), int((length - start) // step) - STEPS
    return [start + k * step for k in range(first, max(last, 0) + 1)]


def box_hit(
    similarities: NDArray[np.floating] | Sequence[float], boxes: Sequence[Box], asked: Box
) -> bool:
    """Whether the instance is found where it was put: a candidate that overlaps the box asked for
    by half looks more like its views than any other does.

    similarities: (m,), of each of `boxes` to the views; `candidates` gives boxes, an encoder these.
    A tie is no hit, so that a picture of nothing has none.
    """
    values = np.asarray(similarities, float)
    near = np.array([overlap(box, asked) >= OVERLAP for box in boxes])
    if not near.any() or near.all():
        raise UserError(
            f"{int(near.sum())} of {len(boxes)} candidate boxes overlap the one asked for: a hit "
            "needs some that do and some that do not"
        )
    return bool(values[near].max() > values[~near].max())
