"""Pictures on disk: which files of a folder are pictures, and reading one as 8-bit RGB.

Whatever is wrong with a file, of any format and depth, ends in one `UserError` that names it.
"""

from __future__ import annotations

import io
import os
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from visualcloze_deft.errors import UserError

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"})
LIMIT = 100_000_000  # pixels; read from the header, so that a bomb is never decoded
_TURNED = frozenset({5, 6, 7, 8})  # EXIF orientations that swap width and height

Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels


def read_image(path: Path | str) -> Image.Image:
    """The upright RGB picture in `path`, fully decoded, the file closed.

    Transparency is laid over white; 16 bits are scaled to 8, so that 65535 becomes 255. Of a
    moving picture (GIF, WebP, PNG) or a TIFF of several pages the first is read.
    """
    with _opened(path) as image:
        ImageOps.exif_transpose(image, in_place=True)
        return as_rgb(str(path), image)


def read_encoded(name: str, data: bytes) -> Image.Image:
    """The picture in `data`, as `read_image` would give it; `name` is for messages."""
    with _opened(name, data) as image:
        ImageOps.exif_transpose(image, in_place=True)
        return as_rgb(name, image)


def read_crop(path: Path, box: Box, *, size: int) -> Image.Image:
    """The part `box` of the upright picture in `path`, as `read_image` would give it.

    A JPEG is decoded at 1/2, 1/4 or 1/8 where the part still has `size` pixels on its shorter side.
    """
    left, top, right, bottom = box
    with _opened(path) as image:
        width, height = image.size
        shrink = max(int(min(right - left, bottom - top)) // size, 1)
        image.draft(None, (-(-width // shrink), -(-height // shrink)))
        scale = image.width / width
        corner = round(left * scale), round(top * scale)
        sides = round((right - left) * scale), round((bottom - top) * scale)
        ImageOps.exif_transpose(image, in_place=True)
        part = image.crop((*corner, corner[0] + sides[0], corner[1] + sides[1]))
        return as_rgb(str(path), part)


def picture_size(path: Path) -> tuple[int, int]:
    """Width and height of the upright picture in `path` (no TIFF), from its header alone."""
    with _opened(path) as image:
        width, height = image.size
        turned = image.getexif().get(ExifTags.Base.Orientation) in _TURNED
        return (height, width) if turned else (width, height)


def images_in(folder: Path) -> dict[str, Path]:
    """The pictures in `folder` by stem, sorted; of hidden files, none."""
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in SUFFIXES or path.name.startswith("."):
            continue
        if path.stem in found:
            raise UserError(f"{path}: {found[path.stem].name} has the same stem; keep one of them")
        found[path.stem] = path
    return found


def folders_in(folder: Path) -> list[Path]:
    """The subfolders of `folder`, sorted; of hidden ones, none."""
    paths = sorted(folder.iterdir())
    return [path for path in paths if path.is_dir() and not path.name.startswith(".")]


def listing(folder: Path) -> str:
    """What `folder` holds, for the end of a message: its first names, or "nothing"."""
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{', '.join(names[:5])}{more}" if names else "nothing"


def check_inside(where: str, folder: str, name: str) -> None:
    """Raise `UserError` if `name`, which a file in `folder` gives for a picture, leads out of it.

    As it is written: a link in the folder may lead anywhere, it is the user's own. `where` begins
    the message.
    """
    if not name.startswith("/") and ".." not in name:
        return  # told without the cost of making paths: tables have hundreds of thousands of rows
    root = os.path.abspath(folder)
    if os.path.commonpath([root, os.path.normpath(os.path.join(root, name))]) != root:
        raise UserError(f"{where}: {name} leads out of {folder}; move it there, or link to it")


def path_inside(folder: str, name: str) -> str:
    """The path of `name`, which `check_inside` lets pass, in `folder`.

    Without "..": behind a link they would lead elsewhere than they are written.
    """
    return os.path.normpath(os.path.join(folder, name))


@contextmanager
def _opened(path: Path | str, data: bytes | None = None) -> Iterator[Image.Image]:
    """The picture in `path`, or in `data` called so, its header read; what goes wrong in the block
    is a `UserError`."""
    too_large = f"{path}: more than {LIMIT // 10**6} million pixels; scale it down first"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on metadata nobody reads here, and on size: see LIMIT
            with Image.open(path if data is None else io.BytesIO(data)) as image:
                if image.width * image.height > LIMIT:
                    raise UserError(too_large)
                if not image.width * image.height:
                    raise UserError(f"{path}: an image of {image.width} x {image.height} pixels")
                yield image
    except UserError:
        raise
    except IsADirectoryError:
        raise UserError(f"{path}: a folder, not an image") from None
    except FileNotFoundError:
        raise UserError(f"{path}: no such image") from None
    except UnidentifiedImageError:
        size = Path(path).stat().st_size if data is None else len(data)
        what = "not an image that can be read" if size else "an empty file"
        raise UserError(f"{path}: {what}") from None
    except Image.DecompressionBombError:
        raise UserError(too_large) from None
    except (OSError, ValueError, SyntaxError, EOFError, struct.error) as error:
        raise UserError(f"{path}: cannot be read as an image: {error}") from None


def as_rgb(name: str, image: Image.Image) -> Image.Image:
    """8-bit RGB: transparency laid over white, 16 bits scaled; `name` is for messages."""
    if not image.width * image.height:
        raise UserError(f"{name}: an image of {image.width} x {image.height} pixels")
    if image.mode == "F" or image.mode.startswith("I"):
        return _eight_bits(name, image).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def _eight_bits(name: str, image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise UserError(f"{name}: its values have no fixed range; save it with 8 or 16 bits")
    return Image.fromarray((values / 257 + 0.5).astype(np.uint8))
