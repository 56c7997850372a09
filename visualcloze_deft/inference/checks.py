"""What can be said of an inference before it starts: mistakes, cut texts, what will be made."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from visualcloze_deft.adapters.files import StoredAdapter
from visualcloze_deft.adapters.metadata import check_base, lora_mismatch
from visualcloze_deft.backbones import lora_files
from visualcloze_deft.backbones.flux_fill.clip_text import clip_text, fits, unread
from visualcloze_deft.backbones.flux_fill.files import check_folder
from visualcloze_deft.backbones.flux_fill.loading import load_tokenizers
from visualcloze_deft.backbones.flux_fill.model import text_length
from visualcloze_deft.backbones.model_files import check_quantise
from visualcloze_deft.backbones.precision import default_dtype
from visualcloze_deft.errors import UserError
from visualcloze_deft.grids.cell_sizes import CELL_STEP
from visualcloze_deft.grids.prompt import ClipText
from visualcloze_deft.inference import acceleration
from visualcloze_deft.inference.arguments import check_attention, stored_adapters
from visualcloze_deft.inference.records import GridJob
from visualcloze_deft.inference.settings import InferenceSettings


def check(settings: InferenceSettings) -> dict[StoredAdapter, float]:
    """Raise `UserError` for what can be known to be wrong before anything is loaded; the adapters
    with their scales, which are read for it."""
    if not math.isfinite(settings.guidance):
        raise UserError(f"--guidance {settings.guidance}: give a number, e.g. 30")
    if settings.resolution is not None and settings.resolution % CELL_STEP:
        raise UserError(f"--resolution {settings.resolution}: give a multiple of {CELL_STEP}")
    check_folder(settings.model)
    check_quantise(settings.quantise)
    acceleration.check(
        offload=settings.offload,
        cache=settings.cache,
        attention=settings.attention,
        quantise=settings.quantise,
        batch=settings.batch,
    )
    if not torch.cuda.is_available():  # on a GPU each process that generates tries it
        dtype = default_dtype("cpu")
        check_attention(settings.attention, settings.model, device="cpu", dtype=dtype)
    if settings.lora is not None:
        lora_files.changes_of(settings.model, settings.lora)  # read whole, or refused
    adapters = stored_adapters(settings.adapters, settings.model)
    check_context_cache(settings)
    for one in adapters:
        check_base(one.folder, settings.model, lora=settings.lora)
    return adapters


def check_context_cache(settings: InferenceSettings) -> None:
    """Raise `UserError` where the context cannot be used as it is asked for."""
    seen = settings.seen
    if settings.compiled is not None and seen != "causal":
        raise UserError(
            f"--compiled {settings.compiled}: compiled examples need a causal context, and this is "
            f"{seen!r}; leave --context out"
        )
    full = settings.context_cache
    if full is not None and full > settings.steps:
        raise UserError(
            f"--context-cache {full}: more than the {settings.steps} steps; give fewer, e.g. 3"
        )
    if full is not None and seen != "full":
        raise UserError(
            f"--context-cache {full}: the context here is {seen!r}, and computed once anyway; "
            "leave the option out"
        )
    if settings.cache is not None and (full is not None or seen != "full"):
        raise UserError(
            f"--cache {settings.cache}: not beside a context that is computed in some steps alone; "
            "leave one out"
        )


def described(
    plans: Sequence[GridJob], waiting: Sequence[GridJob], shared: Mapping[str, Any]
) -> list[str]:
    """What a run would do."""
    lines = []
    for plan in plans:
        strips = ", ".join(f"{w}x{h}" for h, w in plan.shape)
        state = "to do" if plan in waiting else "finished"
        lines.append(
            f"{plan.entry.name}  {plan.record['task'] or '-':24} rows of {strips}  "
            f"{plan.tokens} tokens  {', '.join(plan.names)}  {state}"
        )
    steps = sum(plan.steps for plan in waiting)
    lines.append(
        f"{len(waiting)} of {len(plans)} grids to do, {steps} calls of the transformer, "
        f"{shared['model']} in {shared['dtype']} on {shared['device']}"
    )
    return lines


def unread_words(plans: Sequence[GridJob], model: str, order: ClipText) -> list[str]:
    """A line for every grid and encoder whose text is cut, with the words that are not read."""
    clip, t5 = load_tokenizers(model)
    lines = []
    for plan in plans:
        for prompt in plan.prompts:
            own = isinstance(prompt, str)  # of an upsampling
            for_clip = prompt if isinstance(prompt, str) else clip_text(prompt, fits(clip), order)
            cut = {
                "T5": unread(t5, str(prompt), text_length(t5)),
                "CLIP": unread(clip, for_clip, clip.model_max_length),
            }
            lines += [
                f"grid {plan.entry.name}: {encoder} does not read the end of its "
                f"{'upsampling prompt' if own else 'text'}: {words}"
                for encoder, words in cut.items()
                if words
            ]
    return lines


def other_bases(settings: InferenceSettings) -> list[str]:
    """A line for every adapter that was trained on a base with another LoRA merged."""
    found = [lora_mismatch(folder, settings.lora) for folder in settings.adapters]
    return [f"{line}; see --model-lora" for line in found if line]
