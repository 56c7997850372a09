"""Ways to run a pipeline in less memory or time, all diffusers' own, by the words of the command
line. Off by default; docs/inference.md holds what each changes and costs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from diffusers.hooks import FirstBlockCacheConfig, TaylorSeerCacheConfig

from visualcloze_deft.backbones import compiled
from visualcloze_deft.backbones.attention import check_known
from visualcloze_deft.config.run_settings import Bits
from visualcloze_deft.errors import UserError, suggestion
from visualcloze_deft.inference.pipeline import InContextPipeline

Offload = Literal["none", "model", "group", "sequential"]

FIRST_BLOCK = "first-block"

CACHES: dict[str, tuple[Callable[[float], Any], float, str]] = {
    FIRST_BLOCK: (lambda value: FirstBlockCacheConfig(threshold=value), 0.1, "above 0"),
    "taylorseer": (
        lambda value: TaylorSeerCacheConfig(cache_interval=int(value), disable_cache_before_step=4),
        3,
        "whole and above 1",
    ),
}
"""Word -> what makes diffusers' settings of a number, the number where none is given, and what it
must be."""


def cache_settings(text: str) -> Any:
    """diffusers' settings for "NAME" or "NAME=NUMBER".

    >>> cache_settings("first-block=0.2").threshold
    0.2
    """
    name, given, number = text.partition("=")
    if name not in CACHES:
        raise UserError(f"--cache {text!r}: {suggestion(name, CACHES)}")
    make, usual, wanted = CACHES[name]
    try:
        value = float(number) if given else usual
    except ValueError:
        raise UserError(f"--cache {text!r}: {number!r} is no number") from None
    if not 0 < value < 1000 or not (name == FIRST_BLOCK or (value > 1 and value == int(value))):
        raise UserError(f"--cache {text!r}: give a number {wanted}, e.g. {name}={usual}")
    return make(value)


def check(
    *,
    offload: Offload = "none",
    cache: str | None = None,
    attention: str | None = None,
    quantise: Bits = "none",
    batch: int = 1,
) -> None:
    """Raise `UserError` for what cannot be, before anything is loaded."""
    if offload != "none" and not torch.cuda.is_available():
        raise UserError(f"--offload {offload}: there is no GPU here to keep free")
    if (quantise == "int8" and offload != "none") or (
        quantise == "nf4" and offload in ("group", "sequential")
    ):
        raise UserError(
            f"--offload {offload} with --quantise {quantise}: bitsandbytes' weights cannot be "
            "moved so; give --quantise fp8, or nf4 with --offload model"
        )
    if cache is not None:
        cache_settings(cache)
        if cache.startswith(FIRST_BLOCK) and batch > 1:
            raise UserError(
                f"--cache {cache} with --batch {batch}: it decides for all of a batch at once, and "
                "an image would depend on the others; give --batch 1"
            )
    if attention is not None:
        check_known(attention)


def enable(
    pipe: InContextPipeline,
    *,
    offload: Offload = "none",
    cache: str | None = None,
    attention: str | None = None,
    vae_tiling: bool = False,
    compile_blocks: bool = False,
) -> None:
    """Switch on what is asked for. Raises `UserError` for what this machine lacks."""
    check(offload=offload, cache=cache, attention=attention)
    if cache is not None:
        if pipe.transformer.is_cache_enabled:
            pipe.transformer.disable_cache()
        pipe.transformer.enable_cache(cache_settings(cache))
    if attention is not None:
        pipe.set_attention(attention, device=None if offload == "none" else "cuda")
    if vae_tiling:
        pipe.vae.enable_tiling()
    if compile_blocks:
        compiled.compile_blocks(pipe.transformer)
    if offload != "none" and pipe.encodings.on_disk:
        for network in (pipe.vae, pipe.text_encoder, pipe.text_encoder_2):
            pipe.encodings.name_of(network)  # their weights cannot be read any more then
    if offload == "model":
        pipe.enable_model_cpu_offload()
    elif offload == "group":
        pipe.enable_group_offload(torch.device("cuda"), offload_type="leaf_level", use_stream=True)
    elif offload == "sequential":
        pipe.enable_sequential_cpu_offload()
