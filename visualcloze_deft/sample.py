"""Sampling: a grid with holes to the images that fill them.

Axes: b batch, n tokens, c channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from PIL import Image
from torch import Tensor

from visualcloze_deft import grid
from visualcloze_deft.batch import encode_grids
from visualcloze_deft.models import Models

GUIDANCE = 30.0  # VisualCloze's sampling setting, as is the number of steps
STEPS = 30


def denoise(
    velocity: Callable[[Tensor, Tensor], Tensor],
    noise: Tensor,
    times: Tensor,
    *,
    step: Callable[[], object] = lambda: None,
) -> Tensor:
    """Euler from noise at times[0] = 1 to the image at times[-1] = 0; `step` is told of each."""
    x = noise
    for now, after in zip(times[:-1], times[1:], strict=True):
        x = x + (after - now) * velocity(x, now)
        step()
    return x


@torch.inference_mode()
def generate(
    models: Models,
    grids: Sequence[grid.Grid],
    prompts: Sequence[str],
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
    transformer = models.transformer
    latents = encode_grids(models, grids, clean=False)
    text, pooled = models.encode_text(prompts)
    noise = torch.stack(
        [
            torch.randn(latents.seen.shape[1:], generator=torch.Generator().manual_seed(seed))
            for seed in seeds
        ]
    ).to(latents.seen)
    times = models.times(steps, noise.shape[1]).to(noise.device)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        predicted: Tensor = transformer(
            hidden_states=latents.inputs(x).to(transformer.dtype),
            timestep=t.expand(len(x)).to(transformer.dtype),
            guidance=torch.full((len(x),), guidance, device=x.device),
            pooled_projections=pooled,
            encoder_hidden_states=text,
            txt_ids=torch.zeros(text.shape[1], 3, device=x.device),
            img_ids=latents.ids,
            return_dict=False,
        )[0]
        return predicted.float()

    final = denoise(velocity, noise.float(), times, step=step)
    query = grid.unpack(final, grids[0].shape)[-1]
    return [
        [
            grid.to_image(cell)
            for cell, hidden in zip(
                grid.cells(pixels, g.widths[-1]), grid.cells(g.hidden[-1], g.widths[-1]), strict=True
            )
            if hidden.any()
        ]
        for pixels, g in zip(models.decode_latents(query), grids, strict=True)
    ]
