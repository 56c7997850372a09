"""Sampling: a grid with holes to the images that fill them.

Axes: b batch, n tokens, c channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise

import torch
from PIL import Image
from torch import Tensor

from visualcloze_deft.backbones.base import (
    ContextCache,
    Encoders,
    Latents,
    Models,
    Part,
    Seen,
    Text,
)
from visualcloze_deft.diffusion.flow import FLOW
from visualcloze_deft.diffusion.process import Process
from visualcloze_deft.grids import grid
from visualcloze_deft.grids.prompt import Prompt, of_task
from visualcloze_deft.sampling.context import FULL, Context, ContextPredictor

GUIDANCE = 30.0  # VisualCloze's sampling setting, as is the number of steps
STEPS = 30

Prediction = Callable[[Tensor, Tensor], Tensor]
"""The denoiser as a function of noisy tokens (b, n, c) and one time in 0..1."""
AfterStep = Callable[[int, Tensor, Tensor], Tensor]
"""Told (number of the step from 0, its time, what it led to); returns what to go on with."""


def go_on(_: int, __: Tensor, x: Tensor) -> Tensor:
    return x


def denoise(
    predict: Prediction,
    noise: Tensor,
    times: Tensor,
    *,
    process: Process = FLOW,
    after: AfterStep = go_on,
) -> Tensor:
    """Steps from x at times[0], 1 for pure noise, to the image at times[-1] = 0."""
    x = noise
    for number, (now, then) in enumerate(pairwise(times)):
        x = after(number, now, process.step(x, predict(x, now), now, then))
    return x


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """What samples of one shape are generated from. task: the text of their task alone, which a
    causal context reads. prefilled: a context that is computed once, where it is already."""

    latents: Latents
    text: Text
    task: Text | None = None
    prefilled: ContextCache | None = None

    def some(self, places: Sequence[int]) -> Conditions:
        return Conditions(
            latents=self.latents.some(places),
            text=self.text.some(places),
            task=self.task and self.task.some(places),
            prefilled=self.prefilled and self.prefilled.some(places),
        )


def predictor(
    models: Models,
    given: Conditions,
    *,
    guidance: float,
    steps: int = 0,
    context: Context = FULL,
) -> Prediction:
    """The denoiser for these conditions.

    steps: how often it will be asked, for what diffusers' step caches do at certain steps.
    context: how it uses the tokens that are known; all targets must be at the same places unless
    that is full.
    """
    if context.cached(steps):
        kept = given.prefilled or context_of(models, given, guidance=guidance, context=context)
        times = models.times(steps, given.latents.clean.shape[1])[:-1]
        return ContextPredictor(kept, given.latents, context, times=times.tolist())
    denoiser, asked = models.denoiser, 0
    cached = getattr(denoiser, "is_cache_enabled", False)
    if cached:
        denoiser._reset_stateful_cache()  # of the sample before

    def at_step(t: Tensor) -> AbstractContextManager[object]:
        if not cached:
            return nullcontext()
        where = {"step_index": asked, "num_inference_steps": steps, "sigma": float(t)}
        context: AbstractContextManager[object] = denoiser.cache_context("cond", **where)
        return context

    def predict(x: Tensor, t: Tensor) -> Tensor:
        nonlocal asked
        with at_step(t):
            predicted = models.networks.predict(
                denoiser, given.latents, x, t.expand(len(x)), text=given.text, guidance=guidance
            )
        asked += 1
        return predicted.float()

    return predict


def context_of(
    models: Models,
    given: Conditions,
    *,
    guidance: float,
    context: Context,
    examples: Part | None = None,
) -> ContextCache:
    """What the context of samples is kept in; one that is computed once is computed here.

    examples: those of a causal one, where they are already.
    """
    cache = cache_of(models, given, guidance=guidance)
    prefill(cache, context.seen, given.task, examples=examples)
    return cache


def cache_of(models: Models, given: Conditions, *, guidance: float) -> ContextCache:
    """Nothing is kept in it yet."""
    assert models.networks.context_cache is not None  # of all families that have a pipeline
    return models.networks.context_cache(
        models.denoiser, given.latents, text=given.text, guidance=guidance
    )


def examples_of(models: Models, given: Conditions, *, guidance: float) -> Part:
    """The keys and values of a causal context's examples."""
    cache = cache_of(models, given, guidance=guidance)
    cache.prefill_examples(given.task)
    assert cache.examples is not None
    return cache.examples


def prefill(
    cache: ContextCache, seen: Seen, task: Text | None, *, examples: Part | None = None
) -> None:
    """Compute a context that is computed once, see `base.Seen`."""
    if seen == "causal":
        cache.examples = examples
        if examples is None:
            cache.prefill_examples(task)
    if seen != "full":
        cache.prefill()


def draw_of(seed: int) -> torch.Generator:
    """What draws an image's noise, from its seed alone and on the CPU: neither the batch nor the
    device decides what it shows."""
    return torch.Generator().manual_seed(seed)


def generate(
    models: Models,
    grids: Sequence[grid.Grid],
    prompts: Sequence[Prompt | str],
    *,
    seeds: Sequence[int],
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    context: Context = FULL,
) -> list[list[Image.Image]]:
    """The images of each grid's hidden cells, left to right; all grids must have one shape, and
    their targets one place unless `context` is full."""
    given = conditions_of(models, grids, prompts, seen=context.seen)
    draws = [draw_of(seed) for seed in seeds]
    tokens = tokens_of(models, given, draws, steps=steps, guidance=guidance, context=context)
    return pictures_of(models, tokens, grids)


def conditions_of(
    models: Models,
    grids: Sequence[grid.Grid],
    prompts: Sequence[Prompt | str],
    *,
    seen: Seen,
) -> Conditions:
    """What the encoders make of grids of one shape; the denoiser is not called."""
    return Conditions(
        latents=models.encode_grids(grids, clean=False),
        text=models.encode_text(prompts),
        task=task_text(models, prompts, seen),
    )


def task_text(models: Encoders, prompts: Sequence[Prompt | str], seen: Seen) -> Text | None:
    """What a context reads beside whole prompts, see `Conditions`."""
    return models.encode_text([*map(of_task, prompts)]) if seen == "causal" else None


@torch.no_grad()  # not inference_mode: under ZeRO-3 training goes on with what is gathered here
def tokens_of(
    models: Models,
    given: Conditions,
    draws: Sequence[torch.Generator],
    *,
    steps: int,
    guidance: float,
    noise: Sequence[Tensor] | None = None,
    watched: Callable[[Prediction], Prediction] = lambda predict: predict,
    after: AfterStep = go_on,
    context: Context = FULL,
) -> Tensor:
    """The (b, n, c) clean tokens that the denoiser makes.

    draws: make the noise, one for each sample. noise: (n, c) of each in place of what is drawn.
    watched: gets the denoiser as a function, and returns what is called in its place.
    """
    like = given.latents.clean
    drawn = noise or [torch.randn(like.shape[1:], generator=d, device=d.device) for d in draws]
    x = torch.stack([one.to(like.device, torch.float32) for one in drawn])
    predict = watched(predictor(models, given, guidance=guidance, steps=steps, context=context))
    times = models.times(steps, x.shape[1]).to(x.device)
    return denoise(predict, x, times, process=models.process, after=after)


def pictures_of(
    models: Models, tokens: Tensor, grids: Sequence[grid.Grid]
) -> list[list[Image.Image]]:
    """The images of each grid's hidden cells in its (b, n, c) clean tokens, left to right. Only
    the query's strip is decoded."""
    query = models.decode_query(tokens, grids)
    return [
        [grid.to_image(cell) for cell in hidden_cells(pixels, g)]
        for pixels, g in zip(query, grids, strict=True)
    ]


def hidden_cells(pixels: Tensor, built: grid.Grid) -> list[Tensor]:
    """The hidden cells of a decoded (3, h, w) query strip."""
    widths = built.widths[-1]
    pairs = zip(grid.cells(pixels, widths), grid.cells(built.hidden[-1], widths), strict=True)
    return [cell for cell, hidden in pairs if hidden.any()]
