"""Examples completed by a model, and the pictures that they hide."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from visualcloze_deft.backbones.base import Models
from visualcloze_deft.data.example import Example
from visualcloze_deft.grids import grid
from visualcloze_deft.grids.cell_sizes import by_shape
from visualcloze_deft.sampling.context import FULL, Context
from visualcloze_deft.sampling.denoising import generate


def complete_examples(
    models: Models,
    examples: Sequence[Example],
    *,
    steps: int,
    batch: int,
    context: Context = FULL,
) -> list[list[Image.Image]]:
    """What a model makes of each example's hidden cells; its index is the seed of its noise.

    batch: grids of one shape, with the same hidden cells, that are made together.
    """
    built = [grid.join(example.complete, hidden=example.hidden) for example in examples]
    made: dict[int, list[Image.Image]] = {}
    for places in by_shape([(one.shape, e.hidden) for one, e in zip(built, examples, strict=True)]):
        for first in range(0, len(places), batch):
            some = places[first : first + batch]
            images = generate(
                models,
                [built[k] for k in some],
                [examples[k].prompt for k in some],
                seeds=[examples[k].index for k in some],
                steps=steps,
                context=context,
            )
            made |= dict(zip(some, images, strict=True))
    return [made[k] for k in range(len(examples))]


def truths_of(example: Example) -> list[Image.Image]:
    """The pictures that an example hides, left to right."""
    cells = zip(example.complete[-1], example.hidden, strict=True)
    return [image for image, hidden in cells if hidden]
