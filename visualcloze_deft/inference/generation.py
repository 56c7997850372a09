"""One call of the pipeline: grids to clean tokens to images, batch by batch.

Axes: b batch, n tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, get_args

import torch
from torch import Tensor

from visualcloze_deft.backbones.flux_fill.model import Models
from visualcloze_deft.backbones.flux_fill.packing import FluxText
from visualcloze_deft.config.numbers import is_number, is_whole
from visualcloze_deft.errors import UserError
from visualcloze_deft.grids import grid
from visualcloze_deft.grids.cell_sizes import CELL_STEP, Cells, Shape, strip_shapes
from visualcloze_deft.inference.arguments import enough_memory, is_side
from visualcloze_deft.inference.batching import Job, batches_of
from visualcloze_deft.inference.contexts import Contexts, Shown
from visualcloze_deft.inference.example_parts import ExampleParts
from visualcloze_deft.inference.output import Answer, OutputType, check_finite, converted
from visualcloze_deft.inference.request import Request
from visualcloze_deft.inference.upsampling import Upsampling, enlarge, upsample
from visualcloze_deft.sampling.context import FULL, Context
from visualcloze_deft.sampling.denoising import (
    GUIDANCE,
    STEPS,
    AfterStep,
    Conditions,
    Prediction,
    draw_of,
    task_text,
    tokens_of,
)
from visualcloze_deft.storage.text_files import brief

KnownLatents = Literal["mode", "sample"]
KnownCells = Literal["paste", "decode"]
Generators = torch.Generator | Sequence[torch.Generator] | None


@dataclass(frozen=True, kw_only=True)
class Generating:
    """How images are made, see `InContextPipeline.complete`. Raises `UserError` where a value is
    none that can be."""

    steps: int = STEPS
    guidance: float = GUIDANCE
    resolution: int | None = None
    batch_size: int = 1
    known_latents: KnownLatents = "mode"
    known_cells: KnownCells = "paste"
    output_type: OutputType = "pil"

    def __post_init__(self) -> None:
        for name, count in (("num_inference_steps", self.steps), ("batch_size", self.batch_size)):
            if not is_whole(count) or count < 1:
                raise UserError(f"{name} {brief(count)}: give a whole number, 1 or more")
        if not is_number(self.guidance):
            raise UserError(f"guidance_scale {brief(self.guidance)}: give a number, e.g. 30")
        side = self.resolution
        if side is not None and not is_side(side):
            raise UserError(f"resolution {brief(side)}: give a multiple of {CELL_STEP}")
        for name, value, known in (
            ("output_type", self.output_type, get_args(OutputType)),
            ("known_latents", self.known_latents, get_args(KnownLatents)),
            ("known_cells", self.known_cells, get_args(KnownCells)),
        ):
            if value not in known:
                raise UserError(f"{name} {value!r}: give one of {', '.join(known)}")


@dataclass(frozen=True, kw_only=True)
class Generation:
    """The images of a call, one for each seed of each grid.

    after: called after each step, see `denoising.AfterStep`. examples: what a causal context has in
    common with other calls. interrupted: whether to leave what there is. at_time: told the time of
    a step, 1000 at noise, before it.
    """

    models: Models
    asked: Sequence[Request]
    how: Generating
    cells: Cells
    after: AfterStep
    interrupted: Callable[[], bool]
    at_time: Callable[[Tensor], None]
    generator: Generators = None
    context: Context = FULL
    latents: Tensor | Sequence[Tensor] | None = None
    prompt_embeds: Tensor | None = None
    pooled_prompt_embeds: Tensor | None = None
    examples: ExampleParts = field(default_factory=ExampleParts)

    @cached_property
    def contexts(self) -> Contexts:
        return Contexts(self.models, self.context, self.examples, guidance=self.how.guidance)

    @property
    def side(self) -> int:
        """Of a square cell, in pixels."""
        return self.how.resolution or self.models.resolution

    @cached_property
    def shapes(self) -> list[Shape]:
        return [strip_shapes(one.sizes, self.side, self.cells) for one in self.asked]

    @cached_property
    def jobs(self) -> list[Job]:
        places = [(number, seed) for number, one in enumerate(self.asked) for seed in one.seeds]
        return [Job(order=k, grid=number, seed=seed) for k, (number, seed) in enumerate(places)]

    @cached_property
    def batches(self) -> list[list[Job]]:
        kinds: list[Hashable] = [*self.shapes]
        if self.cached:  # whose targets must be at the same places
            kinds = [(shape, one.targets) for shape, one in zip(kinds, self.asked, strict=True)]
        return batches_of(self.jobs, kinds, self.how.batch_size)

    @property
    def cached(self) -> bool:
        """Whether the context of a grid is computed in some steps alone."""
        return self.context.cached(self.how.steps)

    @property
    def known_drawn(self) -> bool:
        """Whether what is seen of known cells is drawn anew for each image."""
        return self.how.known_latents == "sample"

    @property
    def total_steps(self) -> int:
        """Calls of `after` in all."""
        upsampling = (
            how.steps(self.how.steps) * len(one.seeds)
            for one in self.asked
            for how in one.upsampling
            if how is not None
        )
        return len(self.batches) * self.how.steps + sum(upsampling)

    def check(self) -> None:
        """Raise `UserError` where what is given does not fit the grids, or the steps."""
        full, steps = self.context.full_steps, self.how.steps
        if full is not None and full > steps:
            raise UserError(f"full_steps {full}: more than {steps} steps; give {steps} at most")
        if self.examples.fixed and (self.context.seen != "causal" or self.known_drawn):
            raise UserError(
                "compiled examples: they need a causal context and known_latents='mode'; call "
                "unload_compiled() for others"
            )
        if self.context.seen == "causal" and self.prompt_embeds is not None:
            raise UserError(
                "prompt_embeds: a causal context also reads the text of the task alone; give words"
            )
        _ = self.draws, self.noises, self.texts

    def answers(self) -> Iterator[tuple[int, Answer]]:
        """Each image as it is done, with its place in the call."""
        for batch in self.batches:
            if self.interrupted():
                return
            grids = {
                number: grid.build(self.asked[number].rows, resolution=self.side, cells=self.cells)
                for number in {job.grid for job in batch}
            }
            size = f"{len(batch)} grids of {self.tokens(batch[0])} tokens"
            with enough_memory(f"making {size} together"):
                finals = self.denoised(batch, [grids[job.grid] for job in batch])
            for job, final in zip(batch, finals, strict=True):
                check_finite(job, final)
                yield job.order, self.answer(job, grids[job.grid], final)

    def tokens(self, job: Job) -> int:
        return sum(h * w for h, w in self.shapes[job.grid]) // CELL_STEP**2

    def denoised(self, jobs: Sequence[Job], grids: Sequence[grid.Grid]) -> Tensor:
        """The (b, n, 64) clean tokens of grids of one shape."""
        return tokens_of(
            self.models,
            self.conditions(jobs, grids),
            [self.draws[job.order] for job in jobs],
            steps=self.how.steps,
            guidance=self.how.guidance,
            noise=[self.noises[job.order] for job in jobs] if self.noises else None,
            watched=self.unless_interrupted,
            after=self.after,
            context=self.context,
        )

    def unless_interrupted(self, predict: Prediction) -> Prediction:
        """`predict`, which is told about; an interrupted call keeps what there is."""

        def watched(x: Tensor, t: Tensor) -> Tensor:
            self.at_time(1000 * t)
            return torch.zeros_like(x) if self.interrupted() else predict(x, t)

        return watched

    def conditions(self, jobs: Sequence[Job], grids: Sequence[grid.Grid]) -> Conditions:
        """What the grids show, encoded once for all images of a grid unless it is drawn."""
        text = self.text_of(jobs)
        prompts = [self.asked[job.grid].prompt for job in jobs]
        task = task_text(self.models, prompts, self.context.seen)
        if self.known_drawn:
            draws = [self.draws[job.order] for job in jobs]
            latents = self.models.encode_grids(grids, clean=False, draws=draws)
            return Conditions(latents=latents, text=text, task=task)
        numbers = list(dict.fromkeys(job.grid for job in jobs))
        first = [next(k for k, job in enumerate(jobs) if job.grid == n) for n in numbers]
        once = self.models.encode_grids([grids[k] for k in first], clean=False)
        places = [numbers.index(job.grid) for job in jobs]
        given = Conditions(latents=once.some(places), text=text, task=task)
        if not self.context.once:
            return given
        shown = [Shown(grid=grids[k], prompt=prompts[k], number=jobs[k].grid) for k in first]
        return replace(given, prefilled=self.contexts.of(shown, given.some(first)).some(places))

    def text_of(self, jobs: Sequence[Job]) -> FluxText:
        if self.texts:
            given = [self.texts[job.grid] for job in jobs]
            return FluxText(*(torch.stack(part) for part in zip(*given, strict=True)))
        return self.models.encode_text([self.asked[job.grid].prompt for job in jobs])

    def answer(self, job: Job, built: grid.Grid, final: Tensor) -> Answer:
        """The images of one grid's clean tokens (n, 64); only the query's strip is decoded."""
        asked, how = self.asked[job.grid], self.how
        if how.output_type == "latent":
            return Answer(grid=job.grid, seed=job.seed, images=(final,), row=())
        with enough_memory("decoding a strip"):
            (pixels,) = self.models.decode_query(final[None], [built])
        check_finite(job, pixels)
        made = grid.cells(pixels, built.widths[-1])
        asis = grid.cells(built.strips[-1], built.widths[-1])
        decoded = how.known_cells == "decode"
        row = [
            cell if decoded or column in asked.targets else asis[column].to(cell)
            for column, cell in enumerate(made)
        ]
        for column, larger in zip(asked.targets, asked.upsampling, strict=False):
            if larger is not None:
                row[column] = self.upsampled(job, row[column], larger)
                check_finite(job, row[column])
        given = tuple(converted(cell, how.output_type) for cell in row)
        images = tuple(given[column] for column in asked.targets)
        return Answer(grid=job.grid, seed=job.seed, images=images, row=given)

    def upsampled(self, job: Job, cell: Tensor, larger: Upsampling) -> Tensor:
        """A generated cell (3, h, w), enlarged and made anew in part."""
        image, steps = grid.to_image(cell), self.how.steps
        if not larger.steps(steps) or self.interrupted():
            return enlarge(image, larger)
        if self.texts and larger.prompt is None:
            text = FluxText(*(part[None] for part in self.texts[job.grid]))
        else:
            own = self.asked[job.grid].content_prompt
            text = self.models.encode_text([own if larger.prompt is None else larger.prompt])
        width, height = larger.size(*image.size)
        with enough_memory(f"upsampling to {width} x {height}"):
            return upsample(
                self.models,
                image,
                larger,
                text=text,
                draw=self.draws[job.order],
                steps=steps,
                guidance=self.how.guidance,
                after=self.after,
            )

    @cached_property
    def draws(self) -> list[torch.Generator]:
        """What draws each image's noise."""
        jobs, generator = self.jobs, self.generator
        if generator is None:
            return [draw_of(job.seed) for job in jobs]
        several = generator if isinstance(generator, list | tuple) else [generator]
        if not all(isinstance(one, torch.Generator) for one in several):
            raise UserError(f"generator {brief(generator)}: give a torch.Generator, or one each")
        if isinstance(generator, torch.Generator) and len(jobs) == 1:
            return [generator]
        if isinstance(generator, torch.Generator):  # split up, so that no grouping changes a draw
            seeds = torch.randint(2**62, (len(jobs),), generator=generator, device=generator.device)
            return [torch.Generator(generator.device).manual_seed(int(s)) for s in seeds]
        if len(generator) != len(jobs):
            raise UserError(
                f"generator: {len(generator)} generators for {len(jobs)} images; give one each"
            )
        return list(generator)

    @cached_property
    def noises(self) -> list[Tensor]:
        """The given noise of each image; [] where it is drawn."""
        if self.latents is None:
            return []
        if not isinstance(self.latents, Tensor | list | tuple):
            raise UserError(f"latents {brief(self.latents)}: give a tensor (n, 64) for each image")
        found = list(self.latents)
        if len(found) != len(self.jobs):
            raise UserError(f"latents: {len(found)} for {len(self.jobs)} images; give one each")
        for job, one in zip(self.jobs, found, strict=True):
            wanted = (self.tokens(job), 64)
            if tuple(one.shape) != wanted:
                raise UserError(f"latents of shape {tuple(one.shape)}: this grid takes {wanted}")
        return found

    @cached_property
    def texts(self) -> list[tuple[Tensor, Tensor]]:
        """The given text of each grid, (l, d) and (d); [] where prompts are encoded."""
        text, pooled = self.prompt_embeds, self.pooled_prompt_embeds
        if text is None and pooled is None:
            return []
        if text is None or pooled is None:
            alone = "prompt_embeds" if pooled is None else "pooled_prompt_embeds"
            raise UserError(f"{alone} alone: give prompt_embeds and pooled_prompt_embeds together")
        for name, tensor in (("prompt_embeds", text), ("pooled_prompt_embeds", pooled)):
            if not isinstance(tensor, Tensor):
                raise UserError(f"{name} {brief(tensor)}: give the tensor of encode_prompt")
            if len(tensor) not in (1, len(self.asked)):
                raise UserError(f"{name}: {len(tensor)} for {len(self.asked)} grids; give one each")
        place, dtype = self.models.device, self.models.transformer.dtype
        return [
            (text[k % len(text)].to(place, dtype), pooled[k % len(pooled)].to(place, dtype))
            for k in range(len(self.asked))
        ]
