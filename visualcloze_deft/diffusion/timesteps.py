"""The times of rectified flow: drawn in training, spaced in sampling. 1 is pure noise."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor


def draw_time(kind: Literal["uniform", "logit-normal"], generator: torch.Generator) -> Tensor:
    """A training time in 0..1, before it is shifted."""
    if kind == "uniform":
        return torch.rand((), generator=generator)
    return logit_normal(torch.randn((), generator=generator))


def earlier(t: Tensor, uniform: Tensor) -> Tensor:
    """(b,) times between t and 1, in 2 of 5 cases 1 itself: where a sampling step to t begins.

    uniform: (b, 2) draws from 0..1.
    """
    between = t + (1 - t) * uniform[:, 0]
    return torch.where(uniform[:, 1] < 0.4, torch.ones_like(t), between)


def logit_normal(standard_normal: Tensor) -> Tensor:
    """Training times in 0..1 from normal draws (Esser et al. 2024, section 3.1, m = 0, s = 1)."""
    return torch.sigmoid(standard_normal)


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
