"""The source `insdet`: objects on a turntable, scenes in which those objects stand in boxes, the
scenes as a whole from one side and another, and backgrounds without objects.

Objects/NNN_name/{images,masks}/001..024, views 15 degrees apart; Scenes/<level>/<place>/rgb_NNN.jpg
with its boxes in Pascal VOC beside it, rgb_NNN.xml; Background/*.jpg (InsDet, arXiv 2310.19257).
Photos in one folder may show different rooms: which show one place is said in `SAME_PLACE`.
"""

from __future__ import annotations

import os
import xml.etree.ElementTree as ET
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from os.path import lexists
from pathlib import Path

from PIL import Image, ImageDraw

from visualcloze_deft.data.base import Item, Listed
from visualcloze_deft.errors import UserError
from visualcloze_deft.images.maps import read_role
from visualcloze_deft.images.reading import (
    Box,
    folders_in,
    images_in,
    listing,
    picture_size,
    read_crop,
    read_image,
)
from visualcloze_deft.storage.inside import located, path_inside
from visualcloze_deft.storage.text_files import parse_json, read_text

VIEWS = 24  # of a complete turn
TURN = 3  # views, 45 degrees
AROUND = 2.2  # side of a crop over the longer side of its box
GROWN = 0.1  # of the longer side of a box: how far a hole reaches beyond it, on every side
LIGHT_GREY = (219, 219, 219)
MIDDLE_GREY = (128, 128, 128)
SAME_PLACE = "same_place.jsonl"
"""In Scenes: a line for each place that was looked at, a list of photos that show it, such as
["easy/office_001/rgb_000.jpg", "easy/office_001/rgb_003.jpg"], all of one folder."""


@dataclass(frozen=True, kw_only=True)
class View:
    """A photo of one object, and where it has one, the mask that is white on the object."""

    image: Path
    mask: Path | None


@dataclass(frozen=True, kw_only=True)
class Place:
    """A box of a scene picture, and an object that stands in it; `crop` holds the box."""

    name: str
    view: View
    picture: Path
    box: Box
    crop: Box


class InsDet(Listed):
    """The source `insdet` at `root`: turned objects, objects in scenes, places, backgrounds.

    size: the side in pixels below which a crop of a scene keeps all the pixels of its picture.
    """

    name = "insdet"
    may_have = frozenset("view view_turned hole target box place place_moved".split())

    def __init__(self, root: Path, *, size: int = 512) -> None:
        if not (root / "Objects").is_dir():
            found = f"found {listing(root)}" if root.is_dir() else "no such folder"
            raise UserError(f"{root}: expected the folders Objects and Scenes; {found}")
        self.root = root
        self.views = views = read_views(root / "Objects")
        self.same = read_same_places(root / "Scenes")
        objects = [turned(name, views[name]) for name in views]
        places = [
            [
                *(
                    placed(place, size=size)
                    for path in sorted(folder.glob("rgb_*.xml"))
                    for place in read_places(path, views)
                ),
                *(one for photos in self.same.get(folder, ()) for one in moved(photos, size=size)),
            ]
            for folder in sorted({*root.glob("Scenes/*/*/"), *self.same})
        ]
        groups = (objects, places, [[one] for one in backgrounds(root, size=size)])
        items = [item for units in groups for unit in units for item in unit]
        self.units = [k for units in groups for k, unit in enumerate(units) for _ in unit]
        if not items:
            raise UserError(
                f"{root}: no object with two views in Objects/*/images, and no box with the name "
                f"of one in Scenes/*/*/rgb_*.xml; Objects holds {listing(root / 'Objects')}"
            )
        super().__init__(items)


def turned(name: str, views: list[View]) -> list[Item]:
    """Each view of an object with the one 45 degrees on; with the next where views are missing."""
    step = TURN if len(views) == VIEWS else 1
    others = views[step:] + views[:step]
    return [
        Item(
            key=f"{name} {view.image.stem}-{other.image.stem}",
            images={"view": partial(alone, view), "view_turned": partial(alone, other)},
            texts={"caption": f"a {label(name)}"},
        )
        for view, other in zip(views, others, strict=True)
        if view != other
    ]


def placed(place: Place, *, size: int) -> Item:
    """An object, and a scene with and without it."""
    scene = f"{place.picture.parent.name}/{place.picture.stem}"
    return Item(
        key=f"{scene} {place.name} at {place.box[0]:.0f}, {place.box[1]:.0f}",
        images={
            "view": partial(alone, place.view),
            "target": partial(read_crop, place.picture, place.crop, size=size),
            "hole": partial(hole, place, size=size),
            "box": partial(box_map, place, size=size),
        },
        texts={"caption": f"a {label(place.name)}"},
    )


def read_same_places(scenes: Path) -> dict[Path, list[list[Path]]]:
    """Folder of scenes -> lists of photos in it that show one place, from `SAME_PLACE`."""
    path = scenes / SAME_PLACE
    found: dict[Path, list[list[Path]]] = defaultdict(list)
    lines = read_text(path).splitlines() if lexists(path) else []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        names = parse_json(where, line)
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise UserError(f"{where}: expected a list of photos of one place, not {line}")
        inside = [path_inside(str(scenes), located(where, str(scenes), name)) for name in names]
        photos = [scenes / os.path.relpath(name, scenes) for name in inside]
        for photo in photos:
            if not photo.is_file():
                raise UserError(f"{where}: no such file {photo}")
        if len(photos) < 2 or len({*photos}) < len(photos):
            raise UserError(f"{where}: expected two or more different photos of one place")
        if len({photo.parent for photo in photos}) > 1:
            raise UserError(f"{where}: photos of one place stand in one folder; give each its line")
        found[photos[0].parent].append(photos)
    return found


def moved(photos: Sequence[Path], *, size: int) -> list[Item]:
    """Each photo of a place with the next one; the last with the first."""
    return [
        Item(
            key=f"{one.parent.name} {one.stem}-{other.stem}",
            images={
                "place": partial(read_whole, one, size=size),
                "place_moved": partial(read_whole, other, size=size),
            },
        )
        for one, other in zip(photos, [*photos[1:], photos[0]], strict=True)
    ]


def backgrounds(root: Path, *, size: int) -> list[Item]:
    """Photos without objects."""
    folder = root / "Background"
    photos = images_in(folder) if folder.is_dir() else {}
    return [
        Item(key=f"background {stem}", images={"target": partial(read_whole, path, size=size)})
        for stem, path in photos.items()
    ]


def read_whole(path: Path, *, size: int) -> Image.Image:
    """A photo of many megapixels, decoded no larger than `size` asks for."""
    return read_crop(path, (0, 0, *picture_size(path)), size=size)


def label(name: str) -> str:
    """The words of an object's name.

    >>> label("044_corgi_doll")
    'corgi doll'
    """
    return name.partition("_")[2].replace("_", " ") or name


def alone(view: View) -> Image.Image:
    """The object on light grey in a square that just holds it; without a mask, the whole photo."""
    image = read_image(view.image)
    if view.mask is None:
        return image
    mask = read_role("mask", view.mask).convert("L").point(lambda value: 255 * (value > 127), "L")
    if mask.size != image.size:
        raise UserError(f"{view.mask}: {mask.size} pixels, but its photo has {image.size}")
    box = mask.getbbox()
    if box is None:
        raise UserError(f"{view.mask}: no white pixel, so no object")
    left, top, right, bottom = box
    side = max(right - left, bottom - top)
    square = Image.new("RGB", (side, side), LIGHT_GREY)
    corner = (side - (right - left)) // 2, (side - (bottom - top)) // 2
    square.paste(image.crop(box), corner, mask.crop(box))
    return square


def hole(place: Place, *, size: int) -> Image.Image:
    """The crop of the scene with the box, grown on every side, filled with middle grey."""
    image = read_crop(place.picture, place.crop, size=size)
    grow = GROWN * max(place.box[2] - place.box[0], place.box[3] - place.box[1])
    ImageDraw.Draw(image).rectangle(in_crop(place, image, grow=grow), fill=MIDDLE_GREY)
    return image


def box_map(place: Place, *, size: int) -> Image.Image:
    """White where the box is, black elsewhere, as large as the crop of the scene."""
    crop = read_crop(place.picture, place.crop, size=size)
    image = Image.new("RGB", crop.size)
    ImageDraw.Draw(image).rectangle(in_crop(place, image, grow=0), fill="white")
    return image


def in_crop(place: Place, image: Image.Image, *, grow: float) -> tuple[int, int, int, int]:
    """The corners of the box, grown by `grow` pixels of the scene, in `image` of its crop."""
    left, top, right, bottom = place.box
    scale = image.width / (place.crop[2] - place.crop[0])
    x, y = left - grow - place.crop[0], top - grow - place.crop[1]
    width, height = right - left + 2 * grow, bottom - top + 2 * grow
    corners = x * scale, y * scale, (x + width) * scale, (y + height) * scale
    return round(corners[0]), round(corners[1]), round(corners[2]), round(corners[3])


def crop_around(box: Box, size: tuple[int, int]) -> Box:
    """The square around `box`, moved into a picture of `size`; cut where the picture is smaller.

    >>> crop_around((0, 40, 10, 50), (100, 100))
    (0, 34, 22, 56)
    """
    side = round(AROUND * max(box[2] - box[0], box[3] - box[1]))
    edges = []
    for low, high, length in ((box[0], box[2], size[0]), (box[1], box[3], size[1])):
        start = max(min(round((low + high - side) / 2), length - side), 0)
        edges.append((start, min(start + side, length)))
    return edges[0][0], edges[1][0], edges[0][1], edges[1][1]


def read_views(objects: Path) -> dict[str, list[View]]:
    """The views of each object, in order."""
    views: dict[str, list[View]] = {}
    for folder in folders_in(objects):
        if not (folder / "images").is_dir():
            raise UserError(f"{folder}: expected the folder images in it; found {listing(folder)}")
        masks = images_in(folder / "masks") if (folder / "masks").is_dir() else {}
        photos = images_in(folder / "images")
        views[folder.name] = [View(image=photos[key], mask=masks.get(key)) for key in photos]
    return views


def read_places(path: Path, views: dict[str, list[View]]) -> list[Place]:
    """The boxes in one VOC file whose object has views, with the square of scene around each."""
    picture = path.with_suffix(".jpg")
    if not picture.is_file():
        raise UserError(f"{path}: its picture {picture.name} is missing")
    root = _parse(path)
    width, height = picture_size(picture)
    said = tuple(_number(path, root, f"size/{side}") for side in ("width", "height"))
    if said != (width, height):
        raise UserError(
            f"{path}: its boxes are for {said[0]:g} x {said[1]:g} pixels, "
            f"but {picture.name} has {width} x {height}; save it upright, at the size annotated"
        )
    places = []
    for element in root.iter("object"):
        name = element.findtext("name", "").strip()
        left, top, right, bottom = (
            _number(path, element, f"bndbox/{edge}") for edge in ("xmin", "ymin", "xmax", "ymax")
        )
        box = max(left, 0), max(top, 0), min(right, width), min(bottom, height)
        if not (box[2] - box[0] >= 1 and box[3] - box[1] >= 1):
            given = f"{left:g}, {top:g}, {right:g}, {bottom:g}"
            raise UserError(f"{path}: {name}: no pixel of the box {given} lies in the picture")
        if views.get(name):
            crop = crop_around(box, (width, height))
            view = views[name][0]
            places.append(Place(name=name, view=view, picture=picture, box=box, crop=crop))
    return places


def boxes_of(path: Path) -> list[str]:
    """The name of each box in one VOC file."""
    return [element.findtext("name", "").strip() for element in _parse(path).iter("object")]


def _parse(path: Path) -> ET.Element:
    """The XML in `path`. Entities, which can blow up in memory, are refused unread."""
    source = read_text(path)
    if "<!DOCTYPE" in source or "<!ENTITY" in source:
        raise UserError(f"{path}: declares a document type; Pascal VOC needs none, remove it")
    try:
        return ET.fromstring(source)
    except (ET.ParseError, ValueError) as error:  # also of an encoding that it declares
        raise UserError(f"{path}: not valid XML in UTF-8: {error}") from None


def _number(path: Path, element: ET.Element, place: str) -> float:
    value = element.findtext(place, "")
    try:
        return float(value)
    except ValueError:
        raise UserError(f"{path}: {place} must be a number, found {value!r}") from None
