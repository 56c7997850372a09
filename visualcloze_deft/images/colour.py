"""Colours as they were meant: the profile embedded in a picture, and sRGB, which everything here
computes in.
"""

from __future__ import annotations

import io
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

_SPACES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab": "LAB"}  # of profiles -> Pillow's mode
ROUNDING = 1  # of 255: what a profile that is sRGB under another name may differ by


def as_srgb(image: Image.Image) -> Image.Image:
    """`image` (L, RGB, CMYK or LAB, 8 bits) in RGB, converted from its embedded profile to sRGB.

    A profile that cannot be read, or is of another kind of picture, leaves the pixels as they are.
    """
    profile = image.info.get("icc_profile")
    if profile is None and image.mode == "LAB":
        profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    if isinstance(profile, bytes) and (found := _transform(profile, image.mode)):
        mode, transform = found
        return ImageCms.applyTransform(image.convert(mode), transform) or image.convert("RGB")
    return image.convert("RGB")


@lru_cache(maxsize=16)  # of a data set nearly all pictures have one of a few profiles
def _transform(profile: bytes, mode: str) -> tuple[str, ImageCms.ImageCmsTransform] | None:
    """The mode that pictures of `mode` are converted from, and how; None where nothing changes."""
    try:
        given = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = _SPACES.get(given.profile.xcolor_space.strip())
        if space is None or (space != mode and (space, mode) != ("RGB", "L")):
            return None
        srgb = ImageCms.createProfile("sRGB")
        transform = ImageCms.buildTransform(given, srgb, space, "RGB")
        probe = _probe(space)
        after = ImageCms.applyTransform(probe, transform)
    except (ImageCms.PyCMSError, OSError, TypeError, ValueError):
        return None
    if space in ("RGB", "L") and after is not None:
        change = np.asarray(after, np.int16) - np.asarray(probe.convert("RGB"), np.int16)
        if np.abs(change).max() <= ROUNDING:
            return None
    return space, transform


def _probe(mode: str) -> Image.Image:
    """A picture of colours from everywhere in `mode`."""
    bands = len(Image.new(mode, (1, 1)).getbands())
    steps = np.linspace(0, 255, 256 if bands == 1 else 12).astype(np.uint8)
    lattice = np.stack(np.meshgrid(*[steps] * bands), axis=-1).reshape(1, -1, bands)
    return Image.frombytes(mode, (lattice.shape[1], 1), lattice.tobytes())
