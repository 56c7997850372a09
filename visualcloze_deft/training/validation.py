"""The loss on grids that are never trained on: every time the same grids, noise and times.

Nothing here draws from a process's generators, so that a run trains alike with and without it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

import torch
from torch import Tensor, nn

from visualcloze_deft.backbones.base import Models
from visualcloze_deft.config.run_settings import Run
from visualcloze_deft.diffusion import timesteps
from visualcloze_deft.errors import UserError
from visualcloze_deft.sampling.encoding import PixelExample, TokenBatch, encode
from visualcloze_deft.training.datasets import PixelDataset

QUANTILES = (0.1, 0.3, 0.5, 0.7, 0.9)  # the middles of five equal parts of the training times
FIRST = 20_000_003  # index of the first held-out grid: its noise is none that training draws


@dataclass(frozen=True, kw_only=True)
class ValidationLosses:
    """A held-out grid's task, and its loss at each of `times_of`."""

    task: str
    errors: tuple[float, ...]

    @property
    def error(self) -> float:
        return sum(self.errors) / len(self.errors)


def times_of(run: Run) -> Tensor:
    """(5,) the `QUANTILES` of the times that training draws: their mean loss is near that over all.

    >>> times_of(Run(timestep_sampling="uniform"))
    tensor([0.1000, 0.3000, 0.5000, 0.7000, 0.9000])
    """
    drawn = torch.tensor(QUANTILES)
    if run.timestep_sampling == "logit-normal":
        drawn = timesteps.logit_normal(torch.tensor([NormalDist().inv_cdf(q) for q in QUANTILES]))
    return timesteps.shift(drawn, run.timestep_shift)


def why_training_is_higher(run: Run) -> str:
    """Why the training loss of this run may stand above its validation loss, in a sentence."""
    reasons = []
    if run.scheduled_sampling:
        reasons.append(
            f"up to {run.scheduled_sampling:.0%} of its samples start from a step of the model's "
            "own (scheduled_sampling)"
        )
    if run.adapter.dropout:
        reasons.append(f"{run.adapter.dropout:.0%} dropout is on")
    if run.ema:
        reasons.append("it is of the last weights, not of their average (ema)")
    reasons.append("it draws all times, also the ends of their range, where errors are largest")
    *others, last = reasons
    listed = f"{', '.join(others)}, and {last}" if others else last
    return f"The training loss may stand above the validation loss of the same grids: {listed}."


def share(count: int, *, rank: int, world: int) -> list[int]:
    """The indices of one process's held-out grids, as many for each: some may be seen twice.

    >>> [share(3, rank=rank, world=2) for rank in (0, 1)]
    [[20000003, 20000005], [20000004, 20000003]]
    """
    rounds = -(-count // world)
    return [FIRST + (rank + k * world) % count for k in range(rounds)]


@torch.no_grad()
def losses(
    loss_of: nn.Module,
    models: Models,
    draws: PixelDataset | Mapping[int, PixelExample],
    run: Run,
    *,
    own: Sequence[int],
    agreed: Callable[[Sequence[PixelExample | UserError]], Sequence[PixelExample]],
) -> dict[int, ValidationLosses]:
    """What `loss_of`, a `objective.GridLoss`, gives for the grids `own`, by index.

    Every process calls the transformer equally often, as ZeRO-3 needs, on at most `run.batch`
    samples. agreed: raises what any process found wrong with what it drew.
    """
    times = times_of(run)
    found = {}
    for index in own:
        (drawn,) = agreed([draws[index]])
        (group,) = encode(models, [drawn], seed=run.seed, context=run.context)
        errors = [loss_of([at(group, some)]) for some in times.split(run.batch)]
        found[index] = ValidationLosses(task=drawn.task, errors=tuple(torch.cat(errors).tolist()))
    return found


def at(group: TokenBatch, times: Tensor) -> TokenBatch:
    """The one sample of `group` at each of the (b,) times, with the same noise."""
    copies = group.some(torch.zeros(len(times), dtype=torch.long))
    times = times.to(group.t)
    return replace(copies, t=times, start=times)
