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

Pictures = Mapping[str, Image.Image]
ALIKE = 0.02  # difference in width over height that rounding to whole pixels may make
ALIGNED = frozenset(  # roles that show, pixel for pixel, what the target shows
    "depth normal canny hed mlsd openpose segmentation uniformer object_masks mask box boxes "
    "foreground background hole".split()
)
Size = tuple[int, int]  # width, height


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
    # another word for the target, for tasks whose columns are called before and after
    "after": Derived(needs=("target",), make=lambda found, _: found["target"]),
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


def misfits(sizes: Mapping[str, Size]) -> dict[str, str]:
    """Role -> what is wrong with it, of maps that have other proportions than their target or,
    without one, than the first of them. sizes: of the pictures of one item, by role.

    A mask of half the size fits its picture; one cut otherwise marks something else.

    >>> misfits({"depth": (64, 96), "target": (96, 64)})["depth"]
    'depth has 64 x 96 pixels, but target has 96 x 64: it lies on its side; turn it as that is'
    """
    maps = [role for role in sizes if role in ALIGNED]
    first = "target" if "target" in sizes else next(iter(maps), "")
    found = {}
    for role in maps:
        (width, height), (wide, high) = sizes[role], sizes[first]
        if abs(wide * height / (high * width) - 1) > ALIKE:
            turned = abs(wide * width / (high * height) - 1) <= ALIKE
            why = (
                "it lies on its side; turn it as that is"
                if turned
                else ("other proportions; cut them alike")
            )
            found[role] = (
                f"{role} has {width} x {height} pixels, but {first} has {wide} x {high}: {why}"
            )
    return found
