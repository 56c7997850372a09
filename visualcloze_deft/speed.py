"""Ways to run a pipeline in less memory or time, all diffusers' own, by the words of the command
line. Off by default; docs/inference.md holds what each changes and costs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline
from diffusers.hooks import FirstBlockCacheConfig, TaylorSeerCacheConfig

from visualcloze_deft.errors import UserError, nearest

Offload = Literal["none", "model", "group", "sequential"]

CACHES: dict[str, tuple[Callable[[float], Any], float]] = {
    "first-block": (lambda value: FirstBlockCacheConfig(threshold=value), 0.1),
    "taylorseer": (
        lambda value: TaylorSeerCacheConfig(cache_interval=int(value), disable_cache_before_step=4),
        3,
    ),
}
"""Word -> what makes diffusers' settings of a number, and the number where none is given."""


def cache_settings(text: str) -> Any:
    """diffusers' settings for "NAME" or "NAME=NUMBER".

    >>> cache_settings("first-block=0.2").threshold
    0.2
    """
    name, given, number = text.partition("=")
    if name not in CACHES:
        raise UserError(f"--cache {text!r}: {nearest(name, CACHES)}")
    make, usual = CACHES[name]
    try:
        value = float(number) if given else usual
    except ValueError:
        raise UserError(f"--cache {text!r}: {number!r} is no number") from None
    if not 0 < value < 1000:
        raise UserError(f"--cache {text!r}: give a number above 0, e.g. {name}={usual}")
    return make(value)


def check_offload(how: Offload) -> None:
    """Raise `UserError` where there is no GPU to offload from."""
    if how != "none" and not torch.cuda.is_available():
        raise UserError(f"--offload {how}: there is no GPU here to keep free")


def enable(
    pipe: DiffusionPipeline,
    *,
    offload: Offload = "none",
    cache: str | None = None,
    attention: str | None = None,
    vae_tiling: bool = False,
    compile_blocks: bool = False,
) -> None:
    """Switch on what is asked for. Raises `UserError` for what this machine lacks."""
    check_offload(offload)
    if cache is not None:
        pipe.transformer.enable_cache(cache_settings(cache))
    if attention is not None:
        try:
            pipe.transformer.set_attention_backend(attention)
        except (ValueError, RuntimeError, ImportError) as error:
            raise UserError(f"--attention {attention}: {str(error).splitlines()[0]}") from None
    if vae_tiling:
        pipe.vae.enable_tiling()
    if compile_blocks:
        pipe.transformer.compile_repeated_blocks()
    if offload == "model":
        pipe.enable_model_cpu_offload()
    elif offload == "group":
        pipe.enable_group_offload(torch.device("cuda"), offload_type="leaf_level", use_stream=True)
    elif offload == "sequential":
        pipe.enable_sequential_cpu_offload()
