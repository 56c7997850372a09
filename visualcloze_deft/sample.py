"""Sampling: a grid with holes to the images that fill them.

Axes: b batch, n tokens, c channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from PIL import Image
from torch import Tensor

from visualcloze_deft import grid
from visualcloze_deft.batch import encode_grids
from visualcloze_deft.models import Models, predict_velocity
from visualcloze_deft.prompt import Prompt

GUIDANCE = 30.0  # VisualCloze's sampling setting, as is the number of steps
STEPS = 30


def denoise(
    velocity: Callable[[Tensor, Tensor], Tensor],
    noise: Tensor,
    times: Tensor,
    *,
    step: Callable[[], object] = lambda: None,
) -> Tensor:
    """Euler from x at times[0], 1 for pure noise, to the image at times[-1] = 0; `step` is told
    of each."""
    x = noise
    for now, after in pairwise(times):
        x = x + (after - now) * velocity(x, now)
        step()
    return x


def velocity_of(
    models: Models, latents: grid.Latents, text: Tensor, pooled: Tensor, *, guidance: float
) -> Callable[[Tensor, Tensor], Tensor]:
    """The transformer as a function of noisy tokens (b, n, 64) and one time in 0..1."""

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return predict_velocity(
            models.transformer,
            latents.inputs(x),
            t.expand(len(x)),
            ids=latents.ids,
            text=text,
            pooled=pooled,
            guidance=guidance,
        ).float()

    return velocity


@torch.no_grad()  # not inference_mode: under ZeRO-3 training goes on with what is gathered here
def generate(
    models: Models,
    grids: Sequence[grid.Grid],
    prompts: Sequence[Prompt | str],
    *,
    seeds: Sequence[int],
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    step: Callable[[], object] = lambda: None,
) -> list[list[Image.Image]]:
    """The images of each grid's hidden cells, left to right; all grids must have one shape.

    Noise is drawn on the CPU from each grid's own seed, so that neither the batch nor the device
    decides what an image shows.
    """
    latents = encode_grids(models, grids, clean=False)
    text, pooled = models.encode_text(prompts)
    draws = [torch.Generator().manual_seed(seed) for seed in seeds]
    noise = torch.stack([torch.randn(latents.seen.shape[1:], generator=draw) for draw in draws])
    noise = noise.to(latents.seen.device)
    times = models.times(steps, noise.shape[1]).to(noise.device)
    velocity = velocity_of(models, latents, text, pooled, guidance=guidance)
    final = denoise(velocity, noise, times, step=step)
    query = models.decode_latents(grid.unpack(final, grids[0].shape)[-1])
    return [hidden_cells(pixels, g) for pixels, g in zip(query, grids, strict=True)]


def hidden_cells(pixels: Tensor, built: grid.Grid) -> list[Image.Image]:
    """The hidden cells of a decoded (3, h, w) query strip as images."""
    widths = built.widths[-1]
    pairs = zip(grid.cells(pixels, widths), grid.cells(built.hidden[-1], widths), strict=True)
    return [grid.to_image(cell) for cell, hidden in pairs if hidden.any()]
