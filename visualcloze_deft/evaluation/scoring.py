"""What is measured of every image: a number by the name of its metric.

Axes: n images, d dimensions of features.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import groupby
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from visualcloze_deft.backbones.embedding_cache import fingerprint
from visualcloze_deft.data.annotation.models import ANNOTATORS, computed, fastest, loaded
from visualcloze_deft.data.derive import canny
from visualcloze_deft.data.sources.insdet import GROWN
from visualcloze_deft.errors import UserError
from visualcloze_deft.evaluation.cases import Shot
from visualcloze_deft.evaluation.encoders.load import Encoder
from visualcloze_deft.evaluation.metrics import fidelity, placement, similarity
from visualcloze_deft.evaluation.metrics.fidelity import Colour
from visualcloze_deft.evaluation.score_metrics import COMPARED, PERCEIVED
from visualcloze_deft.evaluation.suite_queries import MAPS
from visualcloze_deft.grids.grid import fitted
from visualcloze_deft.images.reading import Box, read_image
from visualcloze_deft.storage.atomic import atomic_write

Scores = dict[str, float]
Rows = NDArray[np.float32]
LEAST = 32  # images of a row for a distance of sets: fewer give noise alone
EDGE = 2  # pixels around a hole whose values resizing may have mixed


@dataclass(frozen=True, kw_only=True)
class Measures:
    """What is measured beside pixels.

    encoders: of images. annotate: role -> model that extracts it from an image. always: roles that
    are extracted from every image and its truth, also where none was given as a condition.
    tolerance: of edges, in pixels. lpips: whether it is computed. maps: a folder that keeps what
    `annotate` made.
    """

    encoders: Sequence[Encoder] = ()
    annotate: Mapping[str, str] = field(default_factory=dict)
    always: Sequence[str] = ()
    tolerance: int = 0
    lpips: bool = False
    maps: Path | None = None


def score(shots: Sequence[Shot], measures: Measures, *, what: str = "scoring") -> list[Scores]:
    """The metrics of every image, in their order; those that its kind has.

    Raises `UserError` where an image cannot be read or compared.
    """
    found = [
        pixel_scores(shot, measures) for shot in tqdm(shots, desc=f"{what}, pixels", unit="image")
    ]
    for encoder in measures.encoders:
        for scores, more in zip(found, encoded(shots, encoder, what), strict=True):
            scores |= more
    return found


def pixel_scores(shot: Shot, measures: Measures) -> Scores:
    """All that needs no encoder."""
    made = read_image(shot.image)
    found: Scores = {}
    truth = fitted(read_image(shot.truth), made.size) if shot.truth else None
    if truth:
        found["psnr"] = fidelity.psnr(made, truth)
        if min(made.size) >= fidelity.WINDOW:
            found["ssim"] = fidelity.ssim(made, truth)
        if measures.lpips and min(made.size) >= fidelity.LEAST_SIDE:
            found["lpips"] = fidelity.lpips(made, truth, device=fastest())
        if shot.role in COMPARED:
            found |= compared(shot.role, made, truth, measures, shot.classes)
    if shot.role not in MAPS and (truth or shot.role == "target"):
        for role in dict.fromkeys((*shot.shown, *measures.always)):
            found |= followed(role, made, truth, shot, measures)
    if shot.box and "hole" in shot.shown:
        hole = fitted(read_image(shot.shown["hole"]), made.size)
        where = outside_hole(fitted(read_image(shot.box), made.size))
        if where.any():
            found["preserved"] = fidelity.mean_error(made, hole, where=where)
    return found


def followed(
    role: str, made: Image.Image, truth: Image.Image | None, shot: Shot, measures: Measures
) -> Scores:
    """How well an image fits a condition that it was made from: the condition is extracted from it
    as it is from the truth, or compared with the one given where there is no truth. Canny is always
    extracted (by OpenCV), the others where a model is named for them."""
    if role not in COMPARED or (role != "canny" and role not in measures.annotate):
        return {}
    found = extracted(role, made, measures)
    if truth is None:
        return compared(role, found, fitted(read_image(shot.shown[role]), made.size), measures)
    asked = extracted(role, truth, measures)
    classes = colours_of(found, asked) if role in PERCEIVED else None
    return compared(role, found, asked, measures, classes)


def colours_of(*painted: Image.Image) -> tuple[Colour, ...]:
    """The colours that a model painted segments in: those of one picture alone are classes too."""
    values = np.concatenate([np.asarray(image).reshape(-1, 3) for image in painted])
    return tuple((int(r), int(g), int(b)) for r, g, b in np.unique(values, axis=0))


def extracted(role: str, image: Image.Image, measures: Measures) -> Image.Image:
    """What OpenCV (canny) or a model sees in an image; of a model, kept by the image's content and
    the model's."""
    if role == "canny":
        return canny(image)
    place = measures.annotate[role]
    told = f"{role} {annotator(role, place)} {image.size}".encode() + image.tobytes()
    path = measures.maps and measures.maps / role / f"{hashlib.sha256(told).hexdigest()}.png"
    if path and path.is_file():
        return read_image(path)
    found = computed(role, place, fastest(), image)
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, partial(found.save, format="PNG"))
    return found


@cache
def annotator(role: str, place: str) -> str:
    """What tells a model that extracts `role` from others, wherever it lies: SHA-256 of its weights
    and of how it sees pictures."""
    seen = loaded(ANNOTATORS[role].pipeline, place, fastest())
    sees = json.dumps(seen.image_processor.to_dict(), sort_keys=True, default=str)
    return hashlib.sha256(f"{fingerprint(seen.model)} {sees}".encode()).hexdigest()


def compared(
    role: str,
    made: Image.Image,
    truth: Image.Image,
    measures: Measures,
    classes: Sequence[Colour] | None = None,
) -> Scores:
    """Two maps of one role. Not compared are edges where none is asked for (any image without
    detail would be right), and segmentations whose classes nobody says, of too many colours (a
    JPEG, or resized)."""
    name = COMPARED[role]
    if name == "canny_f1":
        if not (np.asarray(truth.convert("L")) > 127).any():
            return {}
        return {name: fidelity.edge_f1(made, truth, tolerance=measures.tolerance)}
    if name == "miou":
        try:
            return {name: fidelity.segmentation_miou(made, truth, colours=classes)}
        except UserError:
            return {}
    compare = fidelity.depth_rmse if name == "depth_rmse" else fidelity.normals_angle
    return {name: compare(made, truth)}


def outside_hole(box: Image.Image) -> NDArray[np.bool_]:
    """(h, w): the pixels that no part of the hole around a box is near."""
    left, top, right, bottom = placement.box_of(box)
    grow = round(GROWN * max(right - left, bottom - top)) + EDGE
    where = np.ones((box.height, box.width), bool)
    rows = slice(max(round(top) - grow, 0), round(bottom) + grow)
    where[rows, max(round(left) - grow, 0) : round(right) + grow] = False
    return where


def encoded(shots: Sequence[Shot], encoder: Encoder, what: str) -> list[Scores]:
    """What an encoder says of every image."""
    name = encoder.name
    kept = FeatureCache(encoder, what)
    found: list[Scores] = [{} for _ in shots]
    photos = [k for k, shot in enumerate(shots) if shot.role not in MAPS]
    if not photos:
        return found
    features = dict(zip(photos, kept.of([shots[k].image for k in photos]), strict=True))
    # those of one subject stand together: its references are taken once, not once an image
    for references, own in groupby(photos, key=lambda k: shots[k].references):
        group = list(own)
        alike = [k for k in group if references and not shots[k].box]
        if alike:
            made = np.stack([features[k] for k in alike])
            cosines = similarity.to_references(made, kept.of(references))
            for k, cosine in zip(alike, cosines, strict=True):
                found[k][f"image/{name}"] = float(cosine)
        for k in group:
            shot = shots[k]
            if shot.truth and (shot.box or not references):
                truth = kept.of([shot.truth])
                found[k][f"image/{name}"] = float(similarity.aligned(features[k][None], truth)[0])
            if shot.box and references:
                found[k] |= placed(shot, kept)
    asked = [k for k in photos if shots[k].prompt]
    if encoder.read is not None and asked:
        texts = encoder.texts([shots[k].prompt for k in asked]).values
        made = np.stack([features[k] for k in asked])
        for k, cosine in zip(asked, similarity.aligned(made, texts), strict=True):
            found[k][f"text/{name}"] = float(cosine)
    return found


class FeatureCache:
    """Features of files by an encoder, each file read once; the encoder keeps them on disk."""

    def __init__(self, encoder: Encoder, what: str) -> None:
        self.encoder = encoder
        self.what = what
        self._known: dict[Path, Rows] = {}

    def of(self, paths: Sequence[Path]) -> Rows:
        """(n, d): the features of the pictures in `paths`."""
        new = [path for path in dict.fromkeys(paths) if path not in self._known]
        if new:
            words, few = f"{self.what}, {self.encoder.name}", len(new) < 2
            bar = tqdm(new, desc=words, unit="image", disable=few)
            features = self.encoder.images(read_image(path) for path in bar).values
            self._known |= dict(zip(new, features, strict=True))
        return np.stack([self._known[path] for path in paths])


def placed(shot: Shot, kept: FeatureCache) -> Scores:
    """Whether the object stands in its box, and how like its views it is there."""
    made = read_image(shot.image)
    assert shot.box is not None
    box = placement.box_of(fitted(read_image(shot.box), made.size))
    views = kept.of(shot.references)
    boxes = placement.candidates(box, made.size)
    crops = kept.encoder.images(seen(made, one) for one in boxes).values
    cosines = similarity.to_references(crops, views)
    found = {f"box/{kept.encoder.name}": float(cosines[0])}
    if not all(placement.overlap(one, box) >= placement.OVERLAP for one in boxes):
        found[f"box_hit/{kept.encoder.name}"] = float(placement.box_hit(cosines, boxes, box))
    return found


def seen(image: Image.Image, box: Box) -> Image.Image:
    """What of a box an encoder is given: all of it."""
    return placement.squared(placement.crop(image, box))


def drifts(
    after: Sequence[Shot], before: Sequence[Shot], encoders: Sequence[Encoder]
) -> list[Scores]:
    """How far each image is from that of the base at the same grid and seed: in pixels, and 1 - the
    cosine by each encoder."""
    found: list[Scores] = []
    for one, other in zip(after, before, strict=True):
        made = read_image(one.image)
        base = fitted(read_image(other.image), made.size)
        found.append({"drift_pixels": fidelity.mean_error(made, base)})
    for encoder in encoders:
        kept = FeatureCache(encoder, "drift")
        cosines = similarity.aligned(
            kept.of([shot.image for shot in after]), kept.of([shot.image for shot in before])
        )
        for scores, cosine in zip(found, cosines, strict=True):
            scores[f"drift/{encoder.name}"] = 1 - float(cosine)
    return found


@dataclass(frozen=True, kw_only=True)
class SetScore:
    """A distance of all images of a row to their truths, by an encoder."""

    row: str
    encoder: str
    kind: str  # FID or KID
    distance: similarity.Distance


def set_scores(shots: Sequence[Shot], encoder: Encoder) -> Iterator[SetScore]:
    """KID from `LEAST` images on, FID where there are more than dimensions, for every row of
    photos that have truths."""
    kept = FeatureCache(encoder, "sets")
    for row in dict.fromkeys(shot.row for shot in shots):
        own = [s for s in shots if s.row == row and s.truth and s.role not in MAPS]
        truths = dict.fromkeys(shot.truth for shot in own if shot.truth)
        if min(len(own), len(truths)) < LEAST:
            continue
        made = kept.of([shot.image for shot in own])
        truth = kept.of(list(truths))
        yield from set_distances(row, made, truth, encoder.name)


def set_distances(row: str, made: Rows, truth: Rows, encoder: str) -> Iterator[SetScore]:
    """FID only where it can mean something."""
    kinds: dict[str, Callable[[Rows, Rows], similarity.Distance]] = {"KID": similarity.kid}
    if min(len(made), len(truth)) > made.shape[1]:
        kinds["FID"] = similarity.fid
    for kind, distance in kinds.items():
        yield SetScore(row=row, encoder=encoder, kind=kind, distance=distance(made, truth))


@cache
def check_lpips() -> None:
    """Raise `UserError` where LPIPS cannot be computed here."""
    grey = Image.new("RGB", (64, 64), "grey")
    fidelity.lpips(grey, grey, device=fastest())
