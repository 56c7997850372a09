"""Metrics agree with other libraries and plain loops, and behave as a measure must."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from itertools import product

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from scipy.linalg import sqrtm
from scipy.ndimage import distance_transform_cdt
from skimage.metrics import (
    mean_squared_error,
    peak_signal_noise_ratio,
    structural_similarity,
)

from visualcloze_deft.data.derive import canny
from visualcloze_deft.data.sources.scenes import SEGMENT_COLOURS, Scenes
from visualcloze_deft.errors import UserError
from visualcloze_deft.evaluation.metrics import fidelity, placement, similarity
from visualcloze_deft.reporting.statistics import difference, mean_ci, sign_flip_p

SCENES = Scenes(size=64, seed=5)
Floats = NDArray[np.float64]


def scene(index: int = 0, role: str = "target") -> Image.Image:
    return SCENES.item(index).image(role)


def pixels(index: int = 0, role: str = "target") -> NDArray[np.uint8]:
    return np.array(scene(index, role))


def noisy(image: NDArray[np.uint8], deviation: float, seed: int = 0) -> NDArray[np.uint8]:
    noise = np.random.default_rng(seed).normal(0, deviation, image.shape)
    return np.clip(image + noise, 0, 255).round().astype(np.uint8)


def rows(count: int, dimensions: int, seed: int, shift: float = 0.0) -> Floats:
    rng = np.random.default_rng(seed)
    mix = np.random.default_rng(99).normal(size=(dimensions, dimensions))
    return rng.normal(size=(count, dimensions)) @ mix + shift


# ---- pixels


@pytest.mark.parametrize("deviation", [2, 20, 90])
def test_psnr_and_ssim_are_those_of_scikit_image(deviation: float) -> None:
    one, other = pixels(), noisy(pixels(), deviation)
    assert fidelity.psnr(one, other) == pytest.approx(peak_signal_noise_ratio(one, other), abs=1e-9)
    expected = structural_similarity(
        one, other, channel_axis=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
    )
    assert fidelity.ssim(one, other) == pytest.approx(expected, abs=1e-9)
    assert fidelity.mean_error(one, other) == pytest.approx(
        np.abs(one.astype(int) - other.astype(int)).mean(), abs=1e-9
    )


def test_equal_pictures_are_equal_in_every_measure() -> None:
    one = pixels()
    assert fidelity.psnr(one, one) == pytest.approx(68.13, abs=0.01)
    assert fidelity.ssim(one, one) == pytest.approx(1)
    assert fidelity.mean_error(one, one) == 0
    assert (
        fidelity.edge_f1(canny(Image.fromarray(np.asarray(one))), scene(role="canny"), tolerance=0)
        == 1
    )
    assert fidelity.depth_rmse(scene(role="depth"), scene(role="depth")) == 0
    assert fidelity.normals_angle(scene(role="normal"), scene(role="normal")) < 1e-5
    assert fidelity.segmentation_miou(scene(role="segmentation"), scene(role="segmentation")) == 1


@pytest.mark.parametrize(
    "measure",
    [
        fidelity.psnr,
        fidelity.ssim,
        fidelity.mean_error,
        fidelity.depth_rmse,
        fidelity.normals_angle,
        lambda one, other: fidelity.edge_f1(canny(one), canny(other), tolerance=1),
        lambda one, other: fidelity.segmentation_miou(
            one, other, colours=list(SEGMENT_COLOURS.values())
        ),
    ],
)
def test_it_does_not_matter_which_picture_comes_first(measure: Callable[..., float]) -> None:
    one, other = scene(0), scene(1)
    assert measure(one, other) == pytest.approx(measure(other, one), rel=1e-9)


def test_more_noise_and_more_blur_are_worse() -> None:
    one = pixels()
    noise = [noisy(one, deviation) for deviation in (1, 4, 16, 64)]
    blur = [np.array(scene().filter(ImageFilter.GaussianBlur(r))) for r in (0.5, 1, 2, 4)]
    for series in (noise, blur):
        for better in (fidelity.psnr, fidelity.ssim):
            found = [better(x, one) for x in series]
            assert found == sorted(found, reverse=True)
        errors = [fidelity.mean_error(x, one) for x in series]
        assert errors == sorted(errors)
    edges = [
        fidelity.edge_f1(canny(Image.fromarray(np.asarray(x))), scene(role="canny"), tolerance=1)
        for x in noise
    ]
    assert edges == sorted(edges, reverse=True)
    assert edges[-1] < 0.7 < edges[0]


def test_bytes_do_not_wrap() -> None:
    dark = np.full((16, 16), 100, np.uint8)
    assert fidelity.depth_rmse(dark, dark + np.uint8(16)) == 16
    assert fidelity.depth_rmse(dark + np.uint8(16), dark) == 16
    assert fidelity.psnr(dark, dark + np.uint8(16)) == pytest.approx(20 * math.log10(255 / 16))


def test_depth_rmse_is_the_root_of_scikit_images_mean_squared_error() -> None:
    one, other = (pixels(k, "depth")[..., 0] for k in (0, 1))
    expected = math.sqrt(mean_squared_error(one.astype(float), other.astype(float)))
    assert fidelity.depth_rmse(one, other) == pytest.approx(expected)


def test_what_lies_in_the_hole_does_not_count() -> None:
    truth, mask = pixels(), pixels(role="mask")
    made = truth.copy()
    hole = mask[..., 0] > 127
    made[hole] = 255 - made[hole]
    known = ~hole
    assert fidelity.mean_error(made, truth) > 1
    assert fidelity.mean_error(made, truth, where=known) == 0
    assert fidelity.psnr(made, truth, where=known) == fidelity.psnr(truth, truth)
    made[0, 0] ^= 255
    assert fidelity.mean_error(made, truth, where=known) > 0


# ---- conditions


@pytest.mark.parametrize("tolerance", [0, 1, 3])
def test_edges_are_near_as_a_distance_transform_says(tolerance: int) -> None:
    one, other = (pixels(k, "canny")[..., 0] > 127 for k in (0, 1))
    near = [distance_transform_cdt(~x, metric="chessboard") <= tolerance for x in (one, other)]
    precision, recall = near[1][one].mean(), near[0][other].mean()
    found = fidelity.edge_f1(pixels(0, "canny"), pixels(1, "canny"), tolerance=tolerance)
    assert found == pytest.approx(2 * precision * recall / (precision + recall))


def test_a_shift_within_the_tolerance_costs_nothing() -> None:
    edges = np.zeros((40, 40), np.uint8)
    cv2.circle(edges, (20, 20), 12, 255)
    moved = np.roll(edges, 2, axis=1)
    assert fidelity.edge_f1(moved, edges, tolerance=2) == 1
    assert fidelity.edge_f1(moved, edges, tolerance=1) < 0.8
    assert fidelity.edge_f1(moved, edges, tolerance=0) < 0.4


def test_without_edges_only_a_map_without_edges_agrees() -> None:
    nothing = np.zeros((16, 16), np.uint8)
    assert fidelity.edge_f1(nothing, nothing, tolerance=0) == 1
    assert fidelity.edge_f1(nothing, nothing + np.uint8(255), tolerance=0) == 0


@pytest.mark.parametrize("degrees", [0, 10, 90, 180])
def test_turned_normals_are_that_far_apart(degrees: float) -> None:
    angles = np.random.default_rng(0).uniform(0, 2 * math.pi, (32, 32))

    def coded(turn: float) -> NDArray[np.uint8]:
        x, z = np.sin(angles + math.radians(turn)), np.cos(angles + math.radians(turn))
        vectors = np.stack([x, np.zeros_like(x), z], axis=-1)
        return (vectors * 127.5 + 127.5).round().astype(np.uint8)

    assert fidelity.normals_angle(coded(degrees), coded(0)) == pytest.approx(degrees, abs=0.6)


def test_normals_do_not_hang_on_their_length() -> None:
    vectors = pixels(role="normal") / 127.5 - 1
    shorter = ((vectors * 0.7 + 1) * 127.5).round().astype(np.uint8)
    assert fidelity.normals_angle(shorter, scene(role="normal")) < 0.6


def test_a_pixel_without_direction_is_a_right_angle_away() -> None:
    grey = np.full((64, 64, 3), 128, np.uint8)
    assert fidelity.normals_angle(grey, scene(role="normal")) == pytest.approx(90)
    half = np.concatenate([grey[:, :32], pixels(role="normal")[:, 32:]], axis=1)
    assert fidelity.normals_angle(half, scene(role="normal")) == pytest.approx(45)


def test_miou_counts_as_a_confusion_matrix_does() -> None:
    colours = list(SEGMENT_COLOURS.values())
    one, other = pixels(0, "segmentation"), pixels(1, "segmentation")
    confusion = np.zeros((len(colours), len(colours)))
    for a, b in zip(one.reshape(-1, 3), other.reshape(-1, 3), strict=True):
        confusion[colours.index(tuple(a)), colours.index(tuple(b))] += 1
    shared = np.diag(confusion)
    union = confusion.sum(axis=0) + confusion.sum(axis=1) - shared
    expected = (shared[union > 0] / union[union > 0]).mean()
    assert fidelity.segmentation_miou(one, other, colours=colours) == pytest.approx(expected)


def test_a_class_is_the_nearest_colour() -> None:
    truth = scene(role="segmentation")
    assert fidelity.segmentation_miou(noisy(np.array(truth), 8), truth) > 0.99


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: fidelity.psnr(scene(), scene().resize((32, 64))), "64 x 64 and 32 x 64"),
        (lambda: fidelity.psnr(pixels() / 255, pixels()), "unsigned bytes"),  # type: ignore[arg-type]
        (lambda: fidelity.ssim(scene().resize((8, 64)), scene().resize((8, 64))), "8 x 64"),
        (lambda: fidelity.lpips(scene().resize((31, 64)), scene().resize((31, 64))), "31 x 64"),
        (lambda: fidelity.segmentation_miou(scene(), noisy(pixels(), 30)), "flat colours"),
        (lambda: fidelity.psnr(scene(), scene(), where=np.zeros((64, 64), bool)), "no pixel"),
        (lambda: fidelity.psnr(scene(), scene(), where=np.ones((2, 2), bool)), "2 x 2"),
        (lambda: similarity.within(rows(1, 4, 0)), "one image"),
        (lambda: similarity.aligned(rows(2, 4, 0), rows(3, 4, 0)), "in pairs"),
        (lambda: similarity.fid(rows(9, 4, 0), rows(9, 5, 0)), "two encoders"),
        (lambda: similarity.fid(rows(1, 4, 0), rows(9, 4, 0)), "1 and 9 images"),
        (lambda: similarity.kid(rows(3, 4, 0), rows(9, 4, 0)), "KID of 3"),
        (lambda: placement.crop(scene(), (70, 0, 90, 9)), "70, 0, 90, 9"),
        (lambda: placement.box_of(Image.new("L", (4, 4))), "without white"),
        (lambda: mean_ci([]), "no values"),
        (lambda: mean_ci([1.0, math.nan]), "value 1 of 2"),
        (lambda: difference([1.0], [1.0, 2.0]), "1 values against 2"),
        (lambda: mean_ci([1.0], ["a", "b"]), "groups for 2"),
    ],
)
def test_what_cannot_be_compared_is_said(call: Callable[[], object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        call()


@pytest.mark.skipif(importlib.util.find_spec("lpips") is not None, reason="lpips is installed")
def test_lpips_says_what_it_lacks() -> None:
    with pytest.raises(UserError, match=r"pip install 'visualcloze-deft\[lpips\]'"):
        fidelity.lpips(scene(0), scene(1))


# ---- features


def test_the_mean_pairwise_cosine_is_that_of_all_pairs() -> None:
    one, other = rows(5, 8, 0), rows(7, 8, 1)

    def cosine(a: Floats, b: Floats) -> float:
        return float(a @ b / math.sqrt((a @ a) * (b @ b)))

    pairs = [cosine(a, b) for a, b in product(one, other)]
    assert similarity.to_references(one, other).mean() == pytest.approx(np.mean(pairs))
    others = [cosine(one[i], one[j]) for i, j in product(range(5), range(5)) if i != j]
    assert similarity.within(one).mean() == pytest.approx(np.mean(others))
    matched = [cosine(a, b) for a, b in zip(one, other[:5], strict=True)]
    assert similarity.aligned(one, other[:5]) == pytest.approx(matched)


def test_an_image_is_not_compared_with_itself() -> None:
    axes = np.eye(4)
    assert similarity.within(axes) == pytest.approx([0, 0, 0, 0])
    assert similarity.to_references(axes, axes) == pytest.approx([0.25] * 4)


def test_cosines_do_not_hang_on_length_nor_on_order() -> None:
    one, other = rows(6, 8, 0), rows(6, 8, 1)
    order = np.random.default_rng(0).permutation(6)
    found = similarity.to_references(one, other)
    assert similarity.to_references(one[order] * 7, other[order] * 0.1) == pytest.approx(
        found[order]
    )


@pytest.mark.parametrize("counts", [(400, 300), (12, 9), (400, 9)])
def test_fid_is_the_formula_with_scipys_matrix_root(counts: tuple[int, int]) -> None:
    one, other = rows(counts[0], 16, 0), rows(counts[1], 16, 1, shift=0.5)
    s1, s2 = (np.cov(x, rowvar=False) for x in (one, other))
    shift = one.mean(axis=0) - other.mean(axis=0)
    root = sqrtm(s1 @ s2)
    expected = shift @ shift + np.trace(s1 + s2 - 2 * np.real(root))
    assert similarity.fid(one, other).value == pytest.approx(expected, rel=1e-3)


def test_fid_of_a_moved_set_is_the_way_squared() -> None:
    one = rows(200, 16, 0)
    assert similarity.fid(one, one).value == pytest.approx(0, abs=1e-9)
    assert similarity.fid(one, one + 0.5).value == pytest.approx(16 * 0.25)
    other = rows(150, 16, 1)
    assert similarity.fid(one, other).value == pytest.approx(similarity.fid(other, one).value)


def test_kid_is_the_plain_sum_over_pairs() -> None:
    one, other = rows(12, 6, 0), rows(10, 6, 1, shift=1)

    def kernel(a: Floats, b: Floats) -> float:
        return float((a @ b / 6 + 1) ** 3)

    rng = np.random.default_rng(3)
    values = []
    for _ in range(similarity.SUBSETS):
        a = one[rng.choice(12, 5, replace=False)]
        b = other[rng.choice(10, 5, replace=False)]
        inner = sum(
            kernel(x[i], x[j]) for x in (a, b) for i in range(5) for j in range(5) if i != j
        )
        outer = sum(kernel(x, y) for x in a for y in b)
        values.append(inner / 20 - 2 * outer / 25)
    found = similarity.kid(one, other, seed=3)
    assert found.value == pytest.approx(np.mean(values))
    assert found.deviation == pytest.approx(np.std(values))


def test_distances_grow_with_the_noise_and_know_equal_sets() -> None:
    truth, again = rows(300, 16, 0), rows(300, 16, 1)
    series = [truth + rows(300, 16, 2) * scale for scale in (0.0, 0.5, 1.0, 2.0)]
    for distance in (similarity.fid, similarity.kid):
        found = [distance(x, again).value for x in series]
        assert found == sorted(found)
        assert abs(found[0]) < 0.02 * found[-1]


def test_too_few_images_are_said_to_be_too_few() -> None:
    assert "means nothing" in similarity.fid(rows(16, 16, 0), rows(90, 16, 1)).warning
    assert "biased" in similarity.fid(rows(17, 16, 0), rows(90, 16, 1)).warning
    assert similarity.fid(rows(10_000, 4, 0), rows(10_000, 4, 1)).warning == ""
    few = similarity.kid(rows(20, 4, 0), rows(30, 4, 1))
    assert (few.count, "subsets of 10" in few.warning) == (20, True)
    assert "subsets of 10" in str(few)


# ---- boxes


def test_candidates_have_the_size_asked_for_and_stay_in_the_picture() -> None:
    asked = (13.0, 7.0, 33.0, 17.0)
    boxes = placement.candidates(asked, (64, 48))
    assert boxes[0] == asked
    assert len(set(boxes)) == len(boxes) > 9
    for left, top, right, bottom in boxes:
        assert (right - left, bottom - top) == (20, 10)
        assert min(left, top) >= 0
        assert (right <= 64, bottom <= 48) == (True, True)


def test_a_candidate_one_step_away_still_overlaps_by_half() -> None:
    asked = (20.0, 20.0, 32.0, 28.0)
    near = [placement.overlap(b, asked) for b in placement.candidates(asked, (64, 48))]
    assert sorted(near)[-5:] == pytest.approx([0.6] * 4 + [1])
    assert sorted(near)[-6] < placement.OVERLAP


def test_an_instance_is_found_where_it_was_put_and_nowhere_else() -> None:
    asked = placement.box_of(scene(role="mask"))
    boxes = placement.candidates(asked, (64, 64))
    likeness = np.array([placement.overlap(box, asked) for box in boxes])
    assert placement.box_hit(likeness, boxes, asked)
    elsewhere = min(boxes, key=lambda box: placement.overlap(box, asked))
    moved = [placement.overlap(box, elsewhere) for box in boxes]
    assert not placement.box_hit(moved, boxes, asked)
    assert not placement.box_hit(np.ones(len(boxes)), boxes, asked)


def test_a_crop_is_what_the_mask_marks() -> None:
    mask = scene(role="mask")
    box = placement.box_of(mask)
    inside = np.array(placement.crop(mask, box))
    assert (inside > 127).sum() == (np.array(mask) > 127).sum()
    assert placement.crop(scene(), (-5, -5, 3, 2)).size == (3, 2)


# ---- figures


def test_an_interval_holds_the_true_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(200):
        found = mean_ci(rng.normal(3, 1, 40))
        held += found.low <= 3 <= found.high
    assert 178 <= held <= 199  # 95 % of 200, less what a percentile interval of 40 lacks


def test_values_of_one_group_tell_less_than_as_many_of_their_own() -> None:
    rng = np.random.default_rng(0)
    values = np.repeat(rng.normal(size=10), 20) + rng.normal(0, 0.1, 200)
    alone, grouped = mean_ci(values), mean_ci(values, [k // 20 for k in range(200)])
    assert grouped.mean == pytest.approx(alone.mean)
    assert grouped.high - grouped.low > 3 * (alone.high - alone.low)
    assert grouped.count == alone.count == 200


def test_a_figure_says_its_count_and_only_an_interval_that_it_knows() -> None:
    found = mean_ci([0.5, 0.7, 0.9, 0.7])
    assert str(found).startswith("0.70 (0.")
    assert str(found).endswith(", n 4)")
    assert mean_ci([0.5, 0.7, 0.9, 0.7]) == found
    assert mean_ci([0.25]).record() == {"mean": 0.25, "low": None, "high": None, "count": 1}
    assert str(mean_ci([1.0, 2.0], ["cat", "cat"])) == "1.50 (n 2)"


def test_p_is_small_for_a_clear_difference_and_uniform_for_none() -> None:
    rng = np.random.default_rng(0)
    before = rng.normal(size=40)
    assert sign_flip_p(before + rng.normal(0.8, 1, 40), before) < 0.002
    found = [sign_flip_p(rng.normal(size=10), rng.normal(size=10)) for _ in range(200)]
    assert 3 <= sum(p <= 0.05 for p in found) <= 20
    assert 0.4 < np.mean(found) < 0.6


def test_p_of_few_differences_is_that_of_all_their_signs() -> None:
    assert sign_flip_p([1, 2, 3, 4, 5], [0, 0, 0, 0, 0]) == 2 / 32
    assert sign_flip_p([1.0, -1.0], [0.0, 0.0]) == 1
    assert sign_flip_p([1, 2], [1, 2]) == 1
    together = sign_flip_p([1, 2, 3, 4, 5], [0] * 5, ["a", "a", "b", "b", "b"])
    assert together == 2 / 4


def test_a_paired_difference_sees_what_two_means_do_not() -> None:
    rng = np.random.default_rng(0)
    before = rng.normal(20, 5, 50)
    after = before + rng.normal(0.3, 0.2, 50)
    found = difference(after, before)
    assert 0 < found.low < 0.3 < found.high
    assert mean_ci(after).low < mean_ci(before).high
