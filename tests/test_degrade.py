"""Each of the 32 degradations does what its name says, the same for the same seed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from visualcloze_deft.data.degrade import DEGRADATIONS
from visualcloze_deft.data.sources.scenes import Scenes

Floats = NDArray[np.float64]


def photo(size: tuple[int, int] = (96, 64)) -> Image.Image:
    return Scenes(size=96, seed=2).item(5).image("target").resize(size, Image.Resampling.LANCZOS)


def degraded(name: str, image: Image.Image, seed: int = 0) -> Image.Image:
    return DEGRADATIONS[name](image, np.random.default_rng(seed))


def values(image: Image.Image) -> Floats:
    return np.asarray(image, float)


def saturation(image: Image.Image) -> float:
    return float(np.ptp(values(image), axis=2).mean())


def detail(image: Image.Image) -> float:
    """Mean difference of neighbours."""
    v = values(image)
    return float(np.abs(np.diff(v, axis=0)).mean() + np.abs(np.diff(v, axis=1)).mean())


def levels(image: Image.Image) -> int:
    return max(len(np.unique(values(image)[..., c])) for c in range(3))


@pytest.mark.parametrize("name", DEGRADATIONS)
@pytest.mark.parametrize("size", [(96, 64), (33, 80), (16, 16)])
def test_it_gives_a_changed_picture_of_the_same_size(name: str, size: tuple[int, int]) -> None:
    image = photo(size)
    before = image.copy()
    found = degraded(name, image)
    assert (found.size, found.mode) == (image.size, "RGB")
    assert np.abs(values(found) - values(image)).mean() > 1
    assert image.tobytes() == before.tobytes()


@pytest.mark.parametrize("name", DEGRADATIONS)
def test_the_same_seed_gives_the_same_picture(name: str) -> None:
    assert degraded(name, photo(), 7).tobytes() == degraded(name, photo(), 7).tobytes()


CLAIMS: dict[str, Callable[[Image.Image, Image.Image], bool]] = {
    "averaged": lambda a, b: detail(b) < 0.7 * detail(a),
    "blurred": lambda a, b: detail(b) < 0.7 * detail(a),
    "defocused": lambda a, b: detail(b) < 0.7 * detail(a),
    "small_x2": lambda a, b: detail(b) < detail(a),
    "small_x4": lambda a, b: detail(b) < detail(degraded("small_x2", a)),
    "oversharpened": lambda a, b: detail(b) > 1.3 * detail(a),
    "gaussian_noise": lambda a, b: 15 < (values(b) - values(a)).std() < 65,
    "poisson_noise": lambda a, b: (values(b) - values(a)).std() > 15,
    "salt_pepper": lambda a, b: (
        0.02 < np.isin(values(b), (0, 255)).all(axis=2).mean() - 0.01 < 0.25
    ),
    "contrast_up": lambda a, b: values(b).std() > 1.2 * values(a).std(),
    "contrast_down": lambda a, b: values(b).std() < 0.5 * values(a).std(),
    "quantised": lambda a, b: levels(b) <= 4 < levels(a),
    "brightened": lambda a, b: values(b).mean() > values(a).mean() + 30,
    "darkened": lambda a, b: values(b).mean() < 0.5 * values(a).mean(),
    "low_light": lambda a, b: values(b).mean() < 0.5 * values(a).mean(),
    "saturated": lambda a, b: saturation(b) > 1.2 * saturation(a),
    "desaturated": lambda a, b: 0 < saturation(b) < 0.5 * saturation(a),
    "gray": lambda a, b: saturation(b) == 0,
    "masked_out": lambda a, b: 0.05 < (values(b).sum(axis=2) == 0).mean() < 0.8,
    "rotated_180": lambda a, b: degraded("rotated_180", b).tobytes() == a.tobytes(),
}


@pytest.mark.parametrize("name", CLAIMS)
@pytest.mark.parametrize("seed", range(4))
def test_it_does_what_its_name_says(name: str, seed: int) -> None:
    image = photo()
    assert CLAIMS[name](image, degraded(name, image, seed))


def test_quarter_turns_of_a_square_picture_undo_each_other() -> None:
    image = photo((64, 64))
    turned = degraded("rotated_90", image)
    assert degraded("rotated_270", turned).tobytes() == image.tobytes()
    assert turned.tobytes() != image.tobytes()


@pytest.mark.parametrize(("name", "larger"), [("barrel", True), ("pincushion", False)])
def test_a_barrel_enlarges_the_middle_and_a_pincushion_makes_it_smaller(
    name: str, larger: bool
) -> None:
    y, x = np.mgrid[0:101, 0:101] - 50
    ring = (np.abs(np.hypot(x, y) - 25) < 2) * 255
    image = Image.fromarray(np.repeat(ring[..., None], 3, axis=2).astype(np.uint8))
    found = values(degraded(name, image))[50, 50:, 0]
    radius = float((found * np.arange(51)).sum() / found.sum())
    assert radius > 27 if larger else radius < 24
