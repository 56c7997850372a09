"""The fused kernels that a transformer computes with, and others for where one of them fails."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from diffusers.models.attention import AttentionModuleMixin
from torch import Tensor, nn

from visualcloze_deft.backbones import attention, attention_check
from visualcloze_deft.backbones.attention import Shared
from visualcloze_deft.backbones.attention_check import Shapes
from visualcloze_deft.backbones.precision import dtype_of
from visualcloze_deft.backbones.table import backbone_of
from visualcloze_deft.config.run_settings import Run

Norms = Literal["fused", "composed"]
Suspect = Literal["attention", "norm", "none"]
"""The kernel that a fault may come from."""


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """attention: a name of `attention.BACKENDS`. norms: "fused", torch's RMSNorm and LayerNorm, or
    "composed", the same formulas as several operations."""

    attention: str = attention.NATIVE
    norms: Norms = "fused"

    def __str__(self) -> str:
        norms = "" if self.norms == "fused" else " and norms composed of single operations"
        return f"attention {self.attention}{norms}"


def shapes_in(run: Run, *, image_tokens: Collection[int], device: torch.device) -> Shapes:
    """The shapes of attention in `run` on `device`, for grids of so many tokens beside the text."""
    backbone = backbone_of(run.model)
    model, text = backbone.sizes(run.model), backbone.text_tokens(run.model)
    return Shapes(
        lengths=tuple(sorted({text + tokens for tokens in image_tokens})),
        heads=model.heads,
        width=model.head,
        dtype=dtype_of(run.precision, device.type),
        device=device,
        compiled=run.compile,
    )


def use(denoiser: nn.Module, kernels: Kernels) -> None:
    """Have `denoiser` compute with `kernels`; weights, names and hooks stay as they are."""
    attention.use(denoiser, kernels.attention)
    for module in denoiser.modules():
        kind = NORMS[kernels.norms].get(type(module))
        if kind is not None:
            module.__class__ = kind


def suspect(module: nn.Module) -> Suspect:
    """Which kernel a module calls itself, not through a module inside."""
    if isinstance(module, AttentionModuleMixin):
        return "attention"
    return "norm" if isinstance(module, nn.RMSNorm | nn.LayerNorm) else "none"


def remedies(
    kernels: Kernels, suspected: Suspect, shapes: Shapes, *, shared: Shared = attention.alone
) -> Iterator[Kernels]:
    """What to compute with in place of `kernels` where the suspected one has failed.

    Other backends of attention come fastest first, each after the test of its results.
    """
    if suspected == "norm" and kernels.norms == "fused":
        yield replace(kernels, norms="composed")
    if suspected == "attention":
        for name in attention.candidates(shapes, passes="both"):
            if name == kernels.attention:
                continue
            attend = attention.attend_as_used(name)
            if shared(attention_check.fault_of(attend, shapes, passes="both")) is None:
                yield replace(kernels, attention=name)


class ComposedRMSNorm(nn.RMSNorm):
    """torch's RMSNorm as single operations in float32, rounded once at the end.

    On GPUs torch computes both of its passes in one kernel each.
    """

    def forward(self, x: Tensor) -> Tensor:
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        wide, kept = x.float(), tuple(range(-len(self.normalized_shape), 0))
        normed = wide * torch.rsqrt(wide.square().mean(kept, keepdim=True) + eps)
        return (normed if self.weight is None else normed * self.weight).to(x.dtype)


class ComposedLayerNorm(nn.LayerNorm):
    """torch's LayerNorm as single operations in float32, rounded once at the end."""

    def forward(self, x: Tensor) -> Tensor:
        wide, kept = x.float(), tuple(range(-len(self.normalized_shape), 0))
        centred = wide - wide.mean(kept, keepdim=True)
        normed = centred * torch.rsqrt(centred.square().mean(kept, keepdim=True) + self.eps)
        if self.weight is not None:
            normed = normed * self.weight
        return (normed if self.bias is None else normed + self.bias).to(x.dtype)


NORMS: dict[Norms, dict[type[nn.Module], type[nn.Module]]] = {
    "composed": {nn.RMSNorm: ComposedRMSNorm, nn.LayerNorm: ComposedLayerNorm},
    "fused": {ComposedRMSNorm: nn.RMSNorm, ComposedLayerNorm: nn.LayerNorm},
}
