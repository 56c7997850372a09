"""The precision that a frozen base computes in, on a device."""

from __future__ import annotations

import torch

from visualcloze_deft.config.run_settings import Precision
from visualcloze_deft.runtime.gpus import gpus_here, precision_on, why_float32
from visualcloze_deft.runtime.launch import say_once


def dtype_of(precision: Precision, device: str) -> torch.dtype:
    """What `precision` is on a device, see `gpus.precision_on`; where "auto" is float32 on a GPU, a
    warning says why, once. Raises `UserError` for bfloat16 on a GPU without it."""
    place = torch.device(device)
    gpu = gpus_here()[place.index or 0] if place.type == "cuda" else None
    if precision == "auto" and gpu is not None and (why := why_float32(gpu)):
        say_once(why)
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[precision_on(precision, gpu)]


def default_dtype(device: str) -> torch.dtype:
    """bfloat16 on GPUs that compute in it, float32 elsewhere, see `dtype_of`."""
    return dtype_of("auto", device)
