"""The node that completes a grid."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from . import host, package
from .loading import Model
from .pictures import image_of
from .previews import CleanEstimate, drawing, query_latent
from .rows import Query, Rows
from .tasks import ChosenTask, tasks_with

MOST_SEED = 2**53 - 1  # that a browser's numbers hold
SHEET_CELL = 512  # pixels of a cell in the contact sheet at most


class Watch:
    """The callback of a call: progress, previews, and the user's wish to end it."""

    def __init__(self, pipe: Any, *, shape: Any, images: int, steps: int, upsampling: int) -> None:
        """shape: of the grids, in pixels. steps, upsampling: sampling steps of the grid and of
        its upsampled images; one image takes both."""
        self.progress = host.Progress(images * (steps + upsampling))
        self.draw = drawing(pipe)
        self.shape, self.steps, self.cycle = shape, steps, steps + upsampling
        self.estimate = CleanEstimate()

    def __call__(
        self, _: Any, __: int, time: Tensor, told: Mapping[str, Tensor]
    ) -> Mapping[str, Tensor]:
        self.progress.step(self._picture(float(time) / 1000, told["latents"]))
        return {}

    def _picture(self, time: float, sample: Tensor) -> Image.Image | None:
        place = self.progress.done % self.cycle
        if self.draw is None or place >= self.steps:  # an upsampled image is shown when it is done
            return None
        if place == 0:
            self.estimate = CleanEstimate()
        clean = self.estimate.after_step(time, sample)
        if place == self.steps - 1:
            clean = sample
        return None if clean is None else self.draw(query_latent(clean, self.shape))


@dataclass(frozen=True, kw_only=True)
class Grids:
    """Grids of one shape, one for each picture of the query's batch, and their words."""

    examples: Rows
    queries: list[list[Image.Image | None]]
    words: Mapping[str, str | None]

    @property
    def targets(self) -> list[int]:
        """The columns, counted from 0, that are generated."""
        return [c for c, image in enumerate(self.queries[0]) if image is None]

    def asked(self) -> list[dict[str, Any]]:
        """The grids as `InContextPipeline.__call__` takes them."""
        return [{"rows": [*self.examples, query], **self.words} for query in self.queries]

    def shape(self, pipe: Any, resolution: int | None) -> Any:
        """(height, width) of each row in pixels."""
        from visualcloze_deft.grids.cell_sizes import strip_shapes

        rows = [*self.examples, self.queries[0]]
        sizes = [[image.size if image else None for image in row] for row in rows]
        return strip_shapes(sizes, resolution or pipe.config.resolution, pipe.config.cells)


def grids_of(
    query: Query, examples: Rows, *, task: ChosenTask | None, tasks: Mapping[str, Any], content: str
) -> Grids:
    """The grids of a query. tasks: the known ones by name, which tell the number of columns.

    Raises `ValueError` for an unknown task, and where nothing tells how many columns there are.
    """
    if task and task.name not in tasks:
        from visualcloze_deft.errors import suggestion

        raise ValueError(
            f"unknown task {task.name!r}: no file in models/vcdeft_tasks or task_folder declares "
            f"it, and no adapter brings it; {suggestion(task.name, tasks)}"
        )
    if examples:
        columns = len(examples[0])
    elif task:
        columns = len(tasks[task.name].roles)
    else:
        columns = max([*query.generate, *query.pictures], default=0)
        if not query.generate:
            raise ValueError(
                "query row: nothing tells the number of columns; connect a task or example rows, "
                "or name the columns to generate"
            )
    words = {
        "task": task.name if task else None,
        "task_prompt": (task.instruction or None) if task else None,
        "content_prompt": content.strip() or None,
    }
    return Grids(examples=examples, queries=query.rows(columns), words=words)


def contact_sheet(examples: Rows, row: list[Image.Image], targets: list[int]) -> Image.Image:
    """The whole grid in one picture, its generated images in red frames."""
    from visualcloze_deft.reporting.contact_sheet import draw_grid

    side = min(max(max(row[c].size) for c in targets), SHEET_CELL)
    return draw_grid([*examples, row], made=[(len(examples), c) for c in targets], cell=side)


def enlarging(scale: float, strength: float) -> Any:
    """How images are upsampled; None for a scale of 1."""
    from visualcloze_deft.inference.upsampling import Upsampling

    return Upsampling(scale=scale, strength=strength) if scale > 1 else None


class Generate:
    """Completes the query row of a grid."""

    CATEGORY = host.CATEGORY
    DESCRIPTION = (
        "Generates the missing images of the query row. Connect example rows, a task, or both. "
        "images is a list with one batch for each generated column."
    )
    FUNCTION = "generate"
    RETURN_TYPES = ("IMAGE", "IMAGE")
    RETURN_NAMES = ("images", "contact_sheet")
    OUTPUT_IS_LIST = (True, False)
    OUTPUT_TOOLTIPS = (
        "The generated images: one batch for each generated column; by query, then by seed.",
        "The whole grid as one picture for each generated row, new images in red frames.",
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("VCDEFT_MODEL", {"tooltip": "A model, with its adapters."}),
                "query": ("VCDEFT_QUERY", {"tooltip": "The row to complete."}),
                "content_prompt": (
                    "STRING",
                    {
                        "default": "",
                        "multiline": True,
                        "dynamicPrompts": True,
                        "tooltip": "What the generated image shows, e.g. a mug on a table.",
                    },
                ),
                "seed": (
                    "INT",
                    {
                        "default": 0,
                        "min": 0,
                        "max": MOST_SEED,
                        "control_after_generate": True,
                        "tooltip": "Of the first image; further ones get the numbers after it.",
                    },
                ),
                "steps": ("INT", {"default": 30, "min": 1, "max": 1000, "tooltip": "Of sampling."}),
                "guidance": (
                    "FLOAT",
                    {
                        "default": 30.0,
                        "min": 0.0,
                        "max": 100.0,
                        "step": 0.5,
                        "tooltip": "How closely FLUX follows the words; VisualCloze uses 30.",
                    },
                ),
                "images_per_grid": (
                    "INT",
                    {"default": 1, "min": 1, "max": 64, "tooltip": "Images with other seeds."},
                ),
            },
            "optional": {
                "examples": ("VCDEFT_ROWS", {"tooltip": "Complete rows that show the task."}),
                "task": ("VCDEFT_TASK", {"tooltip": "The task in words."}),
                "upsampling": (
                    "FLOAT",
                    {
                        "default": 1.0,
                        "min": 1.0,
                        "max": 8.0,
                        "step": 0.25,
                        "tooltip": "Enlarges each side so many times, with new detail. 1: off.",
                    },
                ),
                "upsampling_strength": (
                    "FLOAT",
                    {
                        "default": 0.4,
                        "min": 0.0,
                        "max": 1.0,
                        "step": 0.05,
                        "tooltip": "How much of an enlarged image is made anew.",
                    },
                ),
                "resolution": (
                    "INT",
                    {
                        "default": 0,
                        "min": 0,
                        "max": 2048,
                        "step": 16,
                        "tooltip": "Side of a square cell in pixels. 0: that of the model.",
                    },
                ),
            },
        }

    def generate(
        self,
        model: Model,
        query: Query,
        *,
        content_prompt: str,
        seed: int,
        steps: int,
        guidance: float,
        images_per_grid: int,
        examples: Rows = (),
        task: ChosenTask | None = None,
        upsampling: float = 1.0,
        upsampling_strength: float = 0.4,
        resolution: int = 0,
    ) -> tuple[list[Tensor], Tensor]:
        package.require()
        larger = enlarging(upsampling, upsampling_strength)
        host.make_room()
        with torch.inference_mode(False):  # ComfyUI's; the pipeline has its own no_grad
            pipe = model.loaded.pipeline(model.adapters)
            pipe.tasks = tasks_with(task, pipe)
            grids = grids_of(query, examples, task=task, tasks=pipe.tasks, content=content_prompt)
            watch = Watch(
                pipe,
                shape=grids.shape(pipe, resolution or None),
                images=len(grids.queries) * images_per_grid,
                steps=steps,
                upsampling=len(grids.targets) * larger.steps(steps) if larger else 0,
            )
            made = pipe(
                grids.asked(),
                seed=seed,
                num_images_per_prompt=images_per_grid,
                upsampling=larger,
                num_inference_steps=steps,
                guidance_scale=guidance,
                resolution=resolution or None,
                callback_on_step_end=watch,
            )
        columns = zip(*(answer.images for answer in made.answers), strict=True)
        sheets = [contact_sheet(examples, [*a.row], grids.targets) for a in made.answers]
        return [image_of(column) for column in columns], image_of(sheets)
