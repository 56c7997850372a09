"""The learning rate and the decay of the running average, step by step."""

from __future__ import annotations

import math

from visualcloze_deft.config.run_settings import Optimiser


def learning_rate_factor(step: int, steps: int, settings: Optimiser) -> float:
    """Linear warm-up, then constant or a cosine down to zero at the last step.

    >>> from visualcloze_deft.config.run_settings import Optimiser
    >>> [round(learning_rate_factor(s, 100, Optimiser(warmup=10)), 2) for s in (0, 9, 55, 99)]
    [0.1, 1.0, 0.5, 0.0]
    """
    warmup = settings.warmup_of(steps)
    if step < warmup:
        return (step + 1) / warmup
    if settings.schedule == "constant":
        return 1.0
    done = (step - warmup) / max(steps - warmup, 1)
    return 0.5 * (1 + math.cos(math.pi * done))


def averaging_factor(step: int, ema: float) -> float:
    """How much of the running average stays at a step: `ema`, and less of the first steps.

    >>> [round(averaging_factor(step, 0.99), 2) for step in (1, 10, 1000)]
    [0.18, 0.55, 0.99]
    """
    return min(ema, (1 + step) / (10 + step))
