"""The memory that a run needs outside of its steps: encoding, sampling, and decoding a sample.

Counted from settings alone, tensor by tensor, as diffusers' networks hold them without gradients.
The tests hold each count against the real network. All sizes are bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from visualcloze_deft.backbones.base import SINGLE
from visualcloze_deft.errors import UserError
from visualcloze_deft.grids.cell_sizes import CELL_STEP

SHEET_ROWS = 2  # of the grids on a sample sheet: one example and the query


@dataclass(frozen=True, kw_only=True)
class Outside:
    """What is held at the peak of each kind of work outside of a step, beside what stays.

    text: the text encoders' weights, where they rest elsewhere; their activations are left out.
    encode: the widest strips of a batch through the VAE's encoder. forward: the transformer without
    gradients. decode: the widest strip through the VAE's decoder.
    """

    text: int
    encode: int
    forward: int
    decode: int

    @property
    def peak(self) -> int:
        return max(vars(self).values())


@dataclass(frozen=True, kw_only=True)
class PixelValues:
    """The most values alive at once in a VAE, for each pixel of a picture."""

    encode: float
    decode: float


def picture_bytes(values: float, tokens: int, size: int) -> int:
    """Of `values` a pixel, each of `size` bytes, in a picture of so many tokens."""
    return int(values * tokens * CELL_STEP**2 * size)


def pixel_values(settings: Mapping[str, Any]) -> PixelValues:
    """From an `AutoencoderKL`'s `config.json`. Its attention, at an eighth of each side, is left
    out: the fused kernels keep no table of weights.

    >>> pixel_values({"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2})
    PixelValues(encode=640.0, decode=768.0)
    """
    try:
        widths = [int(width) for width in settings["block_out_channels"]]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"vae/config.json does not tell its widths: {error}") from None
    depth, last = int(settings.get("layers_per_block", 1)), len(widths) - 1
    inward = list(zip((widths[0], *widths), widths, strict=False))  # sides halve after each
    outward = list(zip((widths[-1], *widths[::-1]), widths[::-1], strict=False))
    encode = max(_blocks(i, o, depth) / 4**k for k, (i, o) in enumerate(inward))
    decode = max(_blocks(i, o, depth + 1) / 4 ** (last - k) for k, (i, o) in enumerate(outward))
    doubled = [_doubled(i, o) / 4 ** (last - k) for k, (i, o) in enumerate(outward[:-1])]
    return PixelValues(encode=float(encode), decode=float(max(decode, *doubled)))


def _blocks(inputs: int, outputs: int, layers: int) -> int:
    """Values a pixel in the residual blocks of one resolution: a block's input, which its caller
    holds, what it adds, the sum and the scaled sum, and the input of another width; or its input
    thrice, for the first norm. The first one's input is held throughout."""
    first = max(3 * inputs, inputs + (4 if inputs != outputs else 3) * outputs)
    return first if layers == 1 else max(first, inputs + 4 * outputs)


def _doubled(inputs: int, outputs: int) -> int:
    """Values a pixel while the sides are doubled: the picture enlarged, and its convolution."""
    return inputs + outputs + 4 * 2 * outputs


def forward_values(method: str, size: int) -> int:
    """The most values of `size` bytes alive in a forward pass without gradients, for each token and
    feature. In a single block: its input, norm, queries, keys, values, and the widest layer's
    input, output and activation; rotary embedding and peft's LoRA work in float32."""
    if size == SINGLE:
        return 16
    return 28 if method == "lora" else 18
