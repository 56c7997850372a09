"""Depth maps as tasks mean them: bright where it is near, dark where it is far or not measured.

What the values of a file are may be declared beside it, in `depth.toml`; see `Depth`.
"""

from __future__ import annotations

from os.path import lexists
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from visualcloze_deft.errors import UserError
from visualcloze_deft.images.reading import READ_AS, as_rgb
from visualcloze_deft.storage.toml_files import read_toml

DECLARED = "depth.toml"
SPAN = "span"  # key of `Image.info`: the values that became white and black
FULL = 60_000  # of 65535: a 16-bit map that comes as far fills its range, and is no measurement
MOST = 65_535
RANGE = (1, 99)  # percentiles of what was measured, where near and far are not declared
UNITS = {"mm": 1000.0, "m": 1.0}  # values a metre

Floats = NDArray[np.float64]


class Depth(BaseModel):
    """What `depth.toml` declares of a source's depth maps.

    meaning: "metric", distances from the camera; "disparity", larger is nearer, in any unit;
    "picture", 8 or 16 bits over their whole range. unit: of distances, "mm", "m" or how many values
    make a metre (5000 in TUM RGB-D, 256 in KITTI). near, far: metres that become white and black;
    where one is not given, the 1st or 99th percentile of each file. zero: whether 0 says that
    nothing was measured, which becomes black. bright: of a picture, what is bright in the file.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)

    meaning: Literal["metric", "disparity", "picture"]
    unit: Literal["mm", "m"] | Annotated[float, Field(gt=0)] = "mm"
    near: Annotated[float, Field(ge=0)] | None = None
    far: Annotated[float, Field(gt=0)] | None = None
    zero: Literal["missing", "value"] = "missing"
    bright: Literal["near", "far"] = "near"

    @property
    def per_metre(self) -> float:
        return UNITS[self.unit] if isinstance(self.unit, str) else self.unit


def declared(folder: Path) -> Depth | None:
    """What `folder` declares of the depth maps in it, None where it declares nothing."""
    path = folder / DECLARED
    if not lexists(path):
        return None
    try:
        found = Depth.model_validate(read_toml(path))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"][:1])
        raise UserError(f"{path}: {place}: {first['msg'].lower()}") from None
    if found.meaning != "metric" and (found.near is not None or found.far is not None):
        raise UserError(f"{path}: near and far are metres, for meaning = 'metric'; leave them")
    if found.meaning != "picture" and found.bright != "near":
        raise UserError(f"{path}: bright is for meaning = 'picture'; say 'metric' or 'disparity'")
    if found.near is not None and found.far is not None and found.near >= found.far:
        raise UserError(f"{path}: near = {found.near:g} must be less than far = {found.far:g}")
    return found


def as_depth(name: str, image: Image.Image, told: Depth | None) -> Image.Image:
    """The upright depth map `image` as RGB, bright where it is near; `name` is for messages.

    told: None where nothing is declared. Then 8 bits, and 16 bits that fill their range, are a
    picture that is bright where it is near; other 16 bits are distances in millimetres.
    """
    many_bits = image.mode == "F" or image.mode.startswith("I")
    if told is None and not many_bits:
        return as_rgb(name, image)
    values = np.asarray(image if many_bits else as_rgb(name, image).convert("L"), np.float64)
    if told is None:
        told = _guessed(name, values, image.mode)
    if told.meaning == "picture":
        top = MOST if many_bits and values.max(initial=0) > 255 else 255
        return _picture(name, image, values, told, top=top)
    return _measured(values, told)


def _guessed(name: str, values: Floats, mode: str) -> Depth:
    if mode == "F" or values.min() < 0 or values.max() > MOST:
        raise UserError(
            f"{name}: its values have no fixed range; say what they are in a {DECLARED} beside the "
            "data, e.g. meaning = 'metric', unit = 'm'"
        )
    return Depth(meaning="picture" if values.max() >= FULL else "metric")


def _picture(
    name: str, image: Image.Image, values: Floats, told: Depth, *, top: int
) -> Image.Image:
    if values.min() < 0 or not values.max() <= MOST:
        raise UserError(f"{name}: its values have no fixed range; {DECLARED} calls it a picture")
    if image.mode == "F" and values.max() <= 1:
        top = 1
    light = values / top if told.bright == "near" else 1 - values / top
    bits = "16 bits" if top == MOST else "8 bits" if top == 255 else "0 to 1"
    return _grey(light, f"picture of {bits}, bright where {told.bright}")


def _measured(values: Floats, told: Depth) -> Image.Image:
    """Distances, or disparities, as brightness that falls evenly from the nearest on."""
    seen = np.isfinite(values)
    if told.zero == "missing":
        seen &= values != 0
    if told.meaning == "metric":
        values = values / told.per_metre
        how = f"metric, in {told.unit if isinstance(told.unit, str) else f'1/{told.unit:g} m'}"
    else:
        values, how = -np.where(seen, values, 0), "disparity"
    if not seen.any():
        return _grey(np.zeros(values.shape), f"{how}: nothing measured")
    found = np.percentile(values[seen], RANGE)
    near = found[0] if told.near is None else told.near
    far = found[1] if told.far is None else told.far
    light = np.full(values.shape, 0.5) if far <= near else (far - values) / (far - near)
    ends = " and ".join(
        word for word, end in (("near", told.near), ("far", told.far)) if end is None
    )
    how += f", {ends} by percentiles {RANGE[0]} and {RANGE[1]} of each file" if ends else ""
    how += ", 0 is not measured" if told.zero == "missing" else ""
    grey = _grey(np.where(seen, light, 0), how)
    if told.meaning == "metric":
        grey.info[SPAN] = (float(near), float(far))
    return grey


def _grey(light: Floats, how: str) -> Image.Image:
    """Brightness 0..1 as RGB, with a word on how it was read."""
    image = Image.fromarray((np.clip(light, 0, 1) * 255 + 0.5).astype(np.uint8)).convert("RGB")
    image.info = {READ_AS: how}
    return image
