"""Sets of features against each other: cosines, and distances of distributions.

Every function is pure and takes features as an encoder gives them, one row an image or text; which
encoder it was belongs to every figure (`features.Features`).

Axes: n images, m others, d dimensions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from visualcloze_deft.errors import UserError
from visualcloze_deft.reporting.numbers import three_digits

Rows = NDArray[np.floating]
Floats = NDArray[np.float64]
SUBSETS = 100  # of KID, and images in each, as its authors take them
SUBSET_SIZE = 1000
STEADY = 10_000  # images from which on the authors of FID trust it


@dataclass(frozen=True, kw_only=True)
class Distance:
    """A distance of two sets of images: how many there were, and what to think of it.

    count: images of the smaller set. deviation: of KID over its subsets; FID has none (NaN).
    warning: why the figure means little, empty where it does not.
    """

    value: float
    deviation: float
    count: int
    warning: str

    def __str__(self) -> str:
        spread = "" if math.isnan(self.deviation) else f", deviation {self.deviation:.2g}"
        warning = f"; {self.warning}" if self.warning else ""
        return f"{three_digits(self.value)} (n {self.count}{spread}{warning})"


def cosines(one: Rows, other: Rows) -> Floats:
    """(n, m): the cosine of every row of `one` with every row of `other`, -1..1."""
    return _unit(one) @ _unit(other).T


def to_references(made: Rows, references: Rows) -> Floats:
    """(n,): the mean cosine of each image to all references.

    Its mean is the mean pairwise cosine: CLIP-I and DINO of DreamBooth (Ruiz et al. 2023, sec. 4.2)
    with those encoders' features of a subject's generated and real images. The mean of cosines is
    the product with the mean of unit vectors, so no table of n x m is made.
    """
    found: Floats = _unit(made) @ _unit(references).mean(axis=0)
    return found


def within(features: Rows) -> Floats:
    """(n,): the mean cosine of each image to all others of the same set, itself left out.

    Of real images of a subject, the ceiling that DreamBooth names; of images made of one prompt,
    how little they differ.
    """
    if len(features) < 2:
        raise UserError("one image cannot be compared with the others of its set: there are none")
    found = cosines(features, features)
    np.fill_diagonal(found, 0)
    return found.sum(axis=1) / (len(features) - 1)


def aligned(one: Rows, other: Rows) -> Floats:
    """(n,): the cosine of each row with the row of the same place, -1..1.

    Of images and their prompts by CLIP it is CLIP-T (Ruiz et al. 2023, sec. 4.2; neither multiplied
    by 100 nor by 2.5 as in CLIPScore); of images and their truths, paired CLIP-I or DINO; of images
    before and after training, 1 - drift.
    """
    if len(one) != len(other):
        raise UserError(f"{len(one)} features against {len(other)}: they must come in pairs")
    found: Floats = np.sum(_unit(one) * _unit(other), axis=1)
    return found


def fid(made: Rows, truth: Rows) -> Distance:
    """Frechet distance of two Gaussians fitted to the features, 0 upward (Heusel et al. 2017,
    eq. 6): |mean difference|^2 + trace(S1 + S2 - 2 (S1 S2)^(1/2)).

    It is FID proper of Inception-v3's pool of 2048 only; of other features, name the encoder. It is
    biased: fewer images make it larger, so compare figures of one count alone.
    """
    one, other = _both(made, truth)
    shift = one.mean(axis=0) - other.mean(axis=0)
    factors = [_factor(x) for x in (one, other)]
    # The square roots of the eigenvalues of S1 S2 are the singular values of A1 A2^T, S = A^T A.
    shared = np.linalg.svd(factors[0] @ factors[1].T, compute_uv=False).sum()
    spread = sum(float((a**2).sum()) for a in factors)
    count, dimensions = min(len(one), len(other)), one.shape[1]
    return Distance(
        value=max(float(shift @ shift + spread - 2 * shared), 0.0),
        deviation=float("nan"),
        count=count,
        warning=_too_few(count, dimensions),
    )


def _factor(rows: Floats) -> Floats:
    """A with A^T A the covariance of the rows, at most d rows itself."""
    centred = (rows - rows.mean(axis=0)) / np.sqrt(len(rows) - 1)
    if len(centred) <= centred.shape[1]:
        return centred
    triangle: Any = np.linalg.qr(centred, mode="r")  # an array, which its annotation hides
    return triangle


def _too_few(count: int, dimensions: int) -> str:
    if count <= dimensions:
        return f"means nothing: fewer images than the {dimensions} dimensions of a covariance"
    if count < STEADY:
        return f"biased below {STEADY} images: compare with figures of the same count alone"
    return ""


def kid(made: Rows, truth: Rows, *, seed: int = 0) -> Distance:
    """Kernel distance (Binkowski et al. 2018): the mean of the unbiased squared maximum mean
    discrepancy under (x.y / d + 1)^3 over 100 subsets of 1000 images of each set, or of half the
    smaller set where that is less.

    Unbiased, so of equal distributions it is 0 on average and below 0 half of the time; at small
    counts look at `deviation`.
    """
    one, other = _both(made, truth)
    count = min(len(one), len(other))
    if count < 4:
        raise UserError(f"KID of {count} images: it takes subsets of half of them, two at least")
    size = min(SUBSET_SIZE, count // 2)
    rng = np.random.default_rng(seed)
    found = [
        _discrepancy(*(x[rng.choice(len(x), size, replace=False)] for x in (one, other)))
        for _ in range(SUBSETS)
    ]
    few = f"subsets of {size} images instead of {SUBSET_SIZE}"
    return Distance(
        value=float(np.mean(found)),
        deviation=float(np.std(found)),
        count=count,
        warning=few if size < SUBSET_SIZE else "",
    )


def _discrepancy(one: Floats, other: Floats) -> float:
    """Unbiased squared MMD (Gretton et al. 2012, eq. 3) of two sets of equally many rows."""
    n = len(one)
    inner = sum(
        (kernel.sum() - np.trace(kernel)) / (n * (n - 1))
        for kernel in (_kernel(one, one), _kernel(other, other))
    )
    return float(inner - 2 * _kernel(one, other).mean())


def _kernel(one: Floats, other: Floats) -> Floats:
    kernel: Floats = (one @ other.T / one.shape[1] + 1) ** 3
    return kernel


def _unit(rows: Rows) -> Floats:
    """Rows of length 1; one of zeros stays, and is like nothing."""
    values = np.asarray(rows, np.float64)
    unit: Floats = values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12)
    return unit


def _both(made: Rows, truth: Rows) -> tuple[Floats, Floats]:
    one, other = np.asarray(made, np.float64), np.asarray(truth, np.float64)
    if one.shape[1] != other.shape[1]:
        raise UserError(
            f"features of {one.shape[1]} and {other.shape[1]} dimensions: of two encoders"
        )
    if min(len(one), len(other)) < 2:
        raise UserError(
            f"a distance of sets of {len(one)} and {len(other)} images: two of each at least"
        )
    return one, other
