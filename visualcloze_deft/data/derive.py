"""Roles computed from others where a source lacks them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import cv2
import numpy as np
from numpy.random import Generator
from PIL import Image, ImageChops, ImageOps

from visualcloze_deft.data.degrade import DEGRADATIONS, Degrade
from visualcloze_deft.errors import UserError

Pictures = Mapping[str, Image.Image]
ALIKE = 0.02  # difference in width over height that rounding to whole pixels may make


@dataclass(frozen=True, kw_only=True)
class Derived:
    """How a role is made: of pictures in the roles `needs`, all of one size."""

    needs: tuple[str, ...]
    make: Callable[[Pictures, Generator], Image.Image]


def canny(image: Image.Image) -> Image.Image:
    """White Canny edges on black (OpenCV, thresholds 100 and 200 on 8-bit grey values)."""
    edges = cv2.Canny(np.array(ImageOps.grayscale(image)), 100, 200)
    return Image.fromarray(edges).convert("RGB")


def cut_out(image: Image.Image, mask: Image.Image) -> Image.Image:
    """The photo where the mask is white, on white."""
    return Image.composite(image, Image.new("RGB", image.size, "white"), ImageOps.grayscale(mask))


def degraded(pictures: Pictures, rng: Generator, *, degrade: Degrade) -> Image.Image:
    return degrade(pictures["target"], rng)


def box_of(mask: Image.Image) -> Image.Image:
    """The smallest rectangle around the white of a mask, white on black."""
    found = Image.new("RGB", mask.size)
    if box := ImageOps.grayscale(mask).point(lambda value: 255 * (value > 127)).getbbox():
        found.paste("white", box)
    return found


DERIVED: dict[str, Derived] = {
    "box": Derived(needs=("mask",), make=lambda found, _: box_of(found["mask"])),
    "canny": Derived(needs=("target",), make=lambda found, _: canny(found["target"])),
    "foreground": Derived(
        needs=("target", "mask"), make=lambda found, _: cut_out(found["target"], found["mask"])
    ),
    "background": Derived(
        needs=("target", "mask"),
        make=lambda found, _: cut_out(found["target"], ImageChops.invert(found["mask"])),
    ),
    **{
        role: Derived(needs=("target",), make=partial(degraded, degrade=degrade))
        for role, degrade in DEGRADATIONS.items()
    },
}


def missing(wanted: Iterable[str], roles: Collection[str]) -> set[str]:
    """The roles of `wanted` that neither are among `roles` nor can be made of them."""
    made = {role for role, derived in DERIVED.items() if set(derived.needs).issubset(roles)}
    return {*wanted}.difference(roles, made)


def check_shapes(key: str, pictures: Pictures) -> None:
    """Raise `UserError` unless pictures that one is made of have the same proportions.

    A mask of half the size fits its picture; one cut otherwise marks something else.
    """
    (first, image), *others = pictures.items()
    for role, other in others:
        if abs(image.width * other.height / (image.height * other.width) - 1) > ALIKE:
            raise UserError(
                f"{key}: {role} has {other.width} x {other.height} pixels, but {first} has "
                f"{image.width} x {image.height}: other proportions; cut them alike"
            )
