"""Upsampling as VisualCloze does it: an image enlarged, noised in part, denoised by FLUX.1-Fill.

SDEdit (Meng et al. 2022, arXiv 2108.01073) with the same model, the whole image hidden. Strengths,
ids (row 0) and the grey that a hidden image shows are those of diffusers' FluxFillPipeline.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from PIL import Image
from torch import Tensor

from visualcloze_deft.backbones.flux_fill import packing
from visualcloze_deft.backbones.flux_fill.model import Models
from visualcloze_deft.backbones.flux_fill.packing import FluxText
from visualcloze_deft.config.numbers import is_number, is_whole
from visualcloze_deft.diffusion import flow
from visualcloze_deft.errors import UserError
from visualcloze_deft.grids import grid
from visualcloze_deft.grids.cell_sizes import CELL_STEP
from visualcloze_deft.images.reading import LIMIT
from visualcloze_deft.sampling.denoising import AfterStep, Conditions, denoise, go_on, predictor
from visualcloze_deft.storage.text_files import brief

STRENGTH = 0.4  # VisualCloze's
LARGEST = 64  # times each side


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
        if not (is_number(self.strength) and 0 <= self.strength <= 1):
            raise UserError(f"strength {brief(self.strength)}: give a number from 0 to 1")
        if not (is_number(self.scale) and 0 < self.scale <= LARGEST):
            raise UserError(
                f"upsampling scale {brief(self.scale)}: give a number above 0 and up to {LARGEST}, "
                "e.g. 2"
            )
        for name, side in (("width", self.width), ("height", self.height)):
            if side is not None and not (is_whole(side) and CELL_STEP <= side <= LIMIT):
                raise UserError(
                    f"upsampling {name} {brief(side)}: give {CELL_STEP} pixels or more, and less "
                    f"than {LIMIT // 10**6} million"
                )

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
    text: FluxText,
    draw: torch.Generator,
    steps: int,
    guidance: float,
    after: AfterStep = go_on,
) -> Tensor:
    """The enlarged image as (3, h, w) pixels in -1..1; `how.steps(steps)` must be 1 or more.

    text: of its prompt, for one sample. draw: makes its noise.
    """
    size, taken = how.size(*image.size), how.steps(steps)
    enlarged = enlarge(image, how)
    alone = replace(models, encodings=None)  # an image just made is never asked for again
    clean = packing.pack(alone.encode_pixels(enlarged[None]))
    times = models.times(steps, clean.shape[1])[steps - taken :].to(clean.device)
    channels, high, wide = packing.unpack(clean, [size[::-1]])[0].shape[1:]
    noise = torch.randn(1, channels, high, wide, generator=draw, device=draw.device)
    noisy = flow.interpolate(clean.float(), packing.pack(noise).to(clean.device), times[:1])
    given = Conditions(latents=hidden_whole(models, size), text=text)
    predict = predictor(models, given, guidance=guidance, steps=taken)
    (latent,) = packing.unpack(denoise(predict, noisy, times, after=after), [size[::-1]])
    return models.decode_latents(latent)[0]


def enlarge(image: Image.Image, how: Upsampling) -> Tensor:
    """The image at its new size as (3, h, w) pixels in -1..1, without the model."""
    return grid.to_pixels(image.resize(how.size(*image.size), Image.Resampling.LANCZOS))


def hidden_whole(models: Models, size: tuple[int, int]) -> packing.Latents:
    """One image of (width, height) of which nothing is seen, as FLUX.1-Fill is shown it."""
    width, height = size
    seen = packing.pack(models.encode_pixels(torch.zeros(1, 3, height, width)))
    ids = packing.position_ids([(height, width)])
    ids[:, 0] = 0  # no row of a grid
    mask = packing.pack_mask(torch.ones(1, 1, height, width)).to(seen)
    return packing.Latents(clean=seen, seen=seen, mask=mask, ids=ids.to(seen.device))


Enlarging = Upsampling | float  # a number is a scale


def each(
    how: Enlarging | Sequence[Enlarging | None] | None, targets: int
) -> tuple[Upsampling | None, ...]:
    """One for every target. Raises `UserError` where a sequence has another length."""
    if not isinstance(how, list | tuple):
        return (as_upsampling(how),) * targets
    if len(how) != targets:
        raise UserError(f"upsampling: {len(how)} settings for {targets} targets; give one each")
    return tuple(as_upsampling(one) for one in how)


def as_upsampling(how: object) -> Upsampling | None:
    """What one target is enlarged by: settings, a number that is the scale, or None.

    >>> as_upsampling(2).scale
    2
    """
    if how is None or isinstance(how, Upsampling):
        return how
    if not is_number(how):
        raise UserError(
            f"upsampling {brief(how)}: expected Upsampling(...), a number as the scale, or None"
        )
    return Upsampling(scale=how)
