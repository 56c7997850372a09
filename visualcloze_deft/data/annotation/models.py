"""Pictures that a model of transformers, named by the user, computes from a photo: which roles,
and how.

Axes: h, w height and width of the photo in pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops

from visualcloze_deft.errors import UserError, suggestion
from visualcloze_deft.images.reading import listing
from visualcloze_deft.storage.hub import HUB_ID, hub_id, loading
from visualcloze_deft.storage.settings_files import SettingsFile, checked

Pipeline = Literal["depth-estimation", "image-segmentation"]  # transformers' names
Size = tuple[int, int]  # width, height
Floats = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Annotator:
    """How a role is made: `draw` turns what the pipeline found, with the model's config and the
    size of the photo, into an RGB picture of that size."""

    pipeline: Pipeline
    draw: Callable[[Any, Any, Size], Image.Image]


ANNOTATORS: dict[str, Annotator] = {
    "depth": Annotator(
        pipeline="depth-estimation",
        draw=lambda found, config, _: grey(nearness(found, config)),
    ),
    "normal": Annotator(
        pipeline="depth-estimation",
        draw=lambda found, config, _: picture(normals(nearness(found, config)) / 2 + 0.5),
    ),
    "segmentation": Annotator(
        pipeline="image-segmentation",
        draw=lambda found, config, size: painted(found, labels(config.id2label), size),
    ),
    "uniformer": Annotator(
        pipeline="image-segmentation",
        draw=lambda found, config, size: painted(found, labels(config.id2label), size),
    ),
    "mask": Annotator(
        pipeline="image-segmentation", draw=lambda found, _, size: all_but_background(found, size)
    ),
}

ARCHITECTURE: dict[Pipeline, str] = {  # how the class names of models end
    "depth-estimation": "DepthEstimation",
    "image-segmentation": "Segmentation",
}
DISTANCES = frozenset({"chmv2", "depth_pro", "glpn", "tipsv2_dpt", "zoedepth"})
"""Models that give metres, where others give nearness. Two kinds can be either: `gives_distance`.
"""
RELIEF = 1.5  # of scenes' depths it makes their normals best: 0.90 is the mean cosine


def check_role(role: str) -> None:
    if role not in ANNOTATORS:
        raise UserError(
            f"annotate {role!r}: no model computes this role, data must bring it; "
            f"{suggestion(role, ANNOTATORS)}"
        )


def check_model(role: str, place: str) -> None:
    """Raise `UserError` if `place`, a folder or hub id, can be no model for a known `role`.

    No weight is read; of a model on the hub its config is fetched.
    """
    pipeline = ANNOTATORS[role].pipeline
    where = f"annotate {role}={place}"
    fields = config_of(where, place)
    names = fields.get("architectures") or ["none"]
    if not any(name.endswith(ARCHITECTURE[pipeline]) for name in names):
        raise UserError(
            f"{where}: its config.json names the architecture {', '.join(names)}; expected one "
            f"for {pipeline}, ...{ARCHITECTURE[pipeline]}"
        )
    known = [*(fields.get("id2label") or {}).values()]
    if role == "mask" and names[0].endswith("SemanticSegmentation") and not background(known):
        some = ", ".join(known[:5]) or "none"
        raise UserError(
            f"{where}: it labels every pixel, and no label is 'background' (its labels: {some}); "
            "take a model that knows one"
        )


FILES = ("config.json", "preprocessor_config.json", "*.safetensors")


def config_of(where: str, place: str, *, files: Sequence[str] = FILES) -> dict[str, Any]:
    """The settings of the model in a folder or on the hub; `where` is for messages.

    files: patterns of the names that a folder must have.
    """
    path: Path | str = Path(place) / "config.json"
    if Path(place).is_dir():
        for name in files:
            if not any(Path(place).glob(name)):
                raise UserError(f"{where}: no {name} in this folder; found {listing(Path(place))}")
    elif not HUB_ID.fullmatch(place):
        raise UserError(f"{where}: no such folder")
    else:
        from transformers.utils import cached_file

        repo, revision = hub_id(place)
        try:
            path = cached_file(repo, "config.json", revision=revision) or path
        except OSError as error:
            raise UserError(
                f"{where}: no such folder, and not from the hub: {str(error).splitlines()[0]}"
            ) from None
    try:
        return checked(Path(path), AnnotatorFile, "no settings of a model")
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def computed(role: str, place: str, device: str, photo: Image.Image) -> Image.Image:
    """The picture of `role` that the model at `place` sees in `photo`, of the same size."""
    if min(photo.size) < 2:  # a line of pixels has no slopes, and the pipeline drops its axis
        raise UserError(f"{role} of a picture of {photo.width} x {photo.height} pixels: too small")
    annotator = ANNOTATORS[role]
    seen = loaded(annotator.pipeline, place, device)
    with (
        loading(place, f"name another model for {annotator.pipeline}"),  # its settings for pictures
        np.errstate(invalid="ignore"),  # its own 8 bits of a depth that is the same everywhere
    ):
        found = seen(photo)
    return annotator.draw(found, seen.model.config, photo.size)


@cache
def loaded(pipeline: Pipeline, place: str, device: str) -> Any:
    """The pipeline around a model, in float32, loaded once per process."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    repo, revision = (place, None) if Path(place).is_dir() else hub_id(place)
    with (
        loading(place, f"name another model for {pipeline}"),
        torch.random.fork_rng(devices=[]),  # what training draws does not hang on when it is
    ):
        return transformers.pipeline(
            pipeline,
            model=repo,
            revision=revision,
            device=device,
            dtype=torch.float32,
            trust_remote_code=False,
            model_kwargs={"use_safetensors": True},
        )


def fastest() -> str:
    """The device that a process of its own computes on."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def nearness(found: Mapping[str, Any], config: Any) -> Floats:
    """(h, w) in 0..1, scaled to the picture: 1 is nearest. All 0 where there is one depth only."""
    depth = found["predicted_depth"].float().cpu().numpy()
    depth = depth.reshape(depth.shape[-2:])
    near = -depth if gives_distance(config) else depth
    span = float(np.ptp(near))
    return (near - near.min()) / span if span else np.zeros_like(near)


def gives_distance(config: Any) -> bool:
    """Whether the depth that a model predicts grows away from the camera."""
    kind = config.model_type
    if kind in ("depth_anything", "prompt_depth_anything"):
        return config.depth_estimation_type == "metric"
    if kind == "dpt":  # MiDaS gives nearness; those on DINOv2 were trained on metres (NYU, KITTI)
        return config.backbone_config is not None and config.backbone_config.model_type == "dinov2"
    return kind in DISTANCES


def normals(near: Floats) -> Floats:
    """(h, w, 3) unit normals of the surface that stands `near` (h, w) high over the picture, in
    units of `RELIEF` times its longer side: x right, y up, z to the viewer, as in scenes.

    >>> normals(np.zeros((2, 2), np.float32))[0, 0].tolist()
    [0.0, 0.0, 1.0]
    """
    down, right = np.gradient(near * RELIEF * max(near.shape))
    vectors = np.stack([-right, down, np.ones_like(near)], axis=-1)
    unit: Floats = vectors / np.linalg.norm(vectors, axis=-1, keepdims=True) + 0.0
    return unit


def labels(names: Mapping[int, str]) -> dict[str, tuple[int, int, int]]:
    """A colour of its own for each label; black is left to what has none."""
    return {name: colour(number + 1) for number, name in names.items()}


def colour(number: int) -> tuple[int, int, int]:
    """Entry `number` of PASCAL VOC's colour map: its bits in turn to red, green and blue, highest
    first. All entries differ up to 2^24.

    >>> colour(0), colour(1), colour(6), colour(15)
    ((0, 0, 0), (128, 0, 0), (0, 128, 128), (192, 128, 128))
    """
    red, green, blue = (
        sum((number >> (3 * k + channel) & 1) << (7 - k) for k in range(8)) for channel in range(3)
    )
    return red, green, blue


def painted(
    found: Sequence[Mapping[str, Any]], colours: Mapping[str, tuple[int, int, int]], size: Size
) -> Image.Image:
    """Each segment in the flat colour of its label."""
    image = Image.new("RGB", size)
    for segment in found:
        image.paste(colours[segment["label"]], mask=segment["mask"])
    return image


def all_but_background(found: Sequence[Mapping[str, Any]], size: Size) -> Image.Image:
    """All segments of any other label than "background" white, on black."""
    mask = Image.new("L", size)
    for segment in found:
        if not background([segment["label"]]):
            mask = ImageChops.lighter(mask, segment["mask"])
    return mask.convert("RGB")


def background(names: Sequence[str]) -> bool:
    """Whether one of the labels is that of the background."""
    return "background" in map(str.lower, names)


def grey(values: Floats) -> Image.Image:
    return picture(np.repeat(values[..., None], 3, axis=-1))


def picture(values: NDArray[np.floating]) -> Image.Image:
    """(h, w, 3) in 0..1 as 8 bits."""
    return Image.fromarray((np.clip(values, 0, 1) * 255 + 0.5).astype(np.uint8))


class AnnotatorFile(SettingsFile):
    """What is read of the settings of a model of transformers that computes pictures."""

    architectures: list[str] | None = None
    model_type: str | None = None
    id2label: dict[str, str] | None = None
