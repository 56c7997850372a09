"""Pictures on disk: which files of a folder are pictures, and reading one as 8-bit RGB.

Whatever is wrong with a file, of any format and depth, ends in one `UserError` that names it.
What a mask or a depth map means is in `maps`.
"""

from __future__ import annotations

import importlib.util
import io
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from visualcloze_deft.errors import PARSED, OnFault, UserError, stop, why
from visualcloze_deft.images.colour import as_srgb
from visualcloze_deft.images.orientation import upright, upright_size

HEIF = frozenset({".heic", ".heif", ".hif"})  # read through pillow-heif, where it is installed
SUFFIXES = HEIF | frozenset(
    ".jpg .jpeg .jpe .jfif .png .apng .webp .bmp .tif .tiff .gif .avif .jp2 .j2k .ppm .pgm .pbm "
    ".tga".split()
)
LIMIT = 100_000_000  # pixels; read from the header, so that a bomb is never decoded
READ_AS = "read_as"  # key of `Image.info`: how the values of a file were taken, for people

Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels
UNREADABLE: tuple[type[Exception], ...] = (*PARSED, RuntimeError)  # the last of AVIF's decoder


def read_image(path: Path | str) -> Image.Image:
    """The upright sRGB picture in `path`, fully decoded, the file closed.

    An embedded colour profile is converted to sRGB. Transparency is laid over white; 16 bits are
    scaled to 8, so that 65535 becomes 255. Of a moving picture (GIF, WebP, PNG) or a TIFF of
    several pages the first is read.
    """
    with opened(path) as image:
        return as_rgb(str(path), upright(image))


def read_crop(path: Path, box: Box, *, size: int) -> Image.Image:
    """The part `box` of the upright picture in `path`, as `read_image` would give it.

    A JPEG is decoded at 1/2, 1/4 or 1/8 where the part still has `size` pixels on its shorter side.
    """
    left, top, right, bottom = box
    with opened(path) as image:
        width, height = image.size
        shrink = max(int(min(right - left, bottom - top)) // size, 1)
        image.draft(None, (-(-width // shrink), -(-height // shrink)))
        scale = image.width / width
        corner = round(left * scale), round(top * scale)
        sides = round((right - left) * scale), round((bottom - top) * scale)
        part = upright(image).crop((*corner, corner[0] + sides[0], corner[1] + sides[1]))
        return as_rgb(str(path), part)


def picture_size(path: Path) -> tuple[int, int]:
    """Width and height of the upright picture in `path`, from its header alone."""
    with opened(path) as image:
        return upright_size(image)


def images_in(folder: Path, *, on_fault: OnFault = stop) -> dict[str, Path]:
    """The pictures in `folder` by stem, sorted; of hidden files, none.

    on_fault: gets what is wrong with a second picture of a stem, which is then left out.
    """
    found: dict[str, Path] = {}
    for path in sorted(path for path in folder.iterdir() if is_picture(path)):
        if path.stem in found:
            same = found[path.stem].name
            on_fault(UserError(f"{path}: {same} has the same stem; keep one of them"))
        else:
            found[path.stem] = path
    return found


def any_images_in(folder: Path) -> bool:
    """Whether `images_in` finds a picture in `folder`."""
    return any(is_picture(path) for path in folder.iterdir())


def is_picture(path: Path) -> bool:
    """Whether a file has the name of a picture, and is not hidden."""
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def folders_in(folder: Path) -> list[Path]:
    """The subfolders of `folder`, sorted; of hidden ones, none."""
    paths = sorted(folder.iterdir())
    return [path for path in paths if path.is_dir() and not path.name.startswith(".")]


def files_below(folder: Path) -> Iterator[str]:
    """The paths of all that is no folder in `folder` and its folders, sorted in each; also behind
    links, but of a folder that several lead to, or that one leads back to, once."""
    places, seen = [str(folder)], set()
    while places:
        place = places.pop()
        told = os.stat(place)
        if (told.st_dev, told.st_ino) in seen:
            continue
        seen.add((told.st_dev, told.st_ino))
        for entry in sorted(os.scandir(place), key=lambda entry: entry.name):
            if os.path.isdir(entry.path):
                places.append(entry.path)
            else:
                yield entry.path


def listing(folder: Path) -> str:
    """What `folder` holds, for the end of a message: its first names, or "nothing"."""
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{', '.join(names[:5])}{more}" if names else "nothing"


@contextmanager
def opened(path: Path | str, data: bytes | None = None) -> Iterator[Image.Image]:
    """The picture in `path`, or in `data` called so, its header read; what goes wrong in the block
    is a `UserError`."""
    too_large = f"{path}: more than {LIMIT // 10**6} million pixels; scale it down first"
    heif = Path(path).suffix.lower() in HEIF
    if heif and not _with_heif():
        raise UserError(f"{path}: HEIC is read by pillow-heif; 'pip install pillow-heif'")
    try:
        if data is None and not os.path.isfile(path):
            raise UserError(f"{path}: {_no_file(path)}")
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
    except UnidentifiedImageError:
        size = Path(path).stat().st_size if data is None else len(data)
        kind = "image (HEIC)" if heif else "image"
        what = f"not an {kind} that can be read" if size else "an empty file"
        raise UserError(f"{path}: {what}") from None
    except Image.DecompressionBombError:
        raise UserError(too_large) from None
    except UNREADABLE as error:
        raise UserError(f"{path}: cannot be read as an image: {why(error)}") from None


def _no_file(path: Path | str) -> str:
    """Why there is no file at `path`."""
    if os.path.isdir(path):
        return "a folder, not an image"
    if os.path.exists(path):
        return "a pipe or a device, not an image"
    return (
        "no such image; it is a link that leads nowhere"
        if os.path.islink(path)
        else ("no such image")
    )


@cache
def _with_heif() -> bool:
    """Whether Pillow can read HEIC: with pillow-heif, which is asked to tell it how."""
    if importlib.util.find_spec("pillow_heif") is None:
        return False
    import pillow_heif

    pillow_heif.register_heif_opener()
    return True


def as_rgb(name: str, image: Image.Image) -> Image.Image:
    """8-bit sRGB without metadata: profiles converted, transparency laid over white, 16 bits
    scaled; `name` is for messages."""
    if not image.width * image.height:
        raise UserError(f"{name}: an image of {image.width} x {image.height} pixels")
    if image.mode == "F" or image.mode.startswith("I"):
        return _eight_bits(name, image).convert("RGB")
    found = as_srgb(_coloured(image))
    if image.has_transparency_data:
        white = Image.new("RGB", image.size, "white")
        found = Image.composite(found, white, image.convert("RGBA").getchannel("A"))
    found.info = {}  # not to be saved again, or converted, with a profile that holds no longer
    return found


def _coloured(image: Image.Image) -> Image.Image:
    """The colours of an 8-bit picture without transparency, in a mode that profiles are for."""
    if image.mode in ("L", "RGB", "CMYK", "LAB"):
        return image
    if image.mode in ("1", "LA", "La"):
        return image.convert("LA").getchannel("L")
    return image.convert("RGBA" if image.has_transparency_data else "RGB").convert("RGB")


def _eight_bits(name: str, image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise UserError(f"{name}: its values have no fixed range; save it with 8 or 16 bits")
    return Image.fromarray((values / 257 + 0.5).astype(np.uint8))
