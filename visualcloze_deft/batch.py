"""From drawn examples to what the transformer reads: encoded, noised, grouped by grid shape.

Axes: b batch, n tokens, l text tokens, d text width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from visualcloze_deft import flow, grid
from visualcloze_deft.data.mixture import Example, Mixture, Skipped
from visualcloze_deft.errors import REFUSED, UserError, refusal
from visualcloze_deft.models import Encoders
from visualcloze_deft.plan import Plan
from visualcloze_deft.prompt import Prompt
from visualcloze_deft.settings import Times

NEAREST = 0.1  # time below which no sample is a rollout: an error there would be divided by t


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """One example in pixels, ready to be encoded."""

    index: int
    task: str
    grid: grid.Grid
    prompt: Prompt
    skipped: tuple[Skipped, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Group:
    """Samples of one grid shape. noise: (b, n, 64); t, start: (b,); text: (b, l, d);
    pooled: (b, d). Where start is above t, the sample is a step of the model's own from there."""

    indices: tuple[int, ...]
    tasks: tuple[str, ...]
    latents: grid.Latents
    noise: Tensor
    t: Tensor
    start: Tensor
    text: Tensor
    pooled: Tensor

    def some(self, places: Tensor) -> Group:
        """The samples at `places`, a tensor of whole numbers."""
        chosen = places.tolist()
        return Group(
            indices=tuple(self.indices[k] for k in chosen),
            tasks=tuple(self.tasks[k] for k in chosen),
            latents=self.latents.some(chosen),
            noise=self.noise[places],
            t=self.t[places],
            start=self.start[places],
            text=self.text[places],
            pooled=self.pooled[places],
        )


class Draws(Dataset[Drawn | UserError]):
    """A mixture's examples in pixels: what reading processes compute.

    A mistake in the data comes back as a value: raised in another process, it would arrive
    wrapped in that process's traceback.
    """

    def __init__(self, mixture: Mixture) -> None:
        self.mixture = mixture

    def __getitem__(self, index: int) -> Drawn | UserError:
        try:
            return in_pixels(self.mixture[index])
        except UserError as error:
            return error
        except REFUSED as error:
            return UserError(refusal(error))


def in_pixels(example: Example) -> Drawn:
    """An example in pixels."""
    return Drawn(
        index=example.index,
        task=example.task,
        grid=grid.join(example.complete, hidden=example.hidden),
        prompt=example.prompt,
        skipped=example.skipped,
    )


class Own:
    """The index lists of one process, part after part, as a `DataLoader` reads them."""

    def __init__(self, plan: Plan, *, first: int, steps: int, rank: int) -> None:
        self.plan = plan
        self.first = first
        self.steps = steps
        self.rank = rank

    def __iter__(self) -> Iterator[list[int]]:
        for step in islice(self.plan.steps(self.first), self.steps):
            for part in step.parts[self.rank :: self.plan.world]:
                yield list(part)


def encode_grids(
    models: Encoders,
    grids: Sequence[grid.Grid],
    *,
    clean: bool,
    draws: Sequence[torch.Generator] | None = None,
) -> grid.Latents:
    """Grids of one shape to tokens. Without `clean`, the complete strips are not encoded: where
    they are not known (inference), `Latents.clean` is what is seen. draws: one for each grid, to
    draw what is seen from the encoder's distribution; its mode by default."""
    shape = grids[0].shape
    seen, complete, mask = [], [], []
    for row in range(len(shape)):
        shown = torch.stack([g.seen[row] for g in grids])
        hidden = torch.stack([g.hidden[row] for g in grids])
        seen.append(grid.pack(models.encode_pixels(shown, draws)))
        mask.append(grid.pack_mask(hidden.to(seen[-1])))
        if clean and hidden.any():
            strips = torch.stack([g.strips[row] for g in grids])
            complete.append(grid.pack(models.encode_pixels(strips)))
        else:
            complete.append(seen[-1])
    return grid.Latents(
        clean=torch.cat(complete, dim=1),
        seen=torch.cat(seen, dim=1),
        mask=torch.cat(mask, dim=1),
        ids=grid.position_ids(shape).to(seen[0].device),
    )


def encode(
    models: Encoders,
    drawn: Sequence[Drawn],
    *,
    seed: int,
    times: Times = "logit-normal",
    time_shift: float = 1.0,
    rollout: float = 0.0,
) -> list[Group]:
    """Encode a batch. Noise and times of example i are a function of (seed, i) alone.

    rollout: how often a sample starts as a step of the model's own, see `settings.Run`.
    """
    text, pooled = models.encode_text([d.prompt for d in drawn])
    places: dict[tuple[tuple[int, int], ...], list[int]] = {}
    for place, d in enumerate(drawn):
        places.setdefault(d.grid.shape, []).append(place)
    groups = []
    for members in places.values():
        latents = encode_grids(models, [drawn[k].grid for k in members], clean=True)
        noise, t, uniform = zip(
            *(draw_noise(latents.clean.shape[1:], seed, drawn[k].index, times) for k in members),
            strict=True,
        )
        at, ways = flow.shift(torch.stack(t), time_shift), torch.stack(uniform)
        own = (ways[:, 0] < rollout) & (at > NEAREST)
        start = torch.where(own, flow.earlier(at, ways[:, 1:]), at)
        groups.append(
            Group(
                indices=tuple(drawn[k].index for k in members),
                tasks=tuple(drawn[k].task for k in members),
                latents=latents,
                noise=torch.stack(noise).to(latents.clean),
                t=at.to(latents.clean.device),
                start=start.to(latents.clean.device),
                text=text[members],
                pooled=pooled[members],
            )
        )
    return groups


def draw_noise(
    shape: Sequence[int], seed: int, index: int, times: Times
) -> tuple[Tensor, Tensor, Tensor]:
    """Standard normal noise of `shape`, a time in 0..1 and three draws from 0..1 for `rollout`,
    from (seed, index) alone."""
    state = np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0]
    generator = torch.Generator().manual_seed(int(state >> 1))
    noise = torch.randn(tuple(shape), generator=generator)
    if times == "uniform":
        t = torch.rand((), generator=generator)
    else:
        t = flow.logit_normal(torch.randn((), generator=generator))
    return noise, t, torch.rand(3, generator=generator)
