"""The mixture draws what the recipe says, and example i is a function of (seed, i) alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from visualcloze_deft.config.run_settings import Recipe
from visualcloze_deft.data.base import Item, Part
from visualcloze_deft.data.example import Example
from visualcloze_deft.data.mixture import Mixture, row_of
from visualcloze_deft.data.queries import one_of_each, queries
from visualcloze_deft.errors import UserError
from visualcloze_deft.task_registry.task import Task

DRAWS = 600
SLACK = 0.08  # four standard deviations of a frequency over so many draws


def task(name: str = "mix", roles: str = "a b target", **changes: Any) -> Task:
    columns = {role: (f"the {role}", f"a {role}") for role in roles.split()}
    fields: dict[str, Any] = {
        "group": "g",
        "summary": "",
        "targets": (roles.split()[-1],),
        "instructions": (" to ".join(f"{{{role}}}" for role in columns),),
        "content": "caption",
        "path": Path(),
    }
    return Task(name=name, columns=columns, **fields | changes)


class Flat:
    """A source of `count` items whose pictures are flat: red tells the item, green the role.

    poor: items that have no picture but `target`.
    """

    def __init__(
        self, count: int = 50, *, roles: str = "a b target", name: str = "flat", poor: int = 0
    ) -> None:
        self.name = name
        self.count = count
        self.roles = frozenset(roles.split())
        self.poor = poor

    def __len__(self) -> int:
        return self.count

    @property
    def kinds(self) -> dict[frozenset[str], range]:
        poor = {frozenset({"target"}): range(self.poor)} if self.poor else {}
        return {**poor, self.roles: range(self.poor, self.count)}

    def item(self, index: int) -> Item:
        roles = ["target"] if index < self.poor else sorted(self.roles)
        images = {
            role: partial(Image.new, "RGB", (16, 16), (index, len(role), ord(role[0])))
            for role in roles
        }
        texts = {"caption": f"caption {index}", "instruction": f"instruction {index}"}
        return Item(key=f"{self.name} {index}", images=images, texts=texts)


def mixture(
    *tasks: Task, sources: tuple[Flat, ...] = (Flat(),), seed: int = 0, **recipe: Any
) -> Mixture:
    tasks = tasks or (task(),)
    named = {one.name: one for one in tasks}
    plain = {"run_length": 1, "paraphrase": 0.0}
    return Mixture(named, sources, seed=seed, resolution=16, recipe=Recipe(**plain | recipe))


def drawn(*tasks: Task, count: int = DRAWS, **settings: Any) -> list[Example]:
    mixed = mixture(*tasks, **settings)
    return [mixed[index] for index in range(count)]


def content_of(example: Example) -> Mapping[str, object]:
    pictures = [image.tobytes() for row in example.rows for image in row]
    return {**vars(example), "rows": pictures}


def share(examples: list[Example], holds: Any) -> float:
    return sum(bool(holds(example)) for example in examples) / len(examples)


def about(value: float) -> Any:
    return pytest.approx(value, abs=SLACK)


def test_an_example_is_a_function_of_seed_and_index_in_whatever_order_it_is_asked() -> None:
    tasks = task(), task("other", "b target")
    forward, backward = mixture(*tasks), mixture(*tasks)
    first = [content_of(forward[index]) for index in range(30)]
    last = [content_of(backward[index]) for index in reversed(range(30))]
    assert first == last[::-1]
    assert content_of(forward[5]) == content_of(forward[5])


def test_another_seed_draws_another_sequence() -> None:
    keys = [[mixture(seed=seed)[index].keys for index in range(20)] for seed in (0, 1)]
    assert keys[0] != keys[1]


def test_rows_are_as_frequent_as_the_recipe_says() -> None:
    rows = Counter(len(example.rows) for example in drawn())
    assert set(rows) == {1, 2, 3}
    for count, frequency in ((1, 0.3), (2, 0.4), (3, 0.3)):
        assert rows[count] / DRAWS == about(frequency)


def test_consecutive_examples_of_one_run_have_one_number_of_rows() -> None:
    rows = [len(example.rows) for example in drawn(run_length=4, count=400)]
    runs = [rows[k : k + 4] for k in range(0, 400, 4)]
    assert all(len(set(run)) == 1 for run in runs)
    assert set(rows) == {1, 2, 3}


def test_a_row_is_one_item_and_no_item_comes_twice_in_a_grid() -> None:
    for example in drawn(sources=(Flat(4),)):
        assert len(set(example.keys)) == len(example.keys) == len(example.rows)
        for key, row in zip(example.keys, example.rows, strict=True):
            assert {f"flat {image.getpixel((0, 0))[0]}" for image in row} == {key}


def test_a_source_with_fewer_items_than_rows_gives_all_it_has() -> None:
    assert max(len(example.rows) for example in drawn(sources=(Flat(2),), count=50)) == 2


def test_targets_are_hidden_half_of_the_time_and_else_one_column_at_random() -> None:
    two = task("two", "a b c target", targets=("c", "target"))
    examples = drawn(two, sources=(Flat(roles="a b c target"),))
    hidden = Counter(example.hidden for example in examples)
    assert hidden.pop((False, False, True, True)) / DRAWS == about(0.5)
    assert len(hidden) == 4
    for columns, count in hidden.items():
        assert sum(columns) == 1
        assert count / DRAWS == about(0.125)


def test_with_certainty_only_the_targets_are_hidden() -> None:
    assert {example.hidden for example in drawn(hide_target=1.0, count=50)} == {
        (False, False, True)
    }


def test_every_example_hides_something_and_shows_something() -> None:
    assert all(any(e.hidden) and not all(e.hidden) for e in drawn(task(roles="a target")))


def roles_of(example: Example) -> tuple[str, ...]:
    greens = {len(role): role for role in ("a", "bb", "target")}
    return tuple(greens[image.getpixel((0, 0))[1]] for image in example.rows[-1])


def test_conditions_are_shuffled_and_targets_stay_last() -> None:
    orders = Counter(
        map(roles_of, drawn(task(roles="a bb target"), sources=(Flat(roles="a bb target"),)))
    )
    assert set(orders) == {("a", "bb", "target"), ("bb", "a", "target")}
    assert orders["a", "bb", "target"] / DRAWS == about(0.5)


def test_columns_keep_the_order_of_the_task_where_the_recipe_says_so() -> None:
    source = Flat(roles="a bb target")
    examples = drawn(task(roles="a bb target"), sources=(source,), shuffle_columns=False, count=50)
    assert {roles_of(example) for example in examples} == {("a", "bb", "target")}


def test_the_sentence_follows_the_columns() -> None:
    source = Flat(roles="a bb target")
    for example in drawn(task(roles="a bb target"), sources=(source,), count=100):
        if example.task_sentence:
            for place, role in enumerate(roles_of(example), 1):
                assert f"the {role} [IMAGE{place}]" in example.task_sentence


def test_the_words_are_those_of_the_query() -> None:
    for example in drawn(count=100):
        number = example.keys[-1].split()[-1]
        assert example.content in ("", f"caption {number}")
    for example in drawn(task(content="instruction"), count=100):
        assert example.content in ("", f"instruction {example.keys[-1].split()[-1]}")
    assert {example.content for example in drawn(task(content=""), count=20)} == {""}


def test_text_is_left_out_as_often_as_the_recipe_says() -> None:
    examples = drawn()
    assert share(examples, lambda e: e.task_sentence) == about(0.9 * 0.8)
    assert share(examples, lambda e: e.content) == about(0.9 * 0.8)
    assert share(examples, lambda e: e.task_sentence and e.content) == about(0.9 * 0.64)
    assert share(examples, lambda e: not e.task_sentence and not e.content) == about(0.136)


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ({"caption_dropout": 1.0}, (False, False)),
        ({"caption_dropout": 0.0, "keep_task": 1.0, "keep_content": 0.0}, (True, False)),
        ({"caption_dropout": 0.0, "keep_task": 0.0, "keep_content": 1.0}, (False, True)),
    ],
    ids=["silent", "task", "content"],
)
def test_words_can_be_switched_on_and_off(
    recipe: dict[str, float], said: tuple[bool, bool]
) -> None:
    assert {(bool(e.task_sentence), bool(e.content)) for e in drawn(count=30, **recipe)} == {said}


def test_the_prompt_starts_with_the_layout() -> None:
    for example in drawn(count=20):
        rows, columns = len(example.rows), len(example.rows[0])
        said = str(example.prompt)
        assert said.startswith(f"A grid layout with {rows} rows and {columns} columns")
        assert example.task_sentence in said
        assert example.content in said


def test_tasks_are_drawn_alike_or_by_their_weights() -> None:
    tasks = {name: task(name) for name in ("x", "y", "z")}
    alike = Mixture(tasks, [Flat()], seed=0, resolution=16)
    weighted = Mixture(tasks, [Flat()], seed=0, resolution=16, weights={"x": 2, "y": 0})
    assert alike.proportions.tolist() == pytest.approx([1 / 3] * 3)
    assert weighted.proportions.tolist() == pytest.approx([2 / 3, 0, 1 / 3])
    counts = Counter(weighted[index].task for index in range(DRAWS))
    assert counts["x"] / DRAWS == about(2 / 3)
    assert counts["y"] == 0


def test_weights_that_leave_no_task_are_refused() -> None:
    with pytest.raises(UserError, match="weights"):
        Mixture({"x": task("x")}, [Flat()], seed=0, resolution=16, weights={"x": 0})


def test_all_sources_that_serve_a_task_are_drawn_from() -> None:
    sources = Flat(name="one"), Flat(name="two"), Flat(roles="target", name="poor")
    counts = Counter(e.keys[0].split()[0] for e in drawn(sources=sources))
    assert set(counts) == {"one", "two"}
    assert counts["one"] / DRAWS == about(0.5)


def test_an_item_without_the_roles_is_passed_over() -> None:
    for example in drawn(sources=(Flat(6, poor=4),), count=100):
        assert set(example.keys) <= {"flat 4", "flat 5"}


def test_a_source_whose_items_all_lack_a_role_is_named_before_anything_is_drawn() -> None:
    with pytest.raises(UserError, match=r"task mix: .*no item of flat has them all"):
        mixture(sources=(Flat(5, poor=5),))


def test_items_are_drawn_alike_whatever_roles_they_have_beside_those_needed() -> None:
    """Three items with all roles, six with target alone: a task that needs target alone."""
    examples = drawn(task(roles="gray target"), sources=(Flat(9, poor=6),), examples=(1,))
    counts = Counter(example.keys[0] for example in examples)
    assert set(counts) == {f"flat {k}" for k in range(9)}
    assert all(count / DRAWS == about(1 / 9) for count in counts.values())


@pytest.mark.parametrize("held_out", [True, False])
def test_a_part_knows_the_kinds_of_its_own_items(held_out: bool) -> None:
    part = Part(Flat(23, poor=9), every=4, held_out=held_out)
    found = {k: roles for roles, indices in part.kinds.items() for k in indices}
    assert found == {k: frozenset(part.item(k).images) for k in range(len(part))}


def test_roles_that_follow_from_the_target_need_no_source() -> None:
    example = drawn(task(roles="gray target"), sources=(Flat(roles="target"),), count=1)[0]
    gray, target = (example.rows[0][k].getpixel((0, 0)) for k in (0, 1))
    assert len(set(gray)) == 1 != len(set(target))


def test_what_is_derived_is_the_same_for_the_same_example_and_differs_from_row_to_row() -> None:
    noisy = task(roles="gaussian_noise target")
    settings: dict[str, Any] = {"sources": (Flat(roles="target"),), "examples": (0, 0, 1)}
    first, again = drawn(noisy, count=2, **settings), drawn(noisy, count=2, **settings)
    assert [content_of(one) for one in first] == [content_of(one) for one in again]
    noises = [np.array(row[0], int) - np.array(row[1], int) for one in first for row in one.rows]
    assert all((a != b).mean() > 0.5 for k, a in enumerate(noises) for b in noises[:k])


def test_foreground_and_background_follow_from_target_and_mask() -> None:
    halves = {"target": Image.new("RGB", (16, 16), "red"), "mask": Image.new("RGB", (16, 16))}
    halves["mask"].paste("white", (0, 0, 8, 16))

    class Masked(Flat):
        def item(self, index: int) -> Item:
            return Item(key="one", images={role: image.copy for role, image in halves.items()})

    source = Masked(1, roles="target mask")
    row = drawn(task(roles="foreground background target"), sources=(source,), count=1)[0].rows[0]
    by_role = dict(zip(("foreground", "background"), row, strict=False))
    red, white = (255, 0, 0), (255, 255, 255)
    left, right = (2, 8), (13, 8)
    found = {tuple(image.getpixel(p) for p in (left, right)) for image in by_role.values()}
    assert found == {(red, white), (white, red)}


def test_a_mask_may_be_smaller_than_its_picture_but_not_cut_otherwise() -> None:
    def cut_out_with(mask: tuple[int, int]) -> None:
        sizes = {"target": (64, 48), "mask": mask}
        images = {role: partial(Image.new, "RGB", size) for role, size in sizes.items()}
        row_of(Item(key="one", images=images), ["foreground"], 16, "row", np.random.default_rng(0))

    for mask in ((64, 48), (32, 24), (21, 16)):
        cut_out_with(mask)
    with pytest.raises(UserError, match="one: mask has 48 x 48 pixels, but target has 64 x 48"):
        cut_out_with((48, 48))


def test_a_task_without_source_is_named_with_what_is_lacking() -> None:
    sources = Flat(name="one"), Flat(roles="a", name="two")
    with pytest.raises(UserError, match=r"task deep: .*one lacks depth; two lacks depth, target"):
        mixture(task("deep", "depth target"), sources=sources)


def test_derived_roles_need_the_target() -> None:
    with pytest.raises(UserError, match=r"task gray: .*flat lacks gray"):
        mixture(task("gray", "gray b"), sources=(Flat(roles="b"),))


@pytest.mark.parametrize("count", [10, 11, 12, 13])
def test_training_and_held_out_items_part_a_source(count: int) -> None:
    source = Flat(count)
    parts = [Part(source, every=4, held_out=held_out) for held_out in (False, True)]
    trained, held_out = ([part.item(k).key for k in range(len(part))] for part in parts)
    assert sorted([*trained, *held_out]) == sorted(source.item(k).key for k in range(count))
    assert held_out == [source.item(k).key for k in range(3, count, 4)]


def test_a_preview_shows_one_grid_of_each_task_or_group() -> None:
    tasks = [task("x"), task("y", group="h"), task("z")]
    mixed = mixture(*tasks)
    assert [example.task for example in one_of_each(mixed, "task")] == ["x", "y", "z"]
    found = one_of_each(mixed, "group")
    assert [example.task for example in found] == ["x", "y"]
    assert all(example.hidden == (False, False, True) for example in found)


# Unreadable items: those whose index is in `broken`.


class Broken(Flat):
    """A source of which some items cannot be read, their pictures or their texts."""

    def __init__(self, broken: set[int], *, whole: bool = False, **fields: Any) -> None:
        super().__init__(**fields)
        self.broken = broken
        self.whole = whole

    def item(self, index: int) -> Item:
        item = super().item(index)
        if index not in self.broken:
            return item
        if self.whole:
            raise UserError(f"item {index}: no text")

        def unreadable() -> Image.Image:
            raise UserError(f"{index}.png: cut short")

        return replace(item, images={**item.images, "b": unreadable})


@pytest.mark.parametrize("whole", [False, True])
def test_an_unreadable_item_is_replaced_and_told_and_nothing_else_changes(whole: bool) -> None:
    sound = drawn(sources=(Flat(9),), count=80)
    found = drawn(sources=(Broken({3, 5}, whole=whole, count=9),), count=80)
    assert any(example.skipped for example in found)
    for before, after in zip(sound, found, strict=True):
        lost = [key for key in before.keys if key in ("flat 3", "flat 5")]
        assert len(after.keys) == len(set(after.keys)) == len(before.keys)
        assert not {"flat 3", "flat 5"} & {*after.keys}
        assert {one.why for one in after.skipped} >= {
            f"item {key[-1]}: no text" if whole else f"{key[-1]}.png: cut short" for key in lost
        }
        if not after.skipped:
            assert content_of(after) == content_of(before)
        kept = [k for k, key in enumerate(before.keys) if key not in lost]
        assert [after.keys[k] for k in kept] == [before.keys[k] for k in kept]
    again = drawn(sources=(Broken({3, 5}, whole=whole, count=9),), count=80)
    assert [*map(content_of, again)] == [*map(content_of, found)]


def test_a_source_of_unreadable_items_alone_is_named_and_does_not_spin() -> None:
    for count in (2, 500):
        broken = Broken(set(range(count)), count=count)
        with pytest.raises(UserError, match="items in turn cannot be read, the last"):
            drawn(sources=(broken,), count=1)


def test_sheets_take_the_first_source_that_has_items_and_the_heaviest_tasks() -> None:
    full, poor = Flat(8, name="full"), Flat(8, name="poor", poor=8)
    tasks = {name: task(name) for name in ("x", "y", "z")}
    weights = {"x": 1, "y": 3, "z": 2}
    mixed = Mixture(tasks, [poor, full], seed=0, resolution=16, weights=weights)
    found = queries(mixed, count=2, tasks=2)
    assert [example.task for example in found] == ["y", "y", "z", "z"]
    assert all(key.startswith("full") for example in found for key in example.keys)
