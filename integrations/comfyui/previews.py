"""The picture that a node shows while it samples. Axes: b batch, n tokens, c channels, h w."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from PIL import Image
from torch import Tensor

from . import host
from .pictures import pictures_of

FLUX_SCALE = 0.3611  # of FLUX's autoencoder, whose latents ComfyUI's previewers know
Shape = tuple[tuple[int, int], ...]


class CleanEstimate:
    """The clean latents that the last known step leads to: x - t v with v from two samples.

    The time after a step is known only in the next call, so the estimate is one step late.
    """

    def __init__(self) -> None:
        self.before: list[tuple[float, Tensor]] = []  # (time, sample at it)
        self.latest: Tensor | None = None

    def after_step(self, time: float, sample: Tensor) -> Tensor | None:
        """time: of the step, 1 at noise. sample: (b, n, c) that it led to. None while unknown."""
        if self.latest is not None:
            self.before = [*self.before[-1:], (time, self.latest)]
        self.latest = sample
        if len(self.before) < 2:
            return None
        (then, x_then), (now, x_now) = self.before
        return x_now - now * (x_now - x_then) / (now - then)


def query_latent(tokens: Tensor, shape: Shape) -> Tensor:
    """The latents (1, 16, h, w) of a grid's last row. shape: (height, width) of each row in
    pixels."""
    from visualcloze_deft.backbones.flux_fill.packing import unpack

    return unpack(tokens[:1], shape)[-1]


def drawing(pipe: Any) -> Callable[[Tensor], Image.Image] | None:
    """What draws latents (1, 16, h, w); None where the user has switched previews off.

    FLUX's latents are drawn as ComfyUI draws them, those of another autoencoder by itself.
    """
    previewer = host.flux_previewer()
    if previewer is None:
        return None
    if pipe.vae.config.scaling_factor == FLUX_SCALE:
        return lambda latent: previewer.decode_latent_to_preview_image("JPEG", latent)[1]
    decode = pipe.models.decode_latents
    return lambda latent: pictures_of((decode(latent).movedim(1, -1) + 1) / 2, "preview")[0]
