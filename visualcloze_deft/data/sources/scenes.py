"""Scenes: an endless, deterministic source of small rooms with exact ground truth in every role.

Item i is a function of (seed, i) alone. One scene gives aligned pictures (target, depth, normal,
canny, segmentation, foreground, background), a second picture of one of its things in another
room (reference), an earlier state with an instruction that leads to it (before), a turntable view
of the thing and the same view turned (view, view_turned), its mask, and the scene with that
thing's region blanked (hole).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache, cached_property, lru_cache, partial
from itertools import permutations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from visualcloze_deft.data.base import Item
from visualcloze_deft.data.sources.renderer import (
    COLOURS,
    FLOOR,
    FLOOR_TEXTURES,
    SHAPES,
    TEXTURES,
    Rendering,
    Room,
    Thing,
    render,
)

# One flat colour per class, so that a segmentation can be read without a legend.
SEGMENT_COLOURS = {
    "floor": (60, 60, 60),
    "wall": (150, 150, 150),
    "ball": (230, 50, 50),
    "cube": (50, 110, 230),
    "cylinder": (50, 190, 80),
    "cone": (240, 200, 40),
}
# What `Scenes.classes` counts by.
NOUNS = (*SHAPES, "floor", "wall")
SURFACES = tuple(dict.fromkeys((*TEXTURES, *FLOOR_TEXTURES)))
PICTURES = 4  # of a new subject, as many as DreamBooth has at least
VIEWS = 1000  # more of them, never among those
TURN = math.pi / 4  # between the two views of the turntable: three of InsDet's 15 degree steps
STAGE = Room(
    floor="grey",
    floor_texture="plain",
    wall="grey",
    light_azimuth=4.3,
    light_height=0.9,
    ambient=0.45,
    camera_height=2.0,
)


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What item i shows, before any pixel is drawn. `subject` indexes `things`."""

    room: Room
    things: tuple[Thing, ...]
    subject: int
    other_room: Room
    other_pose: Thing
    earlier: tuple[Thing, ...]
    instruction: str


class Scenes:
    """The source `scenes`; `size` is the side of its pictures in pixels, `count` its length.

    Scenes of different seeds are independent: a held-out set is the same source with another seed.
    """

    name = "scenes"
    roles = frozenset(
        "target depth normal canny segmentation foreground background reference before "
        "view view_turned mask hole".split()
    )

    def __init__(self, *, size: int, seed: int = 0, count: int = 1_000_000) -> None:
        self.size = size
        self.seed = seed
        self.count = count

    def __len__(self) -> int:
        return self.count

    def item(self, index: int) -> Item:
        picture = _pictures(self.seed, index, self.size)
        scene = picture.scene
        return Item(
            key=f"scene {self.seed}/{index}",
            images={role: partial(getattr(picture, role)) for role in sorted(self.roles)},
            texts={"caption": caption(scene), "instruction": scene.instruction},
        )

    @cached_property
    def kinds(self) -> dict[frozenset[str], range]:
        return {self.roles: range(self.count)}

    def classes(self, index: int, role: str) -> NDArray[np.uint8]:
        """(size, size, 3): what each pixel of a picture shows, as indices of `NOUNS`, `COLOURS`
        and `SURFACES`; of a map, what the scene shows there. Roles: those of the whole scene,
        reference and before."""
        return _pictures(self.seed, index, self.size).classes(role)


class Subject:
    """The source `subject`: subject number `number`, which no scene shows, alone in rooms.

    It is a cube through which a cone of another look rises; nothing in a scene ever runs through
    something else. `PICTURES` pictures of it make as many ordered pairs as DreamBooth's photos do.
    views: instead of those pairs `VIEWS` others, each from one of these pictures to a picture of
    its own, to be asked for and never trained on. The caption names the cube and the room.
    """

    name = "subject"
    roles = frozenset({"reference", "target"})

    def __init__(self, *, size: int, number: int = 0, views: bool = False) -> None:
        self.size = size
        self.number = number
        known = range(PICTURES)
        self.pairs = (
            [(k % PICTURES, PICTURES + k) for k in range(VIEWS)]
            if views
            else list(permutations(known, 2))
        )
        self.units = None if views else [0] * len(self.pairs)  # views: each asked for has its own

    def __len__(self) -> int:
        return len(self.pairs)

    @cached_property
    def kinds(self) -> dict[frozenset[str], range]:
        return {self.roles: range(len(self))}

    def item(self, index: int) -> Item:
        reference, target = self.pairs[index]
        scene = draw_subject(self.number, target)
        return Item(
            key=f"subject {self.number}/{reference}-{target}",
            images={
                "reference": partial(self.picture, reference),
                "target": partial(self.picture, target),
            },
            texts={"caption": caption(replace(scene, things=scene.things[:1]))},
        )

    def picture(self, view: int) -> Image.Image:
        return _Pictures(draw_subject(self.number, view), self.size).target()


def draw_subject(number: int, view: int) -> Scene:
    """Picture `view` of subject `number`: always the same cube and cone, at a place, turned and in
    a room that only this picture has."""
    of_subject = np.random.default_rng([number, *b"subject"])
    cube, cone = (_draw_thing(of_subject) for _ in range(2))
    colours = [colour for colour in COLOURS if colour != cube.colour]
    cube = replace(cube, shape="cube", size=0.8)
    cone = replace(cone, shape="cone", size=0.85, colour=colours[of_subject.integers(len(colours))])
    rng = np.random.default_rng([number, view, *b"view"])
    placed = _place(rng, cube, []) or cube  # alone it finds a place
    yaw = float(rng.uniform(0, 2 * math.pi))
    things = tuple(replace(one, x=placed.x, z=placed.z, yaw=yaw) for one in (cube, cone))
    room = _draw_room(rng)
    return Scene(
        room=room,
        things=things,
        subject=0,
        other_room=room,
        other_pose=things[0],
        earlier=things,
        instruction="",
    )


def draw_scene(rng: np.random.Generator) -> Scene:
    """Draw one scene: 1 to 3 things that do not intersect, sorted from left to right."""
    room = _draw_room(rng)
    things: list[Thing] = []
    for _ in range(int(rng.choice([1, 2, 3], p=[0.25, 0.4, 0.35]))):
        thing = _place(rng, _draw_thing(rng), things)
        if thing is not None:
            things.append(thing)
    things.sort(key=lambda thing: thing.x)
    subject = int(rng.integers(len(things)))
    pose = replace(things[subject], yaw=float(rng.uniform(0, 2 * math.pi)))
    other_pose = _place(rng, pose, []) or pose
    earlier, instruction = _draw_edit(rng, tuple(things), subject)
    return Scene(
        room=room,
        things=tuple(things),
        subject=subject,
        other_room=_draw_room(rng),
        other_pose=other_pose,
        earlier=earlier,
        instruction=instruction,
    )


def caption(scene: Scene) -> str:
    """E.g. 'a red striped ball, a blue cube on a yellow planked floor, green wall'."""
    things = ", ".join(named(thing) for thing in scene.things)
    room = scene.room
    texture = "" if room.floor_texture == "plain" else f"{room.floor_texture} "
    return f"{things} on {article(room.floor)} {room.floor} {texture}floor, {room.wall} wall"


def named(thing: Thing) -> str:
    words = describe(thing)
    return f"{article(words)} {words}"


def article(words: str) -> str:
    return "an" if words[0] in "aeiou" else "a"


def describe(thing: Thing) -> str:
    texture = "" if thing.texture == "plain" else f"{thing.texture} "
    return f"{thing.colour} {texture}{thing.shape}"


def _draw_room(rng: np.random.Generator) -> Room:
    names = list(COLOURS)
    floor, wall = rng.choice(len(names), 2, replace=False)
    return Room(
        floor=names[floor],
        floor_texture=FLOOR_TEXTURES[rng.choice(3, p=[0.5, 0.25, 0.25])],
        wall=names[wall],
        light_azimuth=float(rng.uniform(3.7, 5.7)),
        light_height=float(rng.uniform(0.7, 1.2)),
        ambient=float(rng.uniform(0.38, 0.5)),
        camera_height=float(rng.uniform(1.9, 2.7)),
    )


def _draw_thing(rng: np.random.Generator) -> Thing:
    return Thing(
        shape=SHAPES[rng.integers(len(SHAPES))],
        colour=list(COLOURS)[rng.integers(len(COLOURS))],
        texture=TEXTURES[rng.choice(3, p=[0.6, 0.2, 0.2])],
        x=0.0,
        z=0.0,
        size=float(rng.uniform(0.65, 1.0)),
        yaw=float(rng.uniform(0, 2 * math.pi)),
    )


def _place(rng: np.random.Generator, thing: Thing, others: list[Thing]) -> Thing | None:
    """`thing` at a free spot of the floor, or None where 20 draws found none."""
    for _ in range(20):
        x, z = float(rng.uniform(-1.4, 1.4)), float(rng.uniform(-1.2, 1.1))
        reach = [1.05 * (thing.size + other.size) for other in others]
        if all(
            math.hypot(x - other.x, z - other.z) > r and abs(x - other.x) > 0.45 * r
            for other, r in zip(others, reach, strict=True)
        ):
            return replace(thing, x=x, z=z)
    return None


def _draw_edit(
    rng: np.random.Generator, things: tuple[Thing, ...], k: int
) -> tuple[tuple[Thing, ...], str]:
    """The state before an edit that ends in `things`, and the words for the edit."""
    thing = things[k]
    kind = rng.choice(["recolour", "replace", "add", "remove"], p=[0.4, 0.2, 0.2, 0.2])
    extra = _place(rng, _draw_thing(rng), list(things)) if kind == "remove" else None
    if extra is not None:
        return (*things, extra), f"remove the {describe(extra)}"
    if kind == "add" and len(things) > 1:
        where = ("on the left", "in the middle", "on the right")
        place = where[0] if k == 0 else where[2] if k == len(things) - 1 else where[1]
        return (*things[:k], *things[k + 1 :]), f"add {named(thing)} {place}"
    if kind == "replace":
        shapes = [shape for shape in SHAPES if shape != thing.shape]
        before = replace(thing, shape=shapes[rng.integers(3)])
        words = f"replace the {describe(before)} with a {thing.shape}"
    else:
        colours = [colour for colour in COLOURS if colour != thing.colour]
        before = replace(thing, colour=colours[rng.integers(len(colours))])
        words = f"turn the {describe(before)} {thing.colour}"
    return (*things[:k], before, *things[k + 1 :]), words


class _Pictures:
    """The pictures of one scene, each drawn at most once, in the roles of `Scenes.roles`."""

    def __init__(self, scene: Scene, size: int) -> None:
        self.scene = scene
        self.size = size
        self._render = cache(partial(render, size=size))

    def target(self) -> Image.Image:
        return _picture(self._scene().image)

    def depth(self) -> Image.Image:
        return _picture(np.repeat(self._scene().depth[..., None], 3, axis=-1))

    def normal(self) -> Image.Image:
        return _picture(self._scene().normal * 0.5 + 0.5)

    def canny(self) -> Image.Image:
        from visualcloze_deft.data.derive import canny

        return canny(self.target())

    def segmentation(self) -> Image.Image:
        names = [thing.shape for thing in self.scene.things] + ["floor", "wall"]
        table = np.array([SEGMENT_COLOURS[name] for name in names], np.uint8)
        return Image.fromarray(table[self._scene().segment])  # FLOOR, WALL index from the end

    def mask(self) -> Image.Image:
        return _picture(np.repeat(self._subject()[..., None], 3, axis=-1).astype(np.float32))

    def foreground(self) -> Image.Image:
        return self._keep(self._scene().segment > FLOOR + 1)

    def background(self) -> Image.Image:
        return self._keep(self._scene().segment < 0)

    def reference(self) -> Image.Image:
        return _picture(self._render(*self._shown("reference")).image)

    def before(self) -> Image.Image:
        return _picture(self._render(*self._shown("before")).image)

    def classes(self, role: str) -> NDArray[np.uint8]:
        room, things = self._shown(role)
        shown: list[tuple[str, str, str]] = [
            *((thing.shape, thing.colour, thing.texture) for thing in things),
            ("floor", room.floor, room.floor_texture),  # FLOOR, WALL index from the end
            ("wall", room.wall, "plain"),
        ]
        table = [
            (NOUNS.index(noun), list(COLOURS).index(colour), SURFACES.index(surface))
            for noun, colour, surface in shown
        ]
        return np.array(table, np.uint8)[self._render(room, things).segment]

    def _shown(self, role: str) -> tuple[Room, tuple[Thing, ...]]:
        scene = self.scene
        if role == "reference":
            return scene.other_room, (scene.other_pose,)
        return scene.room, scene.earlier if role == "before" else scene.things

    def view(self) -> Image.Image:
        return self._turntable(0.0)

    def view_turned(self) -> Image.Image:
        return self._turntable(TURN)

    def hole(self) -> Image.Image:
        """The scene with the box around its subject (10 % wider) filled with middle grey."""
        image = np.array(self.target())
        rows, columns = np.nonzero(self._subject())
        if len(rows):
            grow = 0.1 * max(np.ptp(rows), np.ptp(columns)) + 1
            top, left = (max(int(values.min() - grow), 0) for values in (rows, columns))
            bottom, right = (int(values.max() + grow) + 1 for values in (rows, columns))
            image[top:bottom, left:right] = 128
        return Image.fromarray(image)

    def _scene(self) -> Rendering:
        return self._render(*self._shown("target"))

    def _subject(self) -> NDArray[np.bool_]:
        return self._scene().segment == self.scene.subject

    def _keep(self, where: NDArray[np.bool_]) -> Image.Image:
        return Image.fromarray(
            np.where(where[..., None], np.array(self.target()), 255).astype("u1")
        )

    def _turntable(self, turn: float) -> Image.Image:
        thing = self.scene.things[self.scene.subject]
        alone = replace(thing, x=0.0, z=-1.2, size=1.0, yaw=thing.yaw + turn)
        return _picture(self._render(STAGE, (alone,), stage=True).image)


@lru_cache(maxsize=2)  # an item's pictures and their classes share renderings
def _pictures(seed: int, index: int, size: int) -> _Pictures:
    return _Pictures(draw_scene(np.random.default_rng([seed, index])), size)


def _picture(values: NDArray[np.float32]) -> Image.Image:
    return Image.fromarray((np.clip(values, 0, 1) * 255 + 0.5).astype(np.uint8))
