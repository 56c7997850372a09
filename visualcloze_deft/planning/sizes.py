"""Bytes of frozen weights, and the layers that an adapter sits on."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from safetensors import SafetensorError, safe_open

from visualcloze_deft.adapters.method_table import METHODS
from visualcloze_deft.backbones.base import SINGLE, Sizes
from visualcloze_deft.backbones.peft_files import WEIGHTS
from visualcloze_deft.config.patterns import matching
from visualcloze_deft.config.run_settings import Adapter, Bits
from visualcloze_deft.errors import UserError

FP8_ROWS = 512  # quantization.ROWS


def adapted_layers(model: Sizes, settings: Adapter, default: str) -> list[str]:
    """The linear layers that get an adapter. default: the family's own."""
    if settings.init_from is None:
        if settings.target_modules == "default":
            return [name for name in model.linear if re.fullmatch(default, name)]
        return matching("adapter.target_modules", settings.target_modules, model.linear)
    path = Path(settings.init_from) / WEIGHTS
    try:
        with safe_open(path, "np") as file:
            tensors = list(file.keys())
    except (OSError, SafetensorError) as error:
        raise UserError(f"adapter.init_from: {path} cannot be read: {error}") from None
    names = {re.sub(r"(base_model\.model\.)?(.*)\.(deft|lora)_.*", r"\2", t) for t in tensors}
    return [name for name in model.linear if name in names]


def adapter_tensors(model: Sizes, settings: Adapter, adapted: Collection[str]) -> list[int]:
    """Values in each tensor of the adapter."""
    found = []
    for name in adapted:
        inputs, outputs = model.linear[name]
        found.append(settings.rank * outputs)
        if len(METHODS[settings.method].factors) > 1:
            found.append(settings.rank * inputs)
    return found


def is_in(blocks: Collection[str], layer: str) -> bool:
    """Whether a layer is in one of these blocks, which are named as in the denoiser.

    >>> is_in(["transformer_blocks.1"], "transformer_blocks.1.ff.net.2"), is_in(["a.1"], "a.11.b")
    (True, False)
    """
    return any(layer.startswith(f"{block}.") for block in blocks)


def stored(model: Sizes, bits: Bits, size: int) -> int:
    """Bytes of the frozen transformer; `bits` is what the blocks' linear layers are kept in."""
    total = model.parameters * size
    if bits == "none":
        return total
    for name, (inputs, outputs) in model.linear.items():
        if is_in(model.blocks, name):
            values = inputs * outputs
            if bits == "nf4":  # scales of 64 values in a byte, and of 256 scales in float32
                small = values // 2 + values // 64 + values // 64 // 256 * SINGLE
            else:
                small = values + outputs * SINGLE
            total += small - values * size
    return total


def quantising_bytes(model: Sizes, bits: Bits, size: int) -> int:
    """The most that is held while one layer of a block is quantised, beside the layers that are
    done: its weight as it was, and what its values become on the way.

    fp8 is made of `FP8_ROWS` rows at once, which are there twice in float32. bitsandbytes has whole
    weights in float16 and twice in float32 (int8), thrice in float32 and once in bytes (nf4): read
    in its code for CPUs, version 0.50; GPUs take less.
    """
    if bits == "none":
        return 0

    def beside(inputs: int, outputs: int) -> int:
        if bits == "fp8":
            return 2 * SINGLE * min(FP8_ROWS, outputs) * inputs
        return (2 + 2 * SINGLE if bits == "int8" else 1 + 3 * SINGLE) * outputs * inputs

    layers = [sides for name, sides in model.linear.items() if is_in(model.blocks, name)]
    return max((size * i * o + beside(i, o) for i, o in layers), default=0)
