"""ComfyUI's IMAGE to pictures and back. Axes: b batch, h w pixels, c channels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def pictures_of(images: Tensor, name: str) -> list[Image.Image]:
    """(b, h, w, c) in 0..1 with 1, 3 or 4 channels, to b pictures of 8 bits. name: for messages.

    Values outside of 0..1 are clipped, as ComfyUI does. Raises `ValueError` for NaN and infinity.
    """
    if not images.isfinite().all():
        raise ValueError(f"{name}: it holds values that are not finite; look at the node before it")
    values = (images * 255).round().clamp(0, 255).to("cpu", torch.uint8).numpy()
    return [Image.fromarray(one[..., 0] if one.shape[-1] == 1 else one) for one in values]


def image_of(pictures: Sequence[Image.Image]) -> Tensor:
    """RGB pictures of one size to an IMAGE (b, h, w, 3) in 0..1."""
    values = np.stack([np.asarray(one.convert("RGB"), np.float32) for one in pictures])
    return torch.from_numpy(values / 255)
