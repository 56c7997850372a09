"""Which way up a picture is meant to be seen: the one EXIF tag that says so, and nothing else of
EXIF, whose other values may be anything.
"""

from __future__ import annotations

import struct

from PIL import Image, TiffImagePlugin

ORIENTATION = 0x0112  # EXIF 2.32, 4.6.4
_BYTE, _SHORT, _LONG = 1, 3, 4  # types of EXIF values
_FORMATS = {_BYTE: "B", _SHORT: "H", _LONG: "I"}
_METHODS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SWAPPED = frozenset({5, 6, 7, 8})  # width becomes height
_RAW = ("Raw profile type exif", "Raw profile type APP1")  # EXIF as ImageMagick puts it into a PNG


def upright(image: Image.Image) -> Image.Image:
    """`image` turned as its EXIF orientation says; itself where there is nothing to turn."""
    method = _METHODS.get(orientation(image))
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        _forget_exif(image)
    return image if method is None else image.transpose(method)


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height of `upright(image)`, before a pixel is read."""
    width, height = image.size
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        return width, height  # Pillow has swapped them already
    return (height, width) if orientation(image) in _SWAPPED else (width, height)


def orientation(image: Image.Image) -> int:
    """1 to 8, see EXIF 2.32; 1, upright, where there is no such tag, or one of another kind."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        found = image.tag_v2.get(ORIENTATION)
    else:
        found = _tag(_exif_of(image))
    return found if isinstance(found, int) and found in _METHODS else 1


def _forget_exif(image: TiffImagePlugin.TiffImageFile) -> None:
    """Pillow turns a TIFF itself when it decodes it, and writes all its EXIF anew for that: odd
    values then end in an error. Without EXIF it does neither."""
    exif = image.getexif()
    for tag in list(exif):
        del exif[tag]


def _exif_of(image: Image.Image) -> bytes:
    found = image.info.get("exif")
    if isinstance(found, bytes):
        return found
    for name in _RAW:
        text = image.info.get(name)
        if isinstance(text, str):
            try:
                return bytes.fromhex("".join(text.split("\n")[3:]))
            except ValueError:
                return b""
    return b""


def _tag(exif: bytes) -> int | None:
    """The orientation in the first directory of EXIF data."""
    data = exif.removeprefix(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}.get(data[:2])
    if order is None:
        return None
    try:
        (start,) = struct.unpack_from(f"{order}I", data, 4)
        (count,) = struct.unpack_from(f"{order}H", data, start)
        for place in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind, many = struct.unpack_from(f"{order}HHI", data, place)
            if tag == ORIENTATION and many == 1 and kind in _FORMATS:
                (value,) = struct.unpack_from(f"{order}{_FORMATS[kind]}", data, place + 8)
                return int(value)
    except struct.error:  # the data ends before what it promises
        pass
    return None
