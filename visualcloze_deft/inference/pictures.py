"""What Python callers give as a picture: PIL images, paths, arrays and tensors."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from visualcloze_deft.errors import UserError
from visualcloze_deft.images.depth import Depth, declared
from visualcloze_deft.images.maps import as_role, read_role
from visualcloze_deft.images.reading import read_image

Picture = Image.Image | str | Path | np.ndarray | torch.Tensor
CHANNELS = (1, 3, 4)


def picture(given: object, role: str, where: str) -> Image.Image | None:
    """A cell of a grid as 8-bit RGB in the sense of its role; None, which is generated, stays None.

    given: a PIL image of any mode; a path, read as those in grid files are; an array (h, w) or
    (h, w, c), or a tensor (h, w) or (c, h, w), of 1, 3 or 4 channels, maybe behind an axis of 1.
    Values are whole (8 or 16 bits), true or false, or in 0..1. where: in words, for messages.
    Raises `UserError` for anything else.
    """
    if given is None:
        return None
    if isinstance(given, str | Path):
        return from_path(given, role, where)
    if isinstance(given, torch.Tensor):
        given = channels_last(given, where)
    if isinstance(given, np.ndarray):
        given = from_array(given, where)
    if not isinstance(given, Image.Image):
        raise UserError(
            f"{where}: {type(given).__name__} is no picture; give a path, a PIL image, an array, a "
            "tensor, or None for what is generated"
        )
    return as_role(role, where, given)


def from_path(path: str | Path, role: str, where: str) -> Image.Image:
    if str(path).startswith(("http://", "https://")):
        raise UserError(f"{where}: {path} is a web address; download it and give the file")
    place = Path(path)
    return read_once(role, place, declared(place.parent))[0]


def read_once(role: str, path: Path, depth: Depth | None) -> tuple[Image.Image, str]:
    """The picture in a file, in the sense of its role, and the SHA-256 of the bytes that it was
    made of."""
    try:
        data = path.read_bytes() if path.is_file() else b""  # a pipe would be waited for
    except (OSError, ValueError):
        data = b""
    if not data:
        read_image(path)  # says in words what is wrong
    return read_role(role, path, depth, data), hashlib.sha256(data).hexdigest()


def channels_last(tensor: torch.Tensor, where: str) -> np.ndarray:
    """A tensor as the array (h, w) or (h, w, c) of the same values."""
    one = tensor[0] if tensor.ndim == 4 and len(tensor) == 1 else tensor
    if not (one.ndim == 2 or (one.ndim == 3 and len(one) in CHANNELS)):
        raise UserError(f"{where}: a tensor of shape {tuple(tensor.shape)}; give (3, h, w)")
    plain = one.detach().cpu()
    plain = plain.float() if plain.is_floating_point() else plain  # numpy has no bfloat16
    return np.asarray(plain if plain.ndim == 2 else plain.permute(1, 2, 0))


def from_array(array: np.ndarray, where: str) -> Image.Image:
    one = array[0] if array.ndim == 4 and len(array) == 1 else array
    if not (one.ndim == 2 or (one.ndim == 3 and one.shape[2] in CHANNELS)):
        raise UserError(f"{where}: an array of shape {array.shape}; give (h, w, 3)")
    if not one.size:
        raise UserError(f"{where}: an array of shape {array.shape} has no pixels")
    flat = one[..., 0] if one.ndim == 3 and one.shape[2] == 1 else one
    return Image.fromarray(np.ascontiguousarray(in_bits(flat, where)))


def in_bits(values: np.ndarray, where: str) -> Any:
    """Values as PIL holds them: bytes, and 16 bits of one channel as they are."""
    if values.dtype == np.uint8 or (values.dtype == np.uint16 and values.ndim == 2):
        return values
    if values.dtype == np.bool_:
        return values.astype(np.uint8) * 255
    if values.dtype.kind != "f":
        raise UserError(
            f"{where}: values of type {values.dtype}; give uint8, bool, or floats from 0 to 1"
        )
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= 1):
        raise UserError(
            f"{where}: values from {low:.4g} to {high:.4g}; give floats from 0 to 1, or uint8"
        )
    return (values * 255 + 0.5).astype(np.uint8)
