"""Frozen weights in 8 or 4 bits: FLUX's blocks in 12 or 6.5 GB, not 24.

Through bitsandbytes, int8 keeps a scale for each output (Dettmers et al. 2022, arXiv 2208.07339),
nf4 blocks of 64 values on the quantiles of a normal distribution (Dettmers et al. 2023, arXiv
2305.14314). fp8 needs torch alone: float8_e4m3fn (Micikevicius et al. 2022, arXiv 2209.05433) and a
scale for each output, computed with in the base's precision.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from visualcloze_deft.backbones.table import backbone_of_network
from visualcloze_deft.config.run_settings import Bits

ROWS = 512  # of a weight that are divided in float32 together


def quantise(denoiser: nn.Module, kind: Bits, *, device: str) -> None:
    """Replace the linear layers of all blocks by quantised ones on `device`, one by one.

    For weights that are in memory already; `layered_loading` reads those of files so.
    """
    if kind == "none":
        return
    in_block = layers_of(backbone_of_network(denoiser).blocks)
    for name in [name for name, _ in denoiser.named_modules() if in_block(name)]:
        layer = denoiser.get_submodule(name)  # no list of the layers would let one go
        if isinstance(layer, nn.Linear):
            denoiser.set_submodule(name, quantised(layer, kind).to(device))


def layers_of(blocks: str) -> Callable[[str], bool]:
    """Whether a layer is in one of the blocks that a regular expression names, whose linear layers
    are quantised.

    >>> in_block = layers_of("(single_)?transformer_blocks[.][0-9]+")
    >>> in_block("transformer_blocks.0.ff.net.2"), in_block("x_embedder")
    (True, False)
    """
    pattern = re.compile(rf"({blocks})\..*")
    return lambda name: pattern.fullmatch(name) is not None


def quantised(layer: nn.Linear, kind: Bits) -> nn.Linear:
    """A layer that will hold the same weight in `kind` once it is moved to a device."""
    if kind == "fp8":
        return Float8Linear(layer)
    from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit

    size, bias = (layer.in_features, layer.out_features), layer.bias is not None
    weight = layer.weight.data
    if kind == "int8":
        small = Linear8bitLt(*size, bias=bias, has_fp16_weights=False, device="meta")
        small.weight = Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    else:
        small = Linear4bit(
            *size, bias=bias, compute_dtype=weight.dtype, quant_type="nf4", device="meta"
        )
        # On CPUs with AVX512 it would pack its weight anew at the first generation, for widths of
        # whole blocks only (bitsandbytes 0.50), and DEFT could not read it any more.
        small.support_avx512bf16_for_cpu = False
        small.weight = Params4bit(weight, requires_grad=False, quant_type="nf4", module=small)
    if bias:
        small.bias = nn.Parameter(layer.bias.data, requires_grad=False)
    found: nn.Linear = small
    return found


class Float8Linear(nn.Linear):
    """A frozen layer whose weight is kept in float8_e4m3fn and a float32 scale for each output.

    diffusers' layerwise casting is not for training: the weight is back in 8 bits when the backward
    pass reads it, and what torch would save instead is the whole cast weight.
    """

    scale: Tensor

    def __init__(self, layer: nn.Linear) -> None:
        bias = layer.bias is not None
        super().__init__(layer.in_features, layer.out_features, bias=bias, device="meta")
        weight = layer.weight.data
        largest = torch.linalg.vector_norm(weight, torch.inf, dim=1).float()
        scale = largest.clamp(min=1e-12) / torch.finfo(torch.float8_e4m3fn).max
        small = torch.empty_like(weight, dtype=torch.float8_e4m3fn)
        for into, rows, own in zip(*(x.split(ROWS) for x in (small, weight, scale)), strict=True):
            into.copy_(rows.float() / own[:, None])
        # as bytes: a change of the module's precision, or what sends parameters to other processes,
        # then leaves them alone
        self.weight = nn.Parameter(small.view(torch.uint8), requires_grad=False)
        self.register_buffer("scale", scale)
        self.compute_dtype = layer.weight.dtype
        if bias:
            self.bias = nn.Parameter(layer.bias.data, requires_grad=False)

    def dense(self) -> Tensor:
        """The weight (o i) in the base's precision."""
        values = self.weight.view(torch.float8_e4m3fn).to(self.compute_dtype)
        return values.mul_(self.scale[:, None].to(self.compute_dtype))

    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = _Float8Product.apply(x, self)
        return product


class _Float8Product(torch.autograd.Function):
    """x W^T + b, whose backward pass makes W again: nothing is saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Float8Linear) -> Tensor:
        ctx.layer = layer
        return nn.functional.linear(x, layer.dense(), layer.bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.layer.dense(), None


def dense(layer: nn.Linear) -> Tensor:
    """A layer's weight (o i) in floating point: as it is, or out of its quantised form."""
    weight: Any = layer.weight
    if weight.is_floating_point():
        dense_already: Tensor = weight
        return dense_already
    if isinstance(layer, Float8Linear):
        return layer.dense()
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear8bitLt

    if isinstance(layer, Linear8bitLt):
        values: Tensor = weight.data if layer.state.CB is None else layer.state.CB
        scales: Tensor = weight.SCB if layer.state.SCB is None else layer.state.SCB
        return values.to(scales.dtype) * (scales[:, None] / 127)  # largest value of a row: 127
    found: Tensor = dequantize_4bit(weight.data, weight.quant_state)
    return found


def precision_of(layer: nn.Linear) -> torch.dtype:
    """The precision of `dense`."""
    weight: Any = layer.weight
    if weight.is_floating_point():
        return cast(torch.dtype, weight.dtype)
    if isinstance(layer, Float8Linear):
        return layer.compute_dtype
    from bitsandbytes.nn import Linear8bitLt

    scales = torch.float32  # int8's
    return (
        scales if isinstance(layer, Linear8bitLt) else cast(torch.dtype, weight.quant_state.dtype)
    )


def is_quantised(layer: nn.Linear) -> bool:
    return not torch.is_floating_point(layer.weight)
