"""An exported file, read back and compared with the adapter that it was made of."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from visualcloze_deft.adapters import methods
from visualcloze_deft.adapters.deft import deft_linear
from visualcloze_deft.backbones.lora_names import Change
from visualcloze_deft.backbones.table import backbone_of_network
from visualcloze_deft.errors import UserError

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-3}  # of the change
NOISE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-3}  # of the output
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 3e-3, torch.float16: 4e-4}  # of a weight


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was written and who read it again. Errors are relative to the adapter's change.

    weights: the largest error of a layer's change as the reader holds it, the rounding of merged
    weights included; output: that of the transformer's output, None where the change is lost in
    the base's rounding. Both None where nothing was verified.
    """

    path: Path
    reader: str = ""
    weights: float | None = None
    output: float | None = None
    notes: tuple[str, ...] = ()


def probe(name: str, a: Tensor) -> Tensor:
    """Random vectors (i, 4) for the layer `name`, whose inputs `a` (r i) has."""
    return torch.randn(a.shape[1], 4, generator=torch.Generator().manual_seed(len(name)))


def frozen(transformer: nn.Module, name: str) -> Tensor:
    """The weight (o i) of a layer without its adapter, in float32."""
    layer = transformer.get_submodule(name)
    assert isinstance(layer, BaseTunerLayer)
    weight: Tensor = layer.get_base_layer().weight
    return weight.detach().float()


@torch.no_grad()
def change_error(
    loaded: nn.Module, changes: dict[str, Change], weights: dict[str, Tensor], rounding: float
) -> tuple[float, float]:
    """The largest error of a layer's change in what was loaded, relative to that change: as it is,
    and without what rounding explains.

    weights: each layer's W times its `probe`. rounding: of a weight that holds the change, 0 where
    the change stands beside it.
    """
    errors = [(0.0, 0.0)]
    for name, (a, b) in changes.items():
        v = probe(name, a)
        change = b @ (a @ v)
        if change.norm() == 0:
            continue
        layer = loaded.get_submodule(name)
        if isinstance(layer, LoraLayer):
            (active,) = layer.active_adapters
            down, up = (part[active].weight.float() for part in (layer.lora_A, layer.lora_B))
            found = layer.scaling[active] * (up @ (down @ v))
        elif isinstance(layer, BaseTunerLayer):
            found = layer.get_delta_weight(methods.NAME).float() @ v
        else:
            found = cast(nn.Linear, layer).weight.float() @ v - weights[name]
        off = (found - change).norm()
        beyond = (off - rounding * weights[name].norm()).clamp(min=0)
        errors.append(((off / change.norm()).item(), (beyond / change.norm()).item()))
    return max(error for error, _ in errors), max(beyond for _, beyond in errors)


def output_error(found: Tensor, live: Tensor, plain: Tensor, noise: float) -> float | None:
    """The error of `found` beyond rounding, relative to what the adapter changes.

    noise: what rounding may change, relative to the output. None where it hides the adapter.
    """
    change = (live - plain).float().norm()
    rounding = noise * live.float().norm()
    if change < 10 * rounding:
        return None
    return (((found - live).float().norm() - rounding).clamp(min=0) / change).item()


def check(report: Report, weights_beyond: float, allowed: float) -> None:
    """Raise `UserError` where an error is larger than `allowed`, rounding left aside."""
    for name, error in (("weights", weights_beyond), ("output", report.output)):
        if error is not None and not error <= allowed:
            raise UserError(
                f"export {report.path}: read by {report.reader}, its change of the {name} differs "
                f"from the adapter's by {error:.1e} of it, more than {allowed:.0e}; nothing was "
                "written"
            )


@torch.no_grad()
def answer(transformer: Any, scale: float) -> Tensor:
    """The denoiser's output on random inputs, its adapter at `scale`."""
    for layer in transformer.modules():
        if isinstance(layer, deft_linear.DeftLinear | LoraLayer) and scale != 1:
            layer.set_scale(methods.NAME, scale)
    networks = backbone_of_network(transformer).networks()
    inputs = networks.probe(transformer, torch.Generator().manual_seed(0))
    output: Tensor = transformer.eval()(**inputs, return_dict=False)[0]
    return output
