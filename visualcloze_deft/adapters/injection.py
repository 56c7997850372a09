"""DEFT, PaRa and LoRA on a denoiser, through peft: attach, group, read out.

Names, settings and files are peft's; LoRA's layers too, while DEFT's and PaRa's are `deft`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from peft import DeftConfig, PeftConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from visualcloze_deft.adapters.deft import deft_linear
from visualcloze_deft.adapters.method_table import METHODS
from visualcloze_deft.adapters.methods import NAME, file_name, kind, layers, peft_config
from visualcloze_deft.backbones.lora_names import Change
from visualcloze_deft.backbones.table import backbone_of_network
from visualcloze_deft.config.patterns import matching
from visualcloze_deft.config.run_settings import Adapter
from visualcloze_deft.errors import UserError


def attach(
    transformer: Any,
    settings: Adapter,
    *,
    seed: int,
    whole: Callable[[Tensor], AbstractContextManager[object]] = nullcontext,
) -> None:
    """Freeze `transformer` and add a trainable float32 adapter; DEFT and LoRA start as identity.

    whole: gives a context in which a weight can be read, where it is split over processes.

    Raises `UserError` where `settings.target_modules` matches no layer, or one that is not linear.
    """
    wanted = layers(settings, backbone_of_network(transformer).target_modules)
    modules = dict(transformer.named_modules())
    matched = {n: modules[n] for n in matching("adapter.target_modules", wanted, modules)}
    check_bare(transformer)
    other = [name for name, module in matched.items() if not isinstance(module, nn.Linear)]
    if other or not matched:
        linear = [n for n, m in transformer.named_modules() if isinstance(m, nn.Linear)]
        shown = ", ".join(other[:3]) + (f" and {len(other) - 3} more" if len(other) > 3 else "")
        found = f"{shown}, which is no linear layer" if other else "no linear layer"
        raise UserError(
            f"adapter.target_modules {settings.target_modules!r} matches {found}; names look like "
            f"{linear[-2]}"
        )
    for name, layer in matched.items():
        if settings.rank > min(layer.in_features, layer.out_features):
            raise UserError(
                f"adapter.rank {settings.rank}: larger than {name}, which has "
                f"{layer.in_features} inputs and {layer.out_features} outputs"
            )
    transformer.requires_grad_(False)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        add(transformer, peft_config(settings, wanted))
    keep_single_precision(transformer)
    deft_linear.adopt(transformer)
    for layer in deft_linear.layers(transformer).values():
        with whole(layer.get_base_layer().weight):
            layer.start(NAME)
    deft_linear.share_factors(transformer)


def check_bare(transformer: nn.Module) -> None:
    if any(isinstance(module, BaseTunerLayer) for module in transformer.modules()):
        raise UserError("this network has an adapter already; load the base again")


def add(transformer: Any, config: PeftConfig) -> None:
    """Add peft's layers without peft's start of DEFT, which fails on quantised weights."""
    if isinstance(config, DeftConfig):
        start, config.init_weights = config.init_weights, False
        transformer.add_adapter(config, adapter_name=NAME)
        config.init_weights = start
    else:
        transformer.add_adapter(config, adapter_name=NAME)


def keep_single_precision(transformer: nn.Module) -> None:
    """Make the adapter's parameters float32, where peft gave them the dtype of the base."""
    for name, parameter in transformer.named_parameters():
        if f".{NAME}" in name:
            parameter.data = parameter.data.float()


def trainable(transformer: nn.Module) -> dict[str, nn.Parameter]:
    """The adapter's parameters by their name in `transformer`."""
    return {name: p for name, p in transformer.named_parameters() if p.requires_grad}


def parameter_groups(
    transformer: nn.Module, settings: Adapter, *, lr: float
) -> list[dict[str, Any]]:
    """Optimiser groups: DEFT's P at `p_lr_ratio` times `lr`, all else at `lr`."""
    slow = METHODS[settings.method].slow
    directions: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in trainable(transformer).items():
        (directions if kind(name) == slow else others).append(parameter)
    groups = [
        {"params": directions, "lr": lr * settings.p_lr_ratio},
        {"params": others, "lr": lr},
    ]
    return [group for group in groups if group["params"]]


def state(transformer: nn.Module) -> dict[str, Tensor]:
    """The adapter's tensors as in peft's file."""
    found = get_peft_model_state_dict(transformer, adapter_name=NAME)
    return {f"base_model.model.{name}": t.detach().cpu().contiguous() for name, t in found.items()}


def state_of(transformer: nn.Module, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """`state` from the adapter's whole parameters by their name in `transformer`."""
    tensors = dict(parameters)
    for name, layer in deft_linear.layers(transformer).items():
        deft_linear.change_signs(layer, tensors, f"{name}.")
    return {file_name(name): tensor for name, tensor in tensors.items()}


def changes_of(transformer: nn.Module, scale: float = 1.0) -> dict[str, Change]:
    """The change of every adapted layer's weight as A (r i) and B (o r) in float32."""
    found = {}
    for name, layer in transformer.named_modules():
        if isinstance(layer, deft_linear.DeftLinear):
            q, a = layer.factors(NAME)
            found[name] = (scale * a, q)
        elif isinstance(layer, LoraLayer):
            a, b = (part[NAME].weight for part in (layer.lora_A, layer.lora_B))
            own = scale * layer.scaling[NAME]
            found[name] = (a.detach().float(), own * b.detach().float())
    return found


@contextmanager
def without_adapter(transformer: nn.Module) -> Iterator[None]:
    """Inside, the network computes as the base. Parameters stay trainable, as peft's
    `disable_adapters` would not leave them, and an engine around them notices nothing."""
    found = [m for m in transformer.modules() if isinstance(m, BaseTunerLayer)]
    before = [layer._disable_adapters for layer in found]
    for layer in found:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, disabled in zip(found, before, strict=True):
            layer._disable_adapters = disabled


def detach(transformer: Any) -> None:
    """Take the adapter off again; the layers are what they were before."""
    for name, layer in list(transformer.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            parent, _, last = name.rpartition(".")
            setattr(transformer.get_submodule(parent), last, layer.get_base_layer())
    if hasattr(transformer, "peft_config"):
        del transformer.peft_config
    transformer._hf_peft_config_loaded = False
