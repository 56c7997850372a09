"""Pictures read in the sense of their role: a mask is white on its object, depth bright where it
is near, however the file codes it; everything else is a picture.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from visualcloze_deft.errors import UserError
from visualcloze_deft.images.depth import Depth, as_depth
from visualcloze_deft.images.orientation import orientation, upright
from visualcloze_deft.images.reading import READ_AS, as_rgb, opened

TURNED = "orientation"  # key of `Image.info`: EXIF's, which the picture was turned by
MASKS = frozenset({"mask", "box"})
FEW = 32  # values below it number objects; a mask of brightness is brighter somewhere
VOID = (224, 224, 192)  # entry 255 of PASCAL VOC's palette: the border that is of no object
COLOURED = 40  # of 255: by how much the channels of a colour that is no grey differ
SOME = 0.001  # share of pixels with such a colour in a picture that is coloured
DARK = 32  # of 255: what is no lighter in any channel is the black of a coloured mask

Bytes = NDArray[np.uint8]
Values = NDArray[Any]


def read_role(
    role: str, path: Path | str, depth: Depth | None = None, data: bytes | None = None
) -> Image.Image:
    """The upright picture in the file `path`, or in `data` called so, as `as_role` gives it."""
    with opened(path, data) as image:
        turned = orientation(image)  # which a TIFF no longer tells once it is decoded
        found = as_role(role, str(path), upright(image), depth)
        found.info[TURNED] = turned
        return found


def as_role(role: str, name: str, image: Image.Image, depth: Depth | None = None) -> Image.Image:
    """8-bit RGB in the sense of `role`. depth: what is declared of depth maps."""
    if role in MASKS:
        return as_mask(name, image)
    if role == "depth":
        return as_depth(name, image, depth)
    return as_rgb(name, image)


def as_mask(name: str, image: Image.Image) -> Image.Image:
    """The mask `image` in RGB, white on the object, black beside it, soft where it was soft.

    The object is where a picture with transparency is opaque; else where a palette's index is not
    the background's; else where a coloured picture is not black; else where values are 1 and more,
    if all are small; else where it is bright.
    """
    if not image.width * image.height:
        raise UserError(f"{name}: an image of {image.width} x {image.height} pixels")
    how, white = _mask(name, image)
    found = Image.fromarray(white).convert("RGB")
    found.info = {READ_AS: how}
    return found


def _mask(name: str, image: Image.Image) -> tuple[str, Bytes]:
    """How a mask was read, and (h, w) what is white in it."""
    if image.mode == "F" or image.mode.startswith("I"):
        return _of_levels(name, np.asarray(image))
    if image.has_transparency_data:
        alpha = np.asarray(image.convert("RGBA").getchannel("A"))
        if alpha.min() < 255:
            return "alpha: the object is opaque", alpha
        image = image.convert("RGBA")
    colours = np.asarray(image.convert("RGB"))
    spread = np.ptp(colours, axis=-1) > COLOURED
    if spread.mean() <= SOME:
        return _of_levels(name, np.asarray(image.convert("L")))
    if image.mode == "P":
        return "palette: the object is what is not background", _of_palette(image, colours)
    return "colours: the object is what is not black", _white(colours.max(axis=-1) > DARK)


def _of_palette(image: Image.Image, colours: Bytes) -> Bytes:
    """White where a palette's index is neither background, which is black, or 0 where none is, nor
    the border of PASCAL VOC."""
    numbers, black = np.asarray(image), colours.max(axis=-1) == 0
    border = (numbers == 255) & (colours == VOID).all(axis=-1)
    return _white(~(black if black.any() else numbers == 0) & ~border)


def _of_levels(name: str, values: Values) -> tuple[str, Bytes]:
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= 65_535):
        raise UserError(f"{name}: its values have no fixed range; save the mask with 8 bits")
    if low == high and (high == 0 or high >= FEW):
        return "all of one value", _scaled(values, high)
    if values.dtype.kind == "f" and high <= 1:
        return "0/1", _scaled(values, 1)
    if high < FEW:
        return "0/1" if high == 1 else f"numbers 0 to {high:g}: not 0", _white(values > 0)
    if ((values == low) | (values == high)).all() and low == 0:
        return f"0/{high:g}", _white(values == high)
    if _numbered_with_border(values):
        return "numbers, 255 a border: neither it nor 0", _white((values > 0) & (values < FEW))
    return "levels of grey", _scaled(values, high)


def _numbered_with_border(values: Values) -> bool:
    """Whether small numbers of objects stand beside the 255 of a border that is smaller."""
    numbers, border = (values > 0) & (values < FEW), values == 255
    return bool(((values == 0) | numbers | border).all() and numbers.sum() > border.sum())


def _scaled(values: Values, high: float) -> Bytes:
    top = 1 if high <= 1 and high else 255 if high <= 255 else 65_535
    light: Bytes = (np.asarray(values, np.float64) / top * 255 + 0.5).astype(np.uint8)
    return light


def _white(where: NDArray[np.bool_]) -> Bytes:
    return np.where(where, np.uint8(255), np.uint8(0))
