"""Graph200K's 32 degradations of a photo (VisualCloze, arXiv 2504.07960, names its restorations).

Each takes the photo at the size it will be shown in and a generator for its strength and place, and
returns a picture of the same size in which one sees what the name says. Lengths are relative to the
shorter side, values to 0..255. Pillow and OpenCV do the work.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageOps

Floats = NDArray[np.float32]
Degrade = Callable[[Image.Image, Generator], Image.Image]


def averaged(image: Image.Image, rng: Generator) -> Image.Image:
    """The mean over a square of 1/20 to 1/10 of the shorter side."""
    return image.filter(ImageFilter.BoxBlur(_length(image, rng, 1 / 40, 1 / 20)))


def blurred(image: Image.Image, rng: Generator) -> Image.Image:
    """Gaussian blur, sigma 1/48 to 1/24 of the shorter side."""
    return image.filter(ImageFilter.GaussianBlur(_length(image, rng, 1 / 48, 1 / 24)))


def defocused(image: Image.Image, rng: Generator) -> Image.Image:
    """The mean over a disk of radius 1/32 to 1/16: light spots become round."""
    radius = max(_length(image, rng, 1 / 32, 1 / 16), 1.5)
    reach = np.arange(-int(radius) - 1, int(radius) + 2)
    disk = np.clip(radius + 0.5 - np.hypot(reach[:, None], reach), 0, 1)
    kernel = (disk / disk.sum()).astype(np.float32)
    found = cv2.filter2D(_values(image), -1, kernel, borderType=cv2.BORDER_REFLECT)
    return _picture(found.astype(np.float32))


def compressed(image: Image.Image, rng: Generator) -> Image.Image:
    """WebP at quality 0 to 2: detail washed away."""
    return _saved(image, "WEBP", int(rng.integers(0, 3)))


def jpeg(image: Image.Image, rng: Generator) -> Image.Image:
    """JPEG at quality 3 to 10: blocks of 8 x 8 pixels."""
    return _saved(image, "JPEG", int(rng.integers(3, 11)))


def smaller(image: Image.Image, rng: Generator, *, factor: int) -> Image.Image:
    """Bicubically smaller by `factor`, and as large as before again."""
    small = (max(image.width // factor, 1), max(image.height // factor, 1))
    less = image.resize(small, Image.Resampling.BICUBIC)
    return less.resize(image.size, Image.Resampling.BICUBIC)


def pixelated(image: Image.Image, rng: Generator) -> Image.Image:
    """Squares of one colour, 1/24 to 1/12 of the shorter side."""
    return _squares(image, _length(image, rng, 1 / 24, 1 / 12))


def mosaic(image: Image.Image, rng: Generator) -> Image.Image:
    """Two to four rectangles in squares of one colour, 1/12 of the shorter side."""
    coarse = _squares(image, min(image.size) / 12)
    found = image.copy()
    for _ in range(int(rng.integers(2, 5))):
        width, height = (rng.uniform(0.25, 0.5, 2) * image.size).astype(int)
        left = int(rng.integers(0, image.width - width + 1))
        top = int(rng.integers(0, image.height - height + 1))
        box = (left, top, left + int(width), top + int(height))
        found.paste(coarse.crop(box), box)
    return found


def oversharpened(image: Image.Image, rng: Generator) -> Image.Image:
    """Unsharp masking, 5 to 9 times the detail: halos."""
    radius = max(min(image.size) / 120, 1)
    return image.filter(ImageFilter.UnsharpMask(radius, int(rng.uniform(500, 900)), 0))


def gaussian_noise(image: Image.Image, rng: Generator) -> Image.Image:
    """Independent noise on every value, deviation 25 to 60."""
    values = _values(image)
    return _picture(values + rng.uniform(25, 60) * rng.standard_normal(values.shape, np.float32))


def poisson_noise(image: Image.Image, rng: Generator) -> Image.Image:
    """Shot noise of 6 to 20 photons in white."""
    photons = rng.uniform(6, 20)
    return _picture(rng.poisson(_values(image) / 255 * photons) * (255 / photons))


def salt_pepper(image: Image.Image, rng: Generator) -> Image.Image:
    """4 to 15 % of the pixels black or white."""
    values, drawn = _values(image), rng.random((image.height, image.width))
    share = rng.uniform(0.04, 0.15)
    values[drawn < share / 2], values[drawn > 1 - share / 2] = 0, 255
    return _picture(values)


def contrast(image: Image.Image, rng: Generator, *, low: float, high: float) -> Image.Image:
    """The distance from the mean grey times `low` to `high`."""
    return ImageEnhance.Contrast(image).enhance(rng.uniform(low, high))


def quantised(image: Image.Image, rng: Generator) -> Image.Image:
    """2 to 4 levels in each of red, green and blue."""
    steps = int(rng.integers(2, 5)) - 1
    return _picture(np.round(_values(image) / 255 * steps) * (255 / steps))


def brightened(image: Image.Image, rng: Generator) -> Image.Image:
    """1.5 to 1.9 times as bright and 40 more: lights are lost."""
    return _picture(_values(image) * rng.uniform(1.5, 1.9) + 40)


def darkened(image: Image.Image, rng: Generator) -> Image.Image:
    """0.2 to 0.4 times as bright."""
    return _picture(_values(image) * rng.uniform(0.2, 0.4))


def low_light(image: Image.Image, rng: Generator) -> Image.Image:
    """Darks crushed (gamma 1.6 to 2.2), 0.3 to 0.5 times as bright, bluish, noisy."""
    values = 255 * (_values(image) / 255) ** rng.uniform(1.6, 2.2) * rng.uniform(0.3, 0.5)
    tint = np.array([0.85, 0.95, 1.15], np.float32)
    return _picture(values * tint + 9 * rng.standard_normal(values.shape, np.float32))


def saturation(image: Image.Image, rng: Generator, *, low: float, high: float) -> Image.Image:
    """The distance of colours from grey times `low` to `high`."""
    return ImageEnhance.Color(image).enhance(rng.uniform(low, high))


def gray(image: Image.Image, rng: Generator) -> Image.Image:
    """Without colours (ITU-R 601 luma)."""
    return ImageOps.grayscale(image).convert("RGB")


def colour_shifted(image: Image.Image, rng: Generator) -> Image.Image:
    """Hues turned by 40 to 140 degrees either way, channels at 0.7 to 1.2 of their strength."""
    hue, saturated, value = image.convert("HSV").split()
    turn = int(rng.choice([-1, 1]) * rng.uniform(40, 140) / 360 * 255)
    turned = Image.fromarray(np.asarray(hue) + np.uint8(turn % 256))
    values = _values(Image.merge("HSV", (turned, saturated, value)).convert("RGB"))
    return _picture(values * rng.uniform(0.7, 1.2, 3).astype(np.float32))


def masked_out(image: Image.Image, rng: Generator) -> Image.Image:
    """Three to five black strokes of bends, 1/12 to 1/8 of the shorter side wide."""
    found = image.copy()
    draw = ImageDraw.Draw(found)
    for _ in range(int(rng.integers(3, 6))):
        points = rng.uniform(0, 1, (4, 2)) * image.size
        width = max(round(_length(image, rng, 1 / 12, 1 / 8)), 1)
        draw.line([tuple(point) for point in points], fill="black", width=width, joint="curve")
    return found


def rotated(image: Image.Image, rng: Generator, *, turn: Image.Transpose) -> Image.Image:
    """Turned counter-clockwise and put whole on black of the size before."""
    return ImageOps.pad(image.transpose(turn), image.size, color="black")


def bent(image: Image.Image, rng: Generator, *, power: int, still: float | None) -> Image.Image:
    """Radial distortion: the point at radius r (1 in the corners) comes from r (1 + k r^2)^power, k
    of 0.5 to 0.9, scaled so that the radius `still` stays (None: the middle of the long sides).
    """
    k = rng.uniform(0.5, 0.9)
    y, x = np.mgrid[0 : image.height, 0 : image.width].astype(np.float32)
    centre = (image.width - 1) / 2, (image.height - 1) / 2
    u, v = x - centre[0], y - centre[1]
    corner = float(np.hypot(*centre)) or 1.0
    still = min(centre) / corner if still is None else still
    stretch = ((1 + k * (u**2 + v**2) / corner**2) / (1 + k * still**2)) ** power
    return _moved(image, centre[0] + u * stretch, centre[1] + v * stretch)


def elastic(image: Image.Image, rng: Generator) -> Image.Image:
    """Points moved by up to 1/24 to 1/14 of the shorter side, smoothly over 1/5 of it."""
    reach = _length(image, rng, 1 / 24, 1 / 14)
    y, x = np.mgrid[0 : image.height, 0 : image.width].astype(np.float32)
    dx, dy = (_smooth(image, rng, 1 / 5) for _ in range(2))
    return _moved(image, x + reach * dx, y + reach * dy)


def rain(image: Image.Image, rng: Generator) -> Image.Image:
    """Bright slanted streaks of 1/12 to 1/6 of the shorter side before a duller photo."""
    length = max(round(_length(image, rng, 1 / 12, 1 / 6)), 3)
    drops = (rng.random((image.height, image.width)) < rng.uniform(0.15, 0.3) / length) * 255.0
    streak = np.zeros((length, length), np.float32)
    slant = rng.uniform(-0.4, 0.4) * length
    ends = [(round((length + lean) / 2), y) for lean, y in ((-slant, 0), (slant, length - 1))]
    cv2.line(streak, ends[0], ends[1], 1.0)
    fallen = cv2.filter2D(drops.astype(np.float32), -1, streak, borderType=cv2.BORDER_REFLECT)
    light = np.clip(fallen, 0, 255)[..., None] * rng.uniform(0.5, 0.75)
    values = 0.8 * (_values(image) - 110) + 110
    return _picture(values + light * (255 - values) / 255)


def frost(image: Image.Image, rng: Generator) -> Image.Image:
    """Ice on a pane: white crystals, thick at the borders, over a slightly blurred photo."""
    ridges = sum(
        weight * (1 - np.abs(_smooth(image, rng, size)))
        for weight, size in ((0.5, 1 / 8), (0.3, 1 / 24), (0.2, 1 / 60))
    )
    y = np.linspace(-1, 1, image.height)[:, None]
    x = np.linspace(-1, 1, image.width)
    border = np.maximum(np.abs(x), np.abs(y)) ** 2
    ice = np.clip((ridges**3 + 0.9 * border - rng.uniform(0.45, 0.65)) * 1.8, 0, 0.92)[..., None]
    through = _values(image.filter(ImageFilter.GaussianBlur(min(image.size) / 100)))
    return _picture(through * (1 - ice) + np.array([225, 235, 245], np.float32) * ice)


DEGRADATIONS: dict[str, Degrade] = {
    "averaged": averaged,
    "blurred": blurred,
    "defocused": defocused,
    "compressed": compressed,
    "jpeg": jpeg,
    "small_x2": partial(smaller, factor=2),
    "small_x4": partial(smaller, factor=4),
    "pixelated": pixelated,
    "mosaic": mosaic,
    "oversharpened": oversharpened,
    "gaussian_noise": gaussian_noise,
    "poisson_noise": poisson_noise,
    "salt_pepper": salt_pepper,
    "contrast_up": partial(contrast, low=1.8, high=2.6),
    "contrast_down": partial(contrast, low=0.2, high=0.4),
    "quantised": quantised,
    "brightened": brightened,
    "darkened": darkened,
    "low_light": low_light,
    "saturated": partial(saturation, low=2.5, high=4.0),
    "desaturated": partial(saturation, low=0.1, high=0.35),
    "gray": gray,
    "colour_shifted": colour_shifted,
    "masked_out": masked_out,
    "rotated_90": partial(rotated, turn=Image.Transpose.ROTATE_90),
    "rotated_180": partial(rotated, turn=Image.Transpose.ROTATE_180),
    "rotated_270": partial(rotated, turn=Image.Transpose.ROTATE_270),
    "barrel": partial(bent, power=1, still=1.0),
    "pincushion": partial(bent, power=-1, still=None),
    "elastic": elastic,
    "rain": rain,
    "frost": frost,
}


def _length(image: Image.Image, rng: Generator, low: float, high: float) -> float:
    """Pixels, for a length between `low` and `high` of the shorter side."""
    return float(rng.uniform(low, high)) * min(image.size)


def _values(image: Image.Image) -> Floats:
    return np.array(image, np.float32)


def _picture(values: NDArray[np.floating]) -> Image.Image:
    return Image.fromarray(np.clip(values + 0.5, 0, 255).astype(np.uint8))


def _saved(image: Image.Image, kind: str, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, kind, quality=quality)
    return Image.open(file).convert("RGB")


def _squares(image: Image.Image, side: float) -> Image.Image:
    side = max(side, 2)
    few = (max(round(image.width / side), 1), max(round(image.height / side), 1))
    coarse = image.resize(few, Image.Resampling.BOX)
    return coarse.resize(image.size, Image.Resampling.NEAREST)


def _moved(image: Image.Image, x: Floats, y: Floats) -> Image.Image:
    """The picture whose pixels come from (x, y), mirrored at the borders."""
    x, y = x.astype(np.float32), y.astype(np.float32)
    found = cv2.remap(np.array(image), x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
    return Image.fromarray(found)


def _smooth(image: Image.Image, rng: Generator, scale: float) -> Floats:
    """Noise (height, width) in -1..1 that changes over `scale` of the shorter side."""
    cells = [max(round(side / (scale * min(image.size))), 1) + 3 for side in image.size]
    coarse = rng.uniform(-1, 1, (cells[1], cells[0])).astype(np.float32)
    return np.clip(cv2.resize(coarse, image.size, interpolation=cv2.INTER_CUBIC), -1, 1)
