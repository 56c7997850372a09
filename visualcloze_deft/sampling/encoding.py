"""From drawn examples to what a denoiser reads: encoded, noised, grouped by grid shape.

Axes: b batch, n tokens, c channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from visualcloze_deft.backbones.base import Encoders, Latents, Seen, Text
from visualcloze_deft.config.run_settings import ContextMode, Times
from visualcloze_deft.data.example import Example, Skipped
from visualcloze_deft.diffusion import timesteps
from visualcloze_deft.grids import grid
from visualcloze_deft.grids.cell_sizes import by_shape
from visualcloze_deft.grids.prompt import Prompt
from visualcloze_deft.sampling.denoising import task_text

NEAREST = (
    0.1  # time below which no sample is a scheduled_sampling: an error there would be divided by t
)
SEEN = get_args(Seen)
ISOLATED = 0.7  # share of the examples of a "mixed" run whose context is isolated


@dataclass(frozen=True, kw_only=True)
class PixelExample:
    """One example in pixels, ready to be encoded."""

    index: int
    task: str
    grid: grid.Grid
    prompt: Prompt
    skipped: tuple[Skipped, ...] = ()


@dataclass(frozen=True, kw_only=True)
class TokenBatch:
    """Samples of one grid shape. noise: (b, n, c); t, start: (b,). Where start is above t, the
    sample is a step of the model's own from there. seen: what context sees; unless all, targets are
    at the same places. task: see `Conditions`. filler: whether it is there for its calls alone."""

    indices: tuple[int, ...]
    latents: Latents
    noise: Tensor
    t: Tensor
    start: Tensor
    text: Text
    task: Text | None = None
    seen: Seen = "full"
    filler: bool = False

    def some(self, places: Tensor) -> TokenBatch:
        """The samples at `places`, a tensor of whole numbers."""
        chosen = places.tolist()
        return TokenBatch(
            indices=tuple(self.indices[k] for k in chosen),
            latents=self.latents.some(chosen),
            noise=self.noise[places],
            t=self.t[places],
            start=self.start[places],
            text=self.text.some(chosen),
            task=self.task and self.task.some(chosen),
            seen=self.seen,
        )


def in_pixels(example: Example) -> PixelExample:
    """An example in pixels."""
    return PixelExample(
        index=example.index,
        task=example.task,
        grid=grid.join(example.complete, hidden=example.hidden),
        prompt=example.prompt,
        skipped=example.skipped,
    )


def encode(
    models: Encoders,
    drawn: Sequence[PixelExample],
    *,
    seed: int,
    times: Times = "logit-normal",
    timestep_shift: float = 1.0,
    scheduled_sampling: float = 0.0,
    context: ContextMode = "full",
) -> list[TokenBatch]:
    """Encode a batch. Noise, times and context of example i are a function of (seed, i) alone.

    scheduled_sampling: how often a sample starts as a step of the model's own. context: what is
    known sees. See `Run` for both.
    """
    text = models.encode_text([d.prompt for d in drawn])
    groups = []
    seen = [seen_of(context, seed, d.index) for d in drawn]
    task = task_text(models, [d.prompt for d in drawn], "causal") if "causal" in seen else None
    kinds = [
        (d.grid.shape, own, None if own == "full" else hidden(d))
        for d, own in zip(drawn, seen, strict=True)
    ]
    for members in by_shape(kinds):
        latents = models.encode_grids([drawn[k].grid for k in members], clean=True)
        noise, t, uniform = zip(
            *(draw_noise(latents.clean.shape[1:], seed, drawn[k].index, times) for k in members),
            strict=True,
        )
        at, ways = timesteps.shift(torch.stack(t), timestep_shift), torch.stack(uniform)
        own = (ways[:, 0] < scheduled_sampling) & (at > NEAREST)
        start = torch.where(own, timesteps.earlier(at, ways[:, 1:]), at)
        groups.append(
            TokenBatch(
                indices=tuple(drawn[k].index for k in members),
                latents=latents,
                noise=torch.stack(noise).to(latents.clean),
                t=at.to(latents.clean.device),
                start=start.to(latents.clean.device),
                text=text.some(members),
                task=task and task.some(members),
                seen=seen[members[0]],
            )
        )
    return groups


def draw_noise(
    shape: Sequence[int], seed: int, index: int, times: Times
) -> tuple[Tensor, Tensor, Tensor]:
    """Standard normal noise of `shape`, a time in 0..1 and three draws from 0..1 for
    `scheduled_sampling`, from (seed, index) alone."""
    state = np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0]
    generator = torch.Generator().manual_seed(int(state >> 1))
    noise = torch.randn(tuple(shape), generator=generator)
    t = timesteps.draw_time(times, generator)
    return noise, t, torch.rand(3, generator=generator)


def seen_of(context: ContextMode, seed: int, index: int) -> Seen:
    """What the context of example `index` sees."""
    if context != "mixed":
        return context
    draw = np.random.default_rng([seed, index, *b"context"]).random()
    return "isolated" if draw < ISOLATED else "full"


def hidden(drawn: PixelExample) -> tuple[bool, ...]:
    """Which cells of the last row are generated."""
    cells = grid.cells(drawn.grid.hidden[-1], drawn.grid.widths[-1])
    return tuple(bool(cell.any()) for cell in cells)


def kinds_in(groups: Sequence[TokenBatch]) -> tuple[int, ...]:
    """How many groups have each kind of context, in the order of `SEEN`."""
    return tuple(sum(group.seen == kind for group in groups) for kind in SEEN)


def filled(groups: Sequence[TokenBatch], counts: Sequence[int]) -> list[TokenBatch]:
    """`groups`, and the first sample as a filler as often as groups of a kind are missing to these
    counts, see `kinds_in`; kind after kind."""
    one = replace(groups[0].some(torch.zeros(1, dtype=torch.long)), filler=True)
    missing = [
        replace(one, seen=kind)
        for kind, own, wanted in zip(SEEN, kinds_in(groups), counts, strict=True)
        for _ in range(wanted - own)
    ]
    return sorted([*groups, *missing], key=lambda group: SEEN.index(group.seen))
