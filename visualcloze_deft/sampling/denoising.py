"""Sampling: a grid with holes to the images that fill them.

Axes: b batch, n tokens, l text tokens, d text width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise

import torch
from PIL import Image
from torch import Tensor

from visualcloze_deft.backbones.flux_fill.model import Models, predict_velocity
from visualcloze_deft.grids import grid
from visualcloze_deft.grids.prompt import Prompt
from visualcloze_deft.sampling.encoding import encode_grids

GUIDANCE = 30.0  # VisualCloze's sampling setting, as is the number of steps
STEPS = 30

AfterStep = Callable[[int, Tensor, Tensor], Tensor]
"""Told (number of the step from 0, its time, what it led to); returns what to go on with."""


def go_on(_: int, __: Tensor, x: Tensor) -> Tensor:
    return x


def denoise(
    velocity: Callable[[Tensor, Tensor], Tensor],
    noise: Tensor,
    times: Tensor,
    *,
    after: AfterStep = go_on,
) -> Tensor:
    """Euler from x at times[0], 1 for pure noise, to the image at times[-1] = 0."""
    x = noise
    for number, (now, then) in enumerate(pairwise(times)):
        x = after(number, now, x + (then - now) * velocity(x, now))
    return x


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """What samples of one shape are generated from. text: (b, l, d); pooled: (b, d)."""

    latents: grid.Latents
    text: Tensor
    pooled: Tensor


def velocity_of(
    models: Models, given: Conditions, *, guidance: float, steps: int = 0
) -> Callable[[Tensor, Tensor], Tensor]:
    """The transformer as a function of noisy tokens (b, n, 64) and one time in 0..1.

    steps: how often it will be asked, for what diffusers' step caches do at certain steps.
    """
    transformer, asked = models.transformer, 0
    cached = transformer.is_cache_enabled
    if cached:
        transformer._reset_stateful_cache()  # of the sample before

    def at_step(t: Tensor) -> AbstractContextManager[object]:
        if not cached:
            return nullcontext()
        where = {"step_index": asked, "num_inference_steps": steps, "sigma": float(t)}
        context: AbstractContextManager[object] = transformer.cache_context("cond", **where)
        return context

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        nonlocal asked
        with at_step(t):
            predicted = predict_velocity(
                transformer,
                given.latents.inputs(x),
                t.expand(len(x)),
                ids=given.latents.ids,
                text=given.text,
                pooled=given.pooled,
                guidance=guidance,
            )
        asked += 1
        return predicted.float()

    return velocity


def draw_of(seed: int) -> torch.Generator:
    """What draws an image's noise, from its seed alone and on the CPU: neither the batch nor the
    device decides what it shows."""
    return torch.Generator().manual_seed(seed)


def generate(
    models: Models,
    grids: Sequence[grid.Grid],
    prompts: Sequence[Prompt | str],
    *,
    seeds: Sequence[int],
    steps: int = STEPS,
    guidance: float = GUIDANCE,
) -> list[list[Image.Image]]:
    """The images of each grid's hidden cells, left to right; all grids must have one shape."""
    given = conditions_of(models, grids, prompts)
    return pictures_of(
        models, tokens_of(models, given, seeds=seeds, steps=steps, guidance=guidance), grids
    )


def conditions_of(
    models: Models, grids: Sequence[grid.Grid], prompts: Sequence[Prompt | str]
) -> Conditions:
    """What the encoders make of grids of one shape; the transformer is not called."""
    text, pooled = models.encode_text(prompts)
    return Conditions(latents=encode_grids(models, grids, clean=False), text=text, pooled=pooled)


@torch.no_grad()  # not inference_mode: under ZeRO-3 training goes on with what is gathered here
def tokens_of(
    models: Models, given: Conditions, *, seeds: Sequence[int], steps: int, guidance: float
) -> Tensor:
    """The (b, n, 64) clean tokens that the transformer makes."""
    seen = given.latents.seen
    noise = torch.stack([torch.randn(seen.shape[1:], generator=draw_of(seed)) for seed in seeds])
    noise = noise.to(seen.device)
    times = models.times(steps, noise.shape[1]).to(noise.device)
    return denoise(velocity_of(models, given, guidance=guidance, steps=steps), noise, times)


def pictures_of(
    models: Models, tokens: Tensor, grids: Sequence[grid.Grid]
) -> list[list[Image.Image]]:
    """The images of each grid's hidden cells in its (b, n, 64) clean tokens, left to right. Only
    the query's strip is decoded."""
    query = models.decode_latents(grid.unpack(tokens, grids[0].shape)[-1])
    return [
        [grid.to_image(cell) for cell in hidden_cells(pixels, g)]
        for pixels, g in zip(query, grids, strict=True)
    ]


def hidden_cells(pixels: Tensor, built: grid.Grid) -> list[Tensor]:
    """The hidden cells of a decoded (3, h, w) query strip."""
    widths = built.widths[-1]
    pairs = zip(grid.cells(pixels, widths), grid.cells(built.hidden[-1], widths), strict=True)
    return [cell for cell, hidden in pairs if hidden.any()]
