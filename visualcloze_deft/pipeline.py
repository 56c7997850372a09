"""The Python API: a model, maybe an adapter, and grids to complete."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar, get_args

import torch
from PIL import Image

from visualcloze_deft import adapters, grid, sample
from visualcloze_deft.cells import CELL_STEP, Cells
from visualcloze_deft.errors import UserError
from visualcloze_deft.gridfile import Request, read_requests, request
from visualcloze_deft.modelfolder import TINY, Bits, check_base, check_lora, told_by
from visualcloze_deft.models import Models, default_dtype, load_models
from visualcloze_deft.prompt import ClipText
from visualcloze_deft.registry import load_tasks


class InContextPipeline:
    """Completes grids of images.

    >>> pipe = InContextPipeline.from_pretrained("tiny")  # doctest: +SKIP
    >>> images = pipe(rows=[[a, b], [c, None]], task="depth-to-image")  # doctest: +SKIP
    """

    def __init__(
        self, models: Models, *, cells: Cells = "row", task_folders: Sequence[str | Path] = ()
    ) -> None:
        self.models = models
        self.cells = cells
        self.tasks = load_tasks(Path(folder) for folder in task_folders)

    @classmethod
    def from_pretrained(
        cls,
        model: str = TINY,
        *,
        adapter: str | Path | None = None,
        lora: str | None = None,
        device: str | None = None,
        dtype: torch.dtype | None = None,
        quantise: Bits = "none",
        clip_text: ClipText | None = None,
        cells: Cells | None = None,
        task_folders: Sequence[str | Path] = (),
    ) -> InContextPipeline:
        """`model`: "tiny", a diffusers folder or a hub id of FLUX.1-Fill's layout.

        adapter: a folder in peft's format, e.g. RUN/adapter. lora: a diffusers FLUX LoRA merged
        into the base first. device, dtype: a GPU in bfloat16 where there is one, else CPU in
        float32. quantise: keep the frozen blocks in "int8", "nf4" (bitsandbytes) or "fp8".
        clip_text: what CLIP reads, see `prompt.clip_text`. cells: their shape, see `cells.Cells`.
        Where these two are None, as the adapter was trained; "fit" and "row" without one.
        Raises `UserError` where something is missing or does not fit.
        """
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = dtype or default_dtype(device)
        if lora is not None:
            check_lora(lora)
        if adapter is not None:
            adapters.read_config(Path(adapter))
            adapters.read_weights(Path(adapter))
            check_base(Path(adapter), str(model))
        told = told_by(Path(adapter)) if adapter is not None else {}
        models = load_models(
            str(model),
            dtype=dtype,
            device=device,
            lora=lora,
            bits=quantise,
            clip_text=clip_text or one_of(told.get("clip_text"), get_args(ClipText)),
        )
        if adapter is not None:
            adapters.load(models.transformer, Path(adapter))
            models.transformer.to(device)
        cells = cells or one_of(told.get("cells"), get_args(Cells))
        return cls(models, cells=cells, task_folders=task_folders)

    def __call__(
        self,
        file: str | Path | None = None,
        *,
        rows: Sequence[Sequence[Image.Image | None]] | None = None,
        task: str | None = None,
        task_prompt: str | None = None,
        content_prompt: str | None = None,
        seed: int | None = None,
        steps: int = sample.STEPS,
        guidance: float = sample.GUIDANCE,
        resolution: int | None = None,
    ) -> list[Image.Image]:
        """The generated images, in the order of the grids and left to right in each.

        Give a grid file, or `rows` of PIL images with None for what is to be generated in the
        last one. The same seed gives the same image, whatever else is generated with it.
        """
        if (file is None) == (rows is None):
            raise UserError("give either a grid file or rows, not both and not neither")
        if file is not None:
            if (task, task_prompt, content_prompt) != (None, None, None):
                raise UserError("task and prompts go with rows; a grid file says its own")
            requests = read_requests(Path(file), self.tasks, seed=seed)
        else:
            assert rows is not None
            requests = [
                request(
                    [list(row) for row in rows],
                    self.tasks,
                    task=task,
                    task_prompt=task_prompt,
                    content_prompt=content_prompt,
                    seed=seed or 0,
                )
            ]
        return [
            image
            for asked in requests
            for image in self.complete(asked, steps=steps, guidance=guidance, resolution=resolution)
        ]

    def complete(
        self,
        asked: Request,
        *,
        steps: int = sample.STEPS,
        guidance: float = sample.GUIDANCE,
        resolution: int | None = None,
        step: Callable[[], object] = lambda: None,
    ) -> list[Image.Image]:
        """The images of one checked grid; `step` is called after every sampling step.

        steps: 1 and more. guidance: any finite number. resolution: the side of a square cell in
        pixels, a multiple of 16; the model's own by default.
        """
        if steps < 1:
            raise UserError(f"steps must be 1 or more, not {steps}")
        if not math.isfinite(guidance):
            raise UserError(f"guidance {guidance}: give a number, e.g. 30")
        if resolution is not None and (resolution < 1 or resolution % CELL_STEP):
            raise UserError(f"resolution {resolution}: give a multiple of {CELL_STEP}")
        built = grid.build(
            asked.rows, resolution=resolution or self.models.resolution, cells=self.cells
        )
        (images,) = sample.generate(
            self.models,
            [built],
            [asked.prompt],
            seeds=[asked.seed],
            steps=steps,
            guidance=guidance,
            step=step,
        )
        return images


Word = TypeVar("Word", bound=str)


def one_of(told: str | None, known: tuple[Word, ...]) -> Word:
    """What an adapter's file says, or the first of `known` where it says nothing that is known."""
    return next((word for word in known if word == told), known[0])
