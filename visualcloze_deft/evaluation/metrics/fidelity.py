"""Images against images, pixel by pixel: fidelity, what was preserved, and how well a condition
was followed.

Every function is pure. Pictures are PIL images or arrays of unsigned bytes (h, w) or (h, w, 3);
all arithmetic is in floating point, as unsigned bytes would wrap around.

Axes: h, w height and width in pixels, k colours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import cv2
import numpy as np
from einops import rearrange
from numpy.typing import NDArray
from PIL import Image

from visualcloze_deft.errors import UserError

Picture = Image.Image | NDArray[np.uint8]
Colour = tuple[int, int, int]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
PEAK = 255.0
LEAST_ERROR = 1e-2  # mean squared; equal images then have 68.1 dB instead of infinitely many
WINDOW = 11  # side of SSIM's window in pixels
LEAST_SIDE = 32  # of pictures for LPIPS: of less AlexNet's strides leave nothing
NO_DIRECTION = 0.1  # length of a normal below which it is none; middle grey has 0.007
MOST_COLOURS = 256  # of a segmentation map; a photo or a JPEG has more


def psnr(made: Picture, truth: Picture, *, where: Bools | None = None) -> float:
    """Peak signal-to-noise ratio in dB, 0 to 68.1: 10 log10(255^2 / mean squared error).

    where: (h, w), the pixels that count.
    """
    one, other = _pair(made, truth, where)
    return 10 * math.log10(PEAK**2 / max(float(np.mean((one - other) ** 2)), LEAST_ERROR))


def mean_error(made: Picture, truth: Picture, *, where: Bools | None = None) -> float:
    """Mean absolute difference of 8-bit values, 0..255, over all pixels or those of `where`."""
    one, other = _pair(made, truth, where)
    return float(np.mean(np.abs(one - other)))


def ssim(made: Picture, truth: Picture) -> float:
    """Structural similarity, -1..1, equal images 1: Wang et al. 2004, eq. 13, a Gaussian window of
    11 pixels and deviation 1.5, mean over colours and all places where the window lies whole.

    So does scikit-image; torchmetrics 1.9 counts windows over a mirrored border too.
    """
    one, other = _pair(made, truth)
    if min(one.shape[:2]) < WINDOW:
        raise UserError(
            f"SSIM of pictures of {one.shape[1]} x {one.shape[0]} pixels: its window has {WINDOW}"
        )
    mean, mean_other = _windowed(one), _windowed(other)
    spread = _windowed(one**2) - mean**2 + _windowed(other**2) - mean_other**2
    shared = _windowed(one * other) - mean * mean_other
    c1, c2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2
    alike = (2 * mean * mean_other + c1) * (2 * shared + c2)
    return float(np.mean(alike / ((mean**2 + mean_other**2 + c1) * (spread + c2))))


def _windowed(values: Floats) -> Floats:
    """The weighted mean of every whole window."""
    half = WINDOW // 2
    blurred: Floats = cv2.GaussianBlur(values, (WINDOW, WINDOW), 1.5).astype(np.float64)
    return blurred[half:-half, half:-half]


def lpips(made: Picture, truth: Picture, *, device: str = "cpu") -> float:
    """Learned perceptual distance, 0 upward, equal images 0: Zhang et al. 2018, version 0.1 on
    AlexNet (package `lpips`, which needs torchvision and fetches torchvision's AlexNet once).

    Raises `UserError` where either is missing, and for pictures below 32 pixels a side.
    """
    import torch

    one, other = _pair(made, truth)
    if min(one.shape[:2]) < LEAST_SIDE:
        raise UserError(
            f"LPIPS of pictures of {one.shape[1]} x {one.shape[0]} pixels: it needs {LEAST_SIDE}"
        )
    planes = [
        torch.from_numpy(rearrange(x, "h w c -> 1 c h w")).float().to(device) / (PEAK / 2) - 1
        for x in (one, other)
    ]
    with torch.inference_mode():
        return float(_perceptual(device)(*planes))


@cache
def _perceptual(device: str) -> Any:
    try:
        from lpips import LPIPS

        return LPIPS(net="alex", verbose=False).eval().to(device)
    except (ImportError, RuntimeError, OSError) as error:  # a torchvision of another torch: Runtime
        why = str(error).splitlines()[0]
        raise UserError(
            f"LPIPS cannot be computed here ({why}); pip install 'visualcloze-deft[lpips]' beside "
            "a torchvision that fits torch, or leave LPIPS out"
        ) from None


def edge_f1(made: Picture, truth: Picture, *, tolerance: int) -> float:
    """Harmonic mean of precision and recall of white edges on black, 0..1.

    An edge pixel counts as found if one of the other map lies at most `tolerance` pixels away, also
    diagonally. 0 is the pixel-wise F1 of ControlNet++ (Li et al. 2024); a shift of one pixel
    costs most of it, so say which was used. Two maps without edges agree (1).
    """
    one, other = (grey > 127 for grey in _greys(made, truth))
    if not one.any() or not other.any():
        return float(not one.any() and not other.any())
    precision = _near(other, tolerance)[one].mean()
    recall = _near(one, tolerance)[other].mean()
    return float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0


def _near(edges: Bools, tolerance: int) -> Bools:
    """The pixels at most `tolerance` from an edge."""
    square = np.ones((2 * tolerance + 1, 2 * tolerance + 1), np.uint8)
    return cv2.dilate(edges.astype(np.uint8), square) > 0


def depth_rmse(made: Picture, truth: Picture) -> float:
    """Root mean squared error of two grey depth maps, 0..255 (as ControlNet++, Li et al. 2024).

    Both by the same annotator, which scales each map to its own range.
    """
    one, other = _greys(made, truth)
    return float(np.sqrt(np.mean((one - other) ** 2)))


def normals_angle(made: Picture, truth: Picture) -> float:
    """Mean angle in degrees, 0..180, between the vectors of two maps of normals.

    A map holds x, y, z in -1..1 as 0..255 (Eigen and Fergus 2015 for the measure). Rounding to
    bytes alone makes up to half a degree. A pixel without a direction in either (a vector shorter
    than 0.1: middle grey, which bytes cannot hold exactly) counts as 90.
    """
    one, other = (values / (PEAK / 2) - 1 for values in _pair(made, truth))
    lengths = [np.linalg.norm(values, axis=-1) for values in (one, other)]
    known = np.minimum(*lengths) >= NO_DIRECTION
    cosines = np.sum(one * other, axis=-1) / np.maximum(lengths[0] * lengths[1], 1e-9)
    return float(np.degrees(np.arccos(np.clip(np.where(known, cosines, 0), -1, 1))).mean())


def segmentation_miou(
    made: Picture, truth: Picture, *, colours: Sequence[Colour] | None = None
) -> float:
    """Mean intersection over union, 0..1, of the classes of two colour maps, over those that occur
    in either (Everingham et al. 2010).

    colours: one for each class; those of `truth` unless given. A pixel is of the class whose colour
    is nearest, as what a model paints is never exact. The mean is over the classes of one image.
    """
    one, other = _pair(made, truth)
    table = (
        np.unique(rearrange(other, "h w c -> (h w) c"), axis=0)
        if colours is None
        else np.array(colours, float)
    )
    if len(table) > MOST_COLOURS:
        raise UserError(
            f"a segmentation map of {len(table)} colours: that is none of flat colours; say the "
            "colour of each class"
        )
    a, b = _classes(one, table), _classes(other, table)
    shares = [
        ((a == k) & (b == k)).sum() / union
        for k in range(len(table))
        if (union := ((a == k) | (b == k)).sum())
    ]
    return float(np.mean(shares))


def _classes(values: Floats, table: Floats) -> NDArray[np.intp]:
    """(h, w): the row of `table` (k, 3) nearest to each pixel, the first of equally near ones."""
    return np.argmin(np.stack([((values - colour) ** 2).sum(axis=-1) for colour in table]), axis=0)


def _pair(made: Picture, truth: Picture, where: Bools | None = None) -> tuple[Floats, Floats]:
    """Both as floats (h, w, 3) in 0..255, or (pixels, 3) of those in `where`."""
    one, other = _bytes(made), _bytes(truth)
    if one.shape != other.shape:
        sides = [f"{x.shape[1]} x {x.shape[0]}" for x in (one, other)]
        raise UserError(f"pictures of {sides[0]} and {sides[1]} pixels cannot be compared")
    if where is not None:
        if where.shape != one.shape[:2]:
            sides = [f"{x.shape[1]} x {x.shape[0]}" for x in (where, one)]
            raise UserError(f"a mask of {sides[0]} pixels for pictures of {sides[1]}")
        if not where.any():
            raise UserError("no pixel is left to compare: the mask covers the whole picture")
        one, other = one[where], other[where]
    return one.astype(np.float64), other.astype(np.float64)


def _greys(made: Picture, truth: Picture) -> tuple[Floats, Floats]:
    """Both as floats (h, w) in 0..255, colours weighted as PIL does (ITU-R 601)."""
    _pair(made, truth)
    one, other = (
        np.asarray(Image.fromarray(_bytes(x)).convert("L"), np.float64) for x in (made, truth)
    )
    return one, other


def _bytes(picture: Picture) -> NDArray[np.uint8]:
    """(h, w, 3) unsigned bytes."""
    if isinstance(picture, Image.Image):
        return np.asarray(picture.convert("RGB"))
    if picture.dtype != np.uint8:
        raise UserError(f"pictures are of unsigned bytes here, 0 to 255; these are {picture.dtype}")
    return picture if picture.ndim == 3 else np.repeat(picture[..., None], 3, axis=-1)
