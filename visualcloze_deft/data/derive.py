"""Roles computed from `target` where a source lacks them: one pure function per role."""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
from PIL import Image, ImageFilter, ImageOps


def canny(image: Image.Image) -> Image.Image:
    """White Canny edges on black (OpenCV, thresholds 100 and 200 on 8-bit grey values)."""
    edges = cv2.Canny(np.array(ImageOps.grayscale(image)), 100, 200)
    return Image.fromarray(edges).convert("RGB")


def gray(image: Image.Image) -> Image.Image:
    """The picture without its colours (ITU-R 601 luma)."""
    return ImageOps.grayscale(image).convert("RGB")


def blurred(image: Image.Image) -> Image.Image:
    """The picture out of focus: Gaussian blur, sigma 1/32 of the shorter side."""
    return image.filter(ImageFilter.GaussianBlur(min(image.size) / 32))


DERIVED: dict[str, Callable[[Image.Image], Image.Image]] = {
    "canny": canny,
    "gray": gray,
    "blurred": blurred,
}
