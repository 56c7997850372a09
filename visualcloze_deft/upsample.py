"""Upsampling as VisualCloze does it: an image enlarged, noised in part, denoised by FLUX.1-Fill.

SDEdit (Meng et al. 2022, arXiv 2108.01073) with the same model, the whole image hidden. Strengths,
ids (row 0) and the grey that a hidden image shows are those of diffusers' FluxFillPipeline.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from visualcloze_deft import flow, grid
from visualcloze_deft.cells import CELL_STEP
from visualcloze_deft.data.images import LIMIT
from visualcloze_deft.errors import UserError
from visualcloze_deft.models import Models
from visualcloze_deft.sample import AfterStep, Conditions, denoise, go_on, velocity_of

STRENGTH = 0.4  # VisualCloze's


@dataclass(frozen=True, kw_only=True)
class Upsampling:
    """How one image is enlarged. Sides become multiples of 16.

    scale: of both sides, unless width or height is given; of those the other follows the aspect.
    strength: 0..1, how much noise it is made anew from; 0 leaves it as it is.
    prompt: what it shows; None is the grid's content prompt.
    """

    scale: float = 2.0
    width: int | None = None
    height: int | None = None
    strength: float = STRENGTH
    prompt: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.strength <= 1:
            raise UserError(f"strength {self.strength}: give a number from 0 to 1")
        if not 0 < self.scale < math.inf:
            raise UserError(f"upsampling scale {self.scale}: give a number above 0, e.g. 2")
        for name, side in (("width", self.width), ("height", self.height)):
            if side is not None and side < CELL_STEP:
                raise UserError(f"upsampling {name} {side}: give {CELL_STEP} pixels or more")

    def size(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) that an image of these sides gets.

        >>> Upsampling(width=1024).size(432, 320)
        (1024, 752)
        """
        if self.width is None and self.height is None:
            new = width * self.scale, height * self.scale
        elif self.height is None:
            assert self.width is not None
            new = self.width, height * self.width / width
        elif self.width is None:
            new = width * self.height / height, self.height
        else:
            new = self.width, self.height
        wide, high = (max(int(side) // CELL_STEP, 1) * CELL_STEP for side in new)
        if wide * high > LIMIT:
            raise UserError(f"upsampling to {wide} x {high}: more than {LIMIT // 10**6} megapixels")
        return wide, high

    def steps(self, steps: int) -> int:
        """How many of `steps` sampling steps are taken, as in diffusers."""
        return steps - int(steps - min(steps * self.strength, steps))


def upsample(
    models: Models,
    image: Image.Image,
    how: Upsampling,
    *,
    text: Tensor,
    pooled: Tensor,
    noise: Tensor,
    steps: int,
    guidance: float,
    after: AfterStep = go_on,
) -> Tensor:
    """The enlarged image as (3, h, w) pixels in -1..1. text, pooled: of its prompt, for one sample;
    noise: (n, 64) tokens for `how.size` of the image."""
    size = how.size(*image.size)
    enlarged = grid.to_pixels(image.resize(size, Image.Resampling.LANCZOS))
    taken = how.steps(steps)
    if not taken:
        return enlarged
    clean = grid.pack(models.encode_pixels(enlarged[None]))
    times = models.times(steps, clean.shape[1])[steps - taken :].to(clean.device)
    noisy = flow.interpolate(clean.float(), noise[None].to(clean.device), times[:1])
    given = Conditions(latents=hidden_whole(models, size), text=text, pooled=pooled)
    velocity = velocity_of(models, given, guidance=guidance, steps=taken)
    (latent,) = grid.unpack(denoise(velocity, noisy, times, after=after), [size[::-1]])
    return models.decode_latents(latent)[0]


def hidden_whole(models: Models, size: tuple[int, int]) -> grid.Latents:
    """One image of (width, height) of which nothing is seen, as FLUX.1-Fill is shown it."""
    width, height = size
    seen = grid.pack(models.encode_pixels(torch.zeros(1, 3, height, width)))
    ids = grid.position_ids([(height, width)])
    ids[:, 0] = 0  # no row of a grid
    mask = grid.pack_mask(torch.ones(1, 1, height, width)).to(seen)
    return grid.Latents(clean=seen, seen=seen, mask=mask, ids=ids.to(seen.device))


def each(
    how: Upsampling | Sequence[Upsampling | None] | None, targets: int
) -> tuple[Upsampling | None, ...]:
    """One for every target. Raises `UserError` where a sequence has another length."""
    if how is None or isinstance(how, Upsampling):
        return (how,) * targets
    if len(how) != targets:
        raise UserError(f"upsampling: {len(how)} settings for {targets} targets; give one each")
    return tuple(how)
