"""A small ray caster: rooms of textured solids, rendered with exact depth, normals and segments.

World: x right, y up, z away from the camera; the floor is y = 0, the wall stands at `WALL_Z`.
Axes: p rays of one picture (row-major), k things.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Shape = Literal["ball", "cube", "cylinder", "cone"]
Texture = Literal["plain", "striped", "spotted"]
FloorTexture = Literal["plain", "checkered", "planked"]

SHAPES: tuple[Shape, ...] = ("ball", "cube", "cylinder", "cone")
TEXTURES: tuple[Texture, ...] = ("plain", "striped", "spotted")
FLOOR_TEXTURES: tuple[FloorTexture, ...] = ("plain", "checkered", "planked")
# Named colours, sRGB in 0..1, spread far enough apart that a name tells the colour.
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.84, 0.14, 0.14),
    "orange": (0.95, 0.52, 0.10),
    "yellow": (0.95, 0.86, 0.20),
    "green": (0.20, 0.62, 0.24),
    "cyan": (0.25, 0.78, 0.80),
    "blue": (0.16, 0.30, 0.82),
    "purple": (0.52, 0.22, 0.66),
    "pink": (0.95, 0.58, 0.72),
    "brown": (0.46, 0.29, 0.16),
    "white": (0.94, 0.94, 0.92),
    "grey": (0.52, 0.52, 0.54),
    "black": (0.12, 0.12, 0.13),
}
WALL_Z = 2.4
VIEW = 0.36  # tangent of half the angle of view: at 64 px most things are 19 to 32 px wide
FLOOR, WALL = -2, -1  # segment ids of the room; things count from 0
NEAR, FAR = 2.8, 9.5  # distances that map to depth 1 and 0


@dataclass(frozen=True, kw_only=True)
class Thing:
    """One solid standing on the floor at (x, z); `size` is its half width, `yaw` in radians."""

    shape: Shape
    colour: str
    texture: Texture
    x: float
    z: float
    size: float
    yaw: float

    @property
    def height(self) -> float:
        return self.size * {"ball": 2.0, "cube": 1.7, "cylinder": 2.1, "cone": 2.3}[self.shape]


@dataclass(frozen=True, kw_only=True)
class Room:
    """Where the things stand: floor, wall, light and camera (angles in radians)."""

    floor: str
    floor_texture: FloorTexture
    wall: str
    light_azimuth: float
    light_height: float
    ambient: float
    camera_height: float


@dataclass(frozen=True, kw_only=True)
class Rendering:
    """Aligned ground truth of one picture, all (height, width, ...) arrays.

    image: float in 0..1, RGB; depth: float in 0..1, near is 1; normal: unit vectors in camera
    axes (x right, y up, z to the viewer); segment: thing index, `FLOOR` or `WALL`.
    """

    image: Floats
    depth: Floats
    normal: Floats
    segment: NDArray[np.int8]


def render(room: Room, things: tuple[Thing, ...], *, size: int, stage: bool = False) -> Rendering:
    """Render `size` x `size` pixels with 2 x 2 rays each; `stage` drops floor and wall."""
    origin, rays, camera = _camera(room.camera_height, 2 * size)
    light = np.array(
        [
            np.cos(room.light_azimuth) * np.cos(room.light_height),
            np.sin(room.light_height),
            np.sin(room.light_azimuth) * np.cos(room.light_height),
        ],
        np.float32,
    )
    distance, normal, segment = _room_hits(origin, rays)
    for k, thing in enumerate(things):
        near = _near_rays(thing, origin, rays)
        t, n = _hit(thing, origin, rays[near])
        closer = t < distance[near]
        index = near[closer]
        distance[index], normal[index], segment[index] = t[closer], n[closer], k

    points = origin + rays * distance[:, None]
    albedo = _albedo(room, things, points, segment)
    lambert = np.clip(normal @ light, 0, 1)
    ground = np.flatnonzero(segment < 0)
    lambert[ground] *= _lit(things, points[ground], light)
    image = albedo * (room.ambient + (1.05 - room.ambient) * lambert)[:, None]
    if stage:
        image[segment < 0] = 0.86
    depth = np.clip((FAR - distance) / (FAR - NEAR), 0, 1)
    normal = _average(normal @ camera.T, size)
    return Rendering(
        image=_average(np.clip(image, 0, 1), size),
        depth=_average(depth[:, None], size)[..., 0],
        normal=normal / np.linalg.norm(normal, axis=-1, keepdims=True),
        segment=segment.reshape(2 * size, 2 * size)[::2, ::2].astype(np.int8),
    )


def _camera(height: float, side: int) -> tuple[Floats, Floats, Floats]:
    """Camera origin, unit rays (p 3) and the rotation from world to camera axes."""
    origin = np.array([0.0, height, -5.6], np.float32)
    forward = np.array([0.0, 0.55, 0.0], np.float32) - origin
    forward /= np.linalg.norm(forward)
    right = np.array([1.0, 0.0, 0.0], np.float32)
    up = np.cross(forward, right)
    ticks = (np.arange(side, dtype=np.float32) + 0.5) / side * 2 - 1
    u, v = np.meshgrid(ticks * VIEW, -ticks * VIEW)
    rays = forward + u.reshape(-1, 1) * right + v.reshape(-1, 1) * up
    rays /= np.linalg.norm(rays, axis=1, keepdims=True)
    return origin, rays.astype(np.float32), np.stack([right, up, -forward]).astype(np.float32)


def _average(values: Floats, size: int) -> Floats:
    v = values.reshape(2 * size, 2 * size, -1)  # four strided sums: six times faster than mean
    return 0.25 * (v[::2, ::2] + v[1::2, ::2] + v[::2, 1::2] + v[1::2, 1::2])


def _room_hits(origin: Floats, rays: Floats) -> tuple[Floats, Floats, NDArray[np.int64]]:
    to_wall = (WALL_Z - origin[2]) / np.maximum(rays[:, 2], 1e-6)
    to_floor = np.where(rays[:, 1] < -1e-6, -origin[1] / np.minimum(rays[:, 1], -1e-6), np.inf)
    floor = to_floor < to_wall
    normal = np.where(
        floor[:, None], np.array([0, 1, 0], np.float32), np.array([0, 0, -1], np.float32)
    )
    return np.where(floor, to_floor, to_wall), normal, np.where(floor, FLOOR, WALL)


def _near_rays(thing: Thing, origin: Floats, rays: Floats) -> NDArray[np.int64]:
    """Indices of the rays that pass the thing's bounding sphere."""
    half = thing.height / 2
    centre = np.array([thing.x, half, thing.z], np.float32) - origin
    reach = np.hypot(half, thing.size * 1.3)
    along = rays @ centre
    return np.flatnonzero(centre @ centre - along**2 < reach**2)


def _to_local(thing: Thing, vectors: Floats) -> Floats:
    c, s = np.cos(thing.yaw), np.sin(thing.yaw)
    x, y, z = vectors[..., 0], vectors[..., 1], vectors[..., 2]
    return np.stack([c * x + s * z, y, -s * x + c * z], axis=-1)


def _hit(thing: Thing, origin: Floats, rays: Floats) -> tuple[Floats, Floats]:
    """Distance (inf where missed) and outward normal of the first hit, for `rays` (p 3)."""
    start = _to_local(thing, origin - np.array([thing.x, 0, thing.z], np.float32))
    local = _to_local(thing, rays)
    t, n = _SOLIDS[thing.shape](start, local, thing.size, thing.height)
    c, s = np.cos(-thing.yaw), np.sin(-thing.yaw)
    world = np.stack([c * n[:, 0] + s * n[:, 2], n[:, 1], -s * n[:, 0] + c * n[:, 2]], axis=-1)
    return t, world


def _ball(start: Floats, rays: Floats, size: float, height: float) -> tuple[Floats, Floats]:
    offset = start - np.array([0, size, 0], np.float32)
    b = (rays * offset).sum(-1)
    d = b**2 - ((offset**2).sum(-1) - size**2)
    t = np.where(d > 0, -b - np.sqrt(np.maximum(d, 0)), np.inf)
    t = np.where(t > 1e-4, t, np.inf)
    return t, (offset + rays * np.where(np.isfinite(t), t, 0)[:, None]) / size


def _cube(start: Floats, rays: Floats, size: float, height: float) -> tuple[Floats, Floats]:
    half = np.array([0.85 * size, height / 2, 0.85 * size], np.float32)
    offset = start - np.array([0, height / 2, 0], np.float32)
    safe = np.where(np.abs(rays) < 1e-7, np.float32(1e-7), rays)
    a, b = (-half - offset) / safe, (half - offset) / safe
    enter, leave = np.minimum(a, b), np.maximum(a, b)
    axis = enter.argmax(-1)
    t, out = enter.max(-1), leave.min(-1)
    t = np.where((t < out) & (t > 1e-4), t, np.inf)
    normal = np.zeros_like(rays)
    p = np.arange(len(rays))
    normal[p, axis] = -np.sign(rays[p, axis])
    return t, normal


def _cylinder(start: Floats, rays: Floats, size: float, height: float) -> tuple[Floats, Floats]:
    radius = 0.85 * size
    return _round(start, rays, height, radius, radius)


def _cone(start: Floats, rays: Floats, size: float, height: float) -> tuple[Floats, Floats]:
    return _round(start, rays, height, size, 0.0)


def _round(
    start: Floats, rays: Floats, height: float, bottom: float, top: float
) -> tuple[Floats, Floats]:
    """A solid of revolution whose radius goes linearly from `bottom` to `top`; cap included."""
    slope = (top - bottom) / height
    radius = bottom + slope * start[..., 1]
    a = rays[:, 0] ** 2 + rays[:, 2] ** 2 - (slope * rays[:, 1]) ** 2
    b = start[..., 0] * rays[:, 0] + start[..., 2] * rays[:, 2] - slope * rays[:, 1] * radius
    c = start[..., 0] ** 2 + start[..., 2] ** 2 - radius**2
    d = b**2 - a * c
    a = np.where(np.abs(a) < 1e-7, np.float32(1e-7), a)
    root = np.sqrt(np.maximum(d, 0))
    t = np.full(len(rays), np.inf, np.float32)
    for candidate in ((-b - root) / a, (-b + root) / a):
        y = start[..., 1] + candidate * rays[:, 1]
        good = (d > 0) & (candidate > 1e-4) & (y >= 0) & (y <= height)
        t = np.where(good & (candidate < t), candidate, t)
    point = start + rays * np.where(np.isfinite(t), t, 0)[:, None]
    normal = np.stack([point[:, 0], -slope * (bottom + slope * point[:, 1]), point[:, 2]], axis=-1)
    normal /= np.maximum(np.linalg.norm(normal, axis=-1, keepdims=True), 1e-6)
    if top > 0:
        down = np.where(np.abs(rays[:, 1]) < 1e-7, np.float32(-1e-7), rays[:, 1])
        cap = (height - start[..., 1]) / down
        spot = start + rays * cap[:, None]
        capped = (cap > 1e-4) & (spot[:, 0] ** 2 + spot[:, 2] ** 2 < top**2) & (cap < t)
        t = np.where(capped, cap, t)
        normal[capped] = (0, 1, 0)
    return t.astype(np.float32), normal


_SOLIDS = {"ball": _ball, "cube": _cube, "cylinder": _cylinder, "cone": _cone}


def _lit(things: tuple[Thing, ...], points: Floats, light: Floats) -> Floats:
    """1 where the light reaches `points` (p 3), 0.25 in shadow."""
    lit = np.ones(len(points), np.float32)
    for thing in things:
        centre = np.array([thing.x, thing.height / 2, thing.z], np.float32) - points
        along = centre @ light
        reach = np.hypot(thing.height / 2, thing.size * 1.3)
        near = np.flatnonzero(((centre**2).sum(-1) - along**2 < reach**2) & (lit == 1))
        if len(near):
            start = points[near] + light * 1e-3
            towards = np.broadcast_to(light, start.shape)
            t, _ = _hit(thing, start, towards)
            lit[near[np.isfinite(t)]] = 0.25
    return lit


def _albedo(
    room: Room, things: tuple[Thing, ...], points: Floats, segment: NDArray[np.int64]
) -> Floats:
    albedo = np.empty_like(points)
    wall = segment == WALL
    fade = 0.85 + 0.15 * np.clip(points[wall, 1:2] / 4, 0, 1)
    albedo[wall] = np.array(COLOURS[room.wall], np.float32) * fade
    floor = segment == FLOOR
    x, z = points[floor, 0], points[floor, 2]
    if room.floor_texture == "checkered":
        dark = (np.floor(x / 0.9) + np.floor(z / 0.9)) % 2
    elif room.floor_texture == "planked":
        dark = np.floor(x / 0.7) % 2
    else:
        dark = np.zeros_like(x)
    albedo[floor] = np.array(COLOURS[room.floor], np.float32) * (1 - 0.28 * dark)[:, None]
    for k, thing in enumerate(things):
        mine = segment == k
        local = (
            _to_local(thing, points[mine] - np.array([thing.x, 0, thing.z], np.float32))
            / thing.size
        )
        first, second = COLOURS[thing.colour], _second(thing.colour)
        albedo[mine] = np.where(_pattern(thing.texture, local)[:, None], second, first)
    return albedo


def _second(colour: str) -> tuple[float, float, float]:
    return COLOURS["black" if colour in ("white", "yellow") else "white"]


def _pattern(texture: Texture, local: Floats) -> NDArray[np.bool_]:
    """Where the second colour shows, for points in thing axes scaled by its size."""
    if texture == "plain":
        return np.zeros(len(local), bool)
    if texture == "striped":
        return np.sin((local[:, 0] + 0.35 * local[:, 1]) * 6.0) > 0.45
    cell = local * 1.9 - np.round(local * 1.9)
    return (cell**2).sum(-1) < 0.1
