"""Rectified flow as FLUX is trained: a line from the clean latent (t = 0) to noise (t = 1).

Axes: b batch, n tokens, c channels.
"""

from __future__ import annotations

import math

import torch
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


def earlier(t: Tensor, uniform: Tensor) -> Tensor:
    """(b,) times between t and 1, in 2 of 5 cases 1 itself: where a sampling step to t begins.

    uniform: (b, 2) draws from 0..1.
    """
    between = t + (1 - t) * uniform[:, 0]
    return torch.where(uniform[:, 1] < 0.4, torch.ones_like(t), between)


def velocity_to(clean: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """dx/dt of the straight way from x (b, n, c) at times t (b,) above 0 to `clean` at time 0."""
    return (x - clean) / t[:, None, None]


FLOW = Process(corrupt=interpolate, target=velocity, step=step, rolled_out=velocity_to)


def logit_normal(standard_normal: Tensor) -> Tensor:
    """Training times in 0..1 from normal draws (Esser et al. 2024, section 3.1, m = 0, s = 1)."""
    return torch.sigmoid(standard_normal)


def velocity_error(predicted: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """(b,) mean squared error of each sample; `weight` (b, n) says what each token counts."""
    error = (predicted.float() - target.float()).square().mean(dim=-1)
    return (error * weight).sum(dim=1) / weight.sum(dim=1)


def shift_of(
    tokens: int, *, base: float, maximum: float, base_tokens: int, max_tokens: int
) -> float:
    """FLUX's time shift mu for a sequence of `tokens` image tokens: linear in their number.

    The four constants stand in the scheduler's config (base_shift, max_shift,
    base_image_seq_len, max_image_seq_len).
    """
    slope = (maximum - base) / (max_tokens - base_tokens)
    return base + slope * (tokens - base_tokens)


def shift(t: Tensor, factor: float) -> Tensor:
    """Times moved towards the noise: s t / (1 + (s - 1) t), Esser et al. 2024, equation 23."""
    return factor * t / (1 + (factor - 1) * t)


def schedule(steps: int, mu: float) -> Tensor:
    """(steps + 1,) times from 1 down to 0, shifted by the factor exp(mu).

    >>> schedule(2, 0.0)
    tensor([1.0000, 0.5000, 0.0000])
    """
    t = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return shift(t, math.exp(mu)).float()
