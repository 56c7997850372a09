"""Scenes are deterministic, and their ground truth is true."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from visualcloze_deft.data.base import Item
from visualcloze_deft.data.sources.renderer import (
    COLOURS,
    FLOOR,
    SHAPES,
    TEXTURES,
    Rendering,
    Room,
    Thing,
    render,
)
from visualcloze_deft.data.sources.scenes import (
    NOUNS,
    SEGMENT_COLOURS,
    Scene,
    Scenes,
    caption,
    draw_scene,
)

SIZE = 32
SOURCE = Scenes(size=SIZE)
ROLES = sorted(Scenes.roles)
SOME = range(40)
ROOM = Room(
    floor="grey",
    floor_texture="plain",
    wall="white",
    light_azimuth=4.5,
    light_height=1.0,
    ambient=0.45,
    camera_height=2.2,
)


def scene_of(index: int) -> Scene:
    return draw_scene(np.random.default_rng([SOURCE.seed, index]))


def pixels(item: Item, role: str) -> NDArray[np.uint8]:
    return np.array(item.image(role))


def thing(**changes: object) -> Thing:
    plain = {"shape": "ball", "colour": "red", "texture": "plain", "yaw": 0.3}
    return Thing(**{**plain, "x": 0.0, "z": 0.0, "size": 0.7, **changes})


def near(mask: NDArray[np.bool_], reach: int) -> NDArray[np.bool_]:
    """Where a pixel of `mask` is at most `reach` pixels away, along rows and columns."""
    padded = np.pad(mask, reach)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (2 * reach + 1,) * 2)
    return windows.any(axis=(2, 3))


@pytest.mark.parametrize("role", ROLES)
def test_a_picture_is_a_function_of_seed_and_index(role: str) -> None:
    picture = SOURCE.item(7).image(role)
    assert picture.tobytes() == Scenes(size=SIZE).item(7).image(role).tobytes()
    assert picture.tobytes() != SOURCE.item(8).image(role).tobytes()
    assert picture.tobytes() != Scenes(size=SIZE, seed=1).item(7).image(role).tobytes()


@pytest.mark.parametrize("role", ROLES)
def test_every_picture_is_rgb_of_the_size_asked_for(role: str) -> None:
    for size in (16, 48):
        picture = Scenes(size=size).item(0).image(role)
        assert (picture.mode, picture.size) == ("RGB", (size, size))


def test_the_order_in_which_pictures_are_asked_for_does_not_matter() -> None:
    item, other = SOURCE.item(3), SOURCE.item(3)
    forward = {role: item.image(role).tobytes() for role in ROLES}
    backward = {role: other.image(role).tobytes() for role in reversed(ROLES)}
    assert forward == backward


def test_an_item_has_all_roles_and_texts() -> None:
    item = SOURCE.item(0)
    assert set(item.images) == Scenes.roles
    assert set(item.texts) == {"caption", "instruction"}
    assert all(SOURCE.item(index).texts["instruction"] for index in SOME)


def test_a_source_is_as_long_as_asked_for() -> None:
    assert len(Scenes(size=SIZE, count=5)) == 5


def test_near_is_bright_in_depth() -> None:
    shown = render(ROOM, (thing(x=-0.9, z=-1.0), thing(x=0.9, z=1.0)), size=SIZE)
    depth = [shown.depth[shown.segment == k] for k in (0, 1)]
    assert depth[0].mean() > depth[1].mean()
    assert depth[0].min() > shown.depth[0].max()  # the first row is wall
    assert 0 < shown.depth.min() < shown.depth.max() < 1


def test_what_is_nearer_hides_what_is_farther() -> None:
    front, back = thing(z=-1.0, size=0.8), thing(z=1.0, size=0.5)
    for things, visible in (((front, back), 0), ((back, front), 1)):
        segment = render(ROOM, things, size=SIZE).segment
        assert (segment == visible).sum() > 0
        assert (segment == 1 - visible).sum() < (segment == visible).sum()


def normals(shape: str) -> Rendering:
    return render(ROOM, (thing(shape=shape),), size=64)


@pytest.mark.parametrize("shape", SHAPES)
def test_normals_are_unit_vectors(shape: str) -> None:
    assert np.linalg.norm(normals(shape).normal, axis=-1) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("shape", SHAPES)
def test_normals_point_to_the_viewer(shape: str) -> None:
    ticks = ((np.arange(64) + 0.5) / 64 * 2 - 1) * 0.42
    u, v = np.meshgrid(ticks, -ticks)
    towards = np.stack([-u, -v, np.ones_like(u)], axis=-1)
    facing = (normals(shape).normal * towards).sum(-1)
    assert facing.min() > -1e-3


def test_a_ball_seen_from_the_front_has_the_normals_of_a_ball() -> None:
    shown = normals("ball")
    inside = ~near(shown.segment != 0, 1)
    rows, columns = np.nonzero(inside)
    left, right = shown.normal[inside][columns.argmin()], shown.normal[inside][columns.argmax()]
    top = shown.normal[inside][rows.argmin()]
    assert left[0] < -0.5 < 0.5 < right[0]
    assert top[1] > 0.5


def test_a_hole_hides_its_subject_and_changes_nothing_outside_its_box() -> None:
    for index in SOME:
        item = SOURCE.item(index)
        subject = pixels(item, "mask")[..., 0] == 255
        hole, target = pixels(item, "hole"), pixels(item, "target")
        assert subject.any()
        assert (hole[subject] == 128).all()
        changed = (hole != target).any(-1)
        rows, columns = np.nonzero(changed)
        box = (slice(rows.min(), rows.max() + 1), slice(columns.min(), columns.max() + 1))
        assert (hole[box] == 128).all()
        rows, columns = np.nonzero(subject)
        reach = 0.1 * max(np.ptp(rows), np.ptp(columns)) + 2
        rows, columns = ((values.min() - reach, values.max() + reach) for values in (rows, columns))
        assert all(
            rows[0] <= y <= rows[1] and columns[0] <= x <= columns[1]
            for y, x in np.argwhere(changed)
        )


def test_a_mask_is_black_and_white_and_shows_the_subject_alone() -> None:
    for index in SOME:
        scene, item = scene_of(index), SOURCE.item(index)
        mask = pixels(item, "mask")
        assert set(np.unique(mask)) <= {0, 255}
        colour = SEGMENT_COLOURS[scene.things[scene.subject].shape]
        assert (pixels(item, "segmentation")[mask[..., 0] == 255] == colour).all()


def test_a_segmentation_has_only_the_colours_of_its_classes() -> None:
    for index in SOME:
        shapes = {thing.shape for thing in scene_of(index).things}
        colours = pixels(SOURCE.item(index), "segmentation").reshape(-1, 3)
        seen = {tuple(colour) for colour in colours}
        assert seen <= {SEGMENT_COLOURS[name] for name in (*shapes, "floor", "wall")}
        assert seen >= {SEGMENT_COLOURS["floor"], SEGMENT_COLOURS["wall"]}


def test_classes_are_what_the_segmentation_shows_in_the_colours_of_the_caption() -> None:
    table = np.array([SEGMENT_COLOURS[noun] for noun in NOUNS])
    for index in SOME:
        classes = SOURCE.classes(index, "target")
        np.testing.assert_array_equal(
            table[classes[..., 0]], pixels(SOURCE.item(index), "segmentation")
        )
        words = caption(scene_of(index))
        assert all(list(COLOURS)[colour] in words for colour in np.unique(classes[..., 1]))


def test_classes_of_a_reference_are_its_own() -> None:
    for index in SOME:
        scene = scene_of(index)
        things = SOURCE.classes(index, "reference")
        things = things[things[..., 0] < NOUNS.index("floor")]
        assert {NOUNS[k] for k in things[:, 0]} <= {scene.things[scene.subject].shape}


def test_foreground_and_background_make_up_the_target() -> None:
    for index in SOME:
        item = SOURCE.item(index)
        parts = np.stack([pixels(item, "foreground"), pixels(item, "background")])
        assert np.array_equal(parts.min(axis=0), pixels(item, "target"))
        assert (parts.max(axis=0) == 255).all()


def test_a_caption_names_the_things_from_left_to_right_and_the_room() -> None:
    for index in range(300):
        scene = scene_of(index)
        *others, last, wall = SOURCE.item(index).texts["caption"].split(", ")
        last, floor = last.split(" on ")
        assert [words.split()[1:] for words in (*others, last)] == [
            [word for word in (one.colour, one.texture, one.shape) if word != "plain"]
            for one in sorted(scene.things, key=lambda one: one.x)
        ]
        textured = [scene.room.floor, scene.room.floor_texture, "floor"]
        assert floor.split()[1:] == [word for word in textured if word != "plain"]
        assert wall == f"{scene.room.wall} wall"
        assert all(("an" if w.split()[1][0] in "aeiou" else "a") == w.split()[0] for w in others)


def test_all_that_is_named_can_be_seen() -> None:
    for index in range(150):
        scene = scene_of(index)
        segment = render(scene.room, scene.things, size=SIZE).segment
        assert set(range(len(scene.things))) <= set(np.unique(segment)), caption(scene)


def test_an_edit_says_what_differs() -> None:
    for index in range(300):
        scene = scene_of(index)
        verb, *_ = scene.instruction.split()
        gone = [one for one in scene.earlier if one not in scene.things]
        new = [one for one in scene.things if one not in scene.earlier]
        assert (len(gone), len(new)) == {"add": (0, 1), "remove": (1, 0)}.get(verb, (1, 1))
        if verb == "turn":
            assert new[0].colour == scene.instruction.split()[-1]
            assert gone[0].colour in scene.instruction.split()
        for one in (gone or new)[:1]:
            assert one.colour in scene.instruction
            assert one.shape in scene.instruction


def test_an_edit_changes_its_thing_and_what_lies_in_its_shadow() -> None:
    removals = 0
    for index in range(60):
        scene, item = scene_of(index), SOURCE.item(index)
        before, target = pixels(item, "before"), pixels(item, "target")
        changed = (before != target).any(-1)
        assert changed.any(), scene.instruction
        if scene.instruction.startswith("remove"):
            removals += 1
            segment = render(scene.room, scene.earlier, size=SIZE).segment
            thing = near(segment == len(scene.things), 1)
            others = ~near((segment < 0) | (segment == len(scene.things)), 1)
            assert (changed & thing).any()
            assert not (changed & others).any()
    assert removals > 2


def test_a_view_shows_the_subject_alone_and_turned_by_45_degrees() -> None:
    round_things = turned = 0
    for index in range(60):
        subject = scene_of(index).things[scene_of(index).subject]
        item = SOURCE.item(index)
        view, other = pixels(item, "view"), pixels(item, "view_turned")
        assert (view[0] == view[0, 0]).all()
        if subject.shape == "cube":
            turned += 1
            assert not np.array_equal(view, other)
        elif subject.texture == "plain":
            round_things += 1
            assert np.abs(view.astype(int) - other).max() <= 1
    assert min(round_things, turned) > 5


def test_depth_of_the_room_does_not_depend_on_its_paint() -> None:
    repainted = render(ROOM, (thing(),), size=SIZE)
    for colour in COLOURS:
        for texture in TEXTURES:
            shown = render(ROOM, (thing(colour=colour, texture=texture),), size=SIZE)
            assert np.array_equal(shown.depth, repainted.depth)
            assert np.array_equal(shown.segment, repainted.segment)
    assert (repainted.segment == FLOOR).any()


def test_depth_is_grey() -> None:
    depth = SOURCE.item(0).image("depth")
    assert Image.merge("RGB", [depth.getchannel("R")] * 3).tobytes() == depth.tobytes()
