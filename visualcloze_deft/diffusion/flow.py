"""Rectified flow as FLUX is trained: a line from the clean latent (t = 0) to noise (t = 1).

Axes: b batch, n tokens, c channels.
"""

from __future__ import annotations

from torch import Tensor

from visualcloze_deft.diffusion.process import Process


def interpolate(clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t = (1 - t) clean + t noise, for (b, n, c) tokens and (b,) times."""
    t = t[:, None, None]
    return (1 - t) * clean + t * noise


def velocity(clean: Tensor, noise: Tensor, t: Tensor | None = None) -> Tensor:
    """dx/dt of the line, what the transformer predicts; the same at all times."""
    return noise - clean


def step(x: Tensor, velocity: Tensor, now: Tensor, then: Tensor) -> Tensor:
    """Euler's: x (b, n, c) at times `now` to x at times `then`, each (b,) or one time."""
    return x + (then - now).view(-1, 1, 1) * velocity


def velocity_to(clean: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """dx/dt of the straight way from x (b, n, c) at times t (b,) above 0 to `clean` at time 0."""
    return (x - clean) / t[:, None, None]


FLOW = Process(corrupt=interpolate, target=velocity, step=step, rolled_out=velocity_to)


def velocity_error(predicted: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """(b,) mean squared error of each sample; `weight` (b, n) says what each token counts."""
    error = (predicted.float() - target.float()).square().mean(dim=-1)
    return (error * weight).sum(dim=1) / weight.sum(dim=1)
