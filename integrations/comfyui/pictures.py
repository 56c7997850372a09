"""ComfyUI's IMAGE to pictures and back. Axes: b batch, h w pixels, c channels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def pictures_of(images: Tensor) -> list[Image.Image]:
    """(b, h, w, c) in 0..1 with 1, 3 or 4 channels, to b pictures of 8 bits."""
    values = (images * 255).round().clamp(0, 255).to("cpu", torch.uint8).numpy()
    return [Image.fromarray(one[..., 0] if one.shape[-1] == 1 else one) for one in values]


def picture_of(values: np.ndarray) -> Image.Image:
    """One (h, w, 3) array in 0..1 to a picture."""
    return Image.fromarray((values * 255).round().clip(0, 255).astype(np.uint8))


def stacked(arrays: Sequence[np.ndarray]) -> Tensor:
    """(h, w, 3) arrays of one size, in 0..1, to an IMAGE (b, h, w, 3) in float32."""
    return torch.from_numpy(np.stack(arrays).astype(np.float32))


def image_of(pictures: Sequence[Image.Image]) -> Tensor:
    """RGB pictures of one size to an IMAGE (b, h, w, 3) in 0..1."""
    return stacked([np.asarray(one.convert("RGB"), np.float32) / 255 for one in pictures])
