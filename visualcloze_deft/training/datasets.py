"""What a training process reads: examples in pixels, and which of them are its own."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from torch.utils.data import Dataset

from visualcloze_deft.data.mixture import Mixture
from visualcloze_deft.errors import REFUSED, UserError, refusal
from visualcloze_deft.sampling.encoding import PixelExample, in_pixels
from visualcloze_deft.training.batch_schedule import BatchSchedule


class PixelDataset(Dataset[PixelExample | UserError]):
    """A mixture's examples in pixels: what reading processes compute.

    A mistake in the data comes back as a value: raised in another process, it would arrive
    wrapped in that process's traceback.
    """

    def __init__(self, mixture: Mixture) -> None:
        self.mixture = mixture

    def __getitem__(self, index: int) -> PixelExample | UserError:
        try:
            return in_pixels(self.mixture[index])
        except UserError as error:
            return error
        except REFUSED as error:
            return UserError(refusal(error))


class RankBatchSampler:
    """The index lists of one process, part after part, as a `DataLoader` reads them."""

    def __init__(self, plan: BatchSchedule, *, first: int, steps: int, rank: int) -> None:
        self.plan = plan
        self.first = first
        self.steps = steps
        self.rank = rank

    def __iter__(self) -> Iterator[list[int]]:
        for step in islice(self.plan.steps(self.first), self.steps):
            for part in step.parts[self.rank :: self.plan.world]:
                yield list(part)
