"""What noise does to clean latents, what a network learns of it, and how a sampling step undoes it.

Axes: b batch, n tokens, c channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

Rolled = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Process:
    """A family's diffusion process, over times from 1, pure noise, to 0, clean latents.

    corrupt: (clean, noise, t) to noisy latents. target: (clean, noise, t) to what is predicted.
    step: (x, prediction, now, then) to x at the earlier time `then`. rolled_out: (clean, x, t) to
    the target of a sample that a step of the model's own led to x; None where the process has no
    scheduled sampling. Latents are (b, n, c), times (b,) or one time.
    """

    corrupt: Callable[[Tensor, Tensor, Tensor], Tensor]
    target: Callable[[Tensor, Tensor, Tensor], Tensor]
    step: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    rolled_out: Rolled | None = None
