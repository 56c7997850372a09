"""How sampling uses the context of a grid: computed in every step, in some, or once.

Axes: b batch, n tokens, m tokens of targets, c channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from visualcloze_deft.backbones.base import ContextCache, Latents, Seen
from visualcloze_deft.diffusion import flow


@dataclass(frozen=True, kw_only=True)
class Context:
    """What the tokens of examples, known cells and text are to a sampling.

    seen: what they see; unless all, they are computed once. full_steps: in how many steps all
    tokens are computed; in the others targets attend to what such a step kept. None: in all.
    """

    seen: Seen = "full"
    full_steps: int | None = None

    def cached(self, steps: int) -> bool:
        """Whether some of `steps` steps compute targets alone."""
        return self.once or (self.full_steps is not None and self.full_steps < steps)

    @property
    def once(self) -> bool:
        """Whether context is computed once, before the first step."""
        return self.seen != "full"


FULL = Context()


def full_steps_of(count: int, times: Sequence[float]) -> frozenset[int]:
    """The numbers of `count` steps that compute all tokens: the first, and those nearest to times
    that are evenly spaced. times: of all steps, from 1 down.

    >>> sorted(full_steps_of(3, [1, 0.9, 0.8, 0.7, 0.6, 0.3]))
    [0, 3, 5]
    """
    chosen = [0]
    for k in range(1, count):
        left = range(chosen[-1] + 1, len(times) - (count - 1 - k))
        wanted = 1 - k / count
        chosen.append(min(left, key=lambda step: abs(times[step] - wanted)))
    return frozenset(chosen)


class ContextPredictor:
    """The denoiser as a function of noisy tokens (b, n, c) and one time, with a cached context."""

    def __init__(
        self, cache: ContextCache, latents: Latents, context: Context, *, times: Sequence[float]
    ) -> None:
        """times: of all steps."""
        self.cache = cache
        self.latents = latents
        self.full = (
            frozenset[int]() if context.once else full_steps_of(context.full_steps or 1, times)
        )
        self.asked = 0

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        times = t.expand(len(x))
        number, self.asked = self.asked, self.asked + 1
        if number in self.full:
            return self.cache.full(x, times).float()
        straight = flow.velocity_to(self.latents.clean.float(), x, times)
        return with_targets(straight, self.cache.active(x, times), self.cache.targets)


def with_targets(all_tokens: Tensor, predicted: Tensor, targets: Tensor) -> Tensor:
    """(b, n, c), of which the tokens at `targets` (m,) are those of `predicted` (b, m, c)."""
    return all_tokens.index_copy(1, targets, predicted.to(all_tokens))
