"""What the pipeline gives back: images, latents, arrays, and records of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from visualcloze_deft.errors import UserError
from visualcloze_deft.grids import grid
from visualcloze_deft.inference.batching import Job

OutputType = Literal["pil", "pt", "np", "latent"]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One completion of one grid.

    grid: its number in the call. images: of the hidden cells, left to right. row: all cells of the
    query row, known ones among them; () for latents.
    """

    grid: int
    seed: int
    images: tuple[Any, ...]
    row: tuple[Any, ...]


class NotFinite(UserError):
    """An image that came out as NaN or infinity. grid: its number in the call; why: in words."""

    def __init__(self, grid: int, seed: int) -> None:
        self.grid = grid
        self.why = (
            f"seed {seed}: the result is not finite, so there is no image; weights that are not, a "
            "scale or a guidance too large, or a precision too narrow do that"
        )
        super().__init__(f"grid {grid + 1}, {self.why}")


class Completed(list[Any]):
    """The generated images: by grid, then by seed, then left to right. answers: the same in
    groups."""

    def __init__(self, answers: Sequence[Answer]) -> None:
        super().__init__(image for answer in answers for image in answer.images)
        self.answers = tuple(answers)

    @property
    def images(self) -> list[Any]:
        """diffusers' name for this list."""
        return list(self)


def check_finite(job: Job, made: Tensor) -> None:
    if not made.isfinite().all():
        raise NotFinite(job.grid, job.seed)


def converted(pixels: Tensor, kind: OutputType) -> Any:
    """A cell (3, h, w) in -1..1 as diffusers' output type says."""
    if kind == "pil":
        return grid.to_image(pixels)
    unit = (pixels.clamp(-1, 1) + 1) / 2
    return unit if kind == "pt" else unit.permute(1, 2, 0).cpu().numpy()
