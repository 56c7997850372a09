"""DEFT, PaRa and LoRA on a FLUX transformer, through peft: attach, group, save, load.

Names, settings and files are peft's; LoRA's layers too, while DEFT's and PaRa's are `deft`'s.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from peft import DeftConfig, LoraConfig, PeftConfig, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from visualcloze_deft import deft, tensorfile
from visualcloze_deft.errors import UserError, reading
from visualcloze_deft.lowrank import Change
from visualcloze_deft.modelfolder import CONFIG, WEIGHTS, adapter_settings, loading
from visualcloze_deft.modelsize import FLUX_LAYERS
from visualcloze_deft.patterns import matches, matching
from visualcloze_deft.settings import Adapter

NAME = "default"  # peft's name for the adapter inside the model


def layers(settings: Adapter) -> str:
    return FLUX_LAYERS if settings.layers == "flux" else settings.layers


def peft_config(settings: Adapter) -> PeftConfig:
    if settings.method == "lora":
        return LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha or settings.rank,
            lora_dropout=settings.dropout,
            target_modules=layers(settings),
        )
    return DeftConfig(
        r=settings.rank,
        alpha=settings.alpha,
        deft_dropout=settings.dropout,
        target_modules=layers(settings),
        decomposition_method="relu" if settings.method == "deft-relaxed" else "qr",
        para=settings.method == "para",
    )


def attach(
    transformer: FluxTransformer2DModel,
    settings: Adapter,
    *,
    seed: int,
    whole: Callable[[Tensor], AbstractContextManager[object]] = nullcontext,
) -> None:
    """Freeze `transformer` and add a trainable float32 adapter; DEFT and LoRA start as identity.

    whole: gives a context in which a weight can be read, where it is split over processes.

    Raises `UserError` where `settings.layers` matches no layer, or one that is not linear.
    """
    modules = dict(transformer.named_modules())
    matched = {n: modules[n] for n in matching("adapter.layers", layers(settings), modules)}
    check_bare(transformer)
    other = [name for name, module in matched.items() if not isinstance(module, nn.Linear)]
    if other or not matched:
        linear = [n for n, m in transformer.named_modules() if isinstance(m, nn.Linear)]
        shown = ", ".join(other[:3]) + (f" and {len(other) - 3} more" if len(other) > 3 else "")
        found = f"{shown}, which is no linear layer" if other else "no linear layer"
        raise UserError(
            f"adapter.layers {settings.layers!r} matches {found}; names look like {linear[-2]}"
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
        add(transformer, peft_config(settings))
    keep_single_precision(transformer)
    deft.adopt(transformer)
    for layer in deft.layers(transformer).values():
        with whole(layer.get_base_layer().weight):
            layer.start(NAME)
    deft.share_factors(transformer)


def check_bare(transformer: nn.Module) -> None:
    if any(isinstance(module, BaseTunerLayer) for module in transformer.modules()):
        raise UserError("this transformer has an adapter already; load the base again")


def add(transformer: FluxTransformer2DModel, config: PeftConfig) -> None:
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


def kind(name: str) -> str:
    """Which part of its layer the adapter parameter `name` is.

    >>> kind("transformer_blocks.0.ff.net.2.deft_P.default"), kind("proj_out.lora_A.default.weight")
    ('P', 'A')
    """
    return name.partition(f".{NAME}")[0][-1]


def parameter_groups(
    transformer: nn.Module, settings: Adapter, *, lr: float
) -> list[dict[str, Any]]:
    """Optimiser groups: DEFT's P at `p_lr_ratio` times `lr`, all else at `lr`."""
    slow = settings.method in ("deft", "deft-relaxed")
    directions: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in trainable(transformer).items():
        (directions if slow and "deft_P" in name else others).append(parameter)
    groups = [
        {"params": directions, "lr": lr * settings.p_lr_ratio},
        {"params": others, "lr": lr},
    ]
    return [group for group in groups if group["params"]]


def method_of(config: PeftConfig) -> str:
    """What `adapter.method` is for an adapter of this kind."""
    if not isinstance(config, DeftConfig):
        return "lora"
    if config.para:
        return "para"
    return "deft-relaxed" if config.decomposition_method == "relu" else "deft"


def file_name(name: str) -> str:
    """The name in peft's file of the adapter parameter `name` of the model."""
    return f"base_model.model.{name.replace(f'.{NAME}', '')}"


def state(transformer: nn.Module) -> dict[str, Tensor]:
    """The adapter's tensors as in peft's file."""
    found = get_peft_model_state_dict(transformer, adapter_name=NAME)
    return {f"base_model.model.{name}": t.detach().cpu().contiguous() for name, t in found.items()}


def state_of(transformer: nn.Module, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """`state` from the adapter's whole parameters by their name in `transformer`."""
    tensors = dict(parameters)
    for name, layer in deft.layers(transformer).items():
        deft.change_signs(layer, tensors, f"{name}.")
    return {file_name(name): tensor for name, tensor in tensors.items()}


def save(
    transformer: FluxTransformer2DModel,
    folder: Path,
    *,
    base: str,
    tensors: dict[str, Tensor] | None = None,
    metadata: dict[str, str] | None = None,
) -> None:
    """Write peft's two files to `folder`, which must exist. `tensors`: `state` gathered before."""
    config = transformer.peft_config[NAME].to_dict()
    config |= {"base_model_name_or_path": base, "inference_mode": True}
    for key, value in config.items():
        if isinstance(value, set):
            config[key] = sorted(value)
    (folder / CONFIG).write_text(json.dumps(config, indent=2, default=str), encoding="utf-8")
    tensorfile.save(tensors or state(transformer), folder / WEIGHTS, metadata)


def load(
    transformer: FluxTransformer2DModel,
    folder: Path,
    *,
    trainable: bool = False,
    dropout: float | None = None,
) -> None:
    """Add the adapter saved in `folder` (peft's format) to `transformer`.

    dropout: instead of the one in the folder's settings.

    Raises `UserError` where files are missing or truncated, or made for another model or rank.
    """
    check_bare(transformer)
    config = read_config(folder)
    tensors = read_weights(folder)
    config.inference_mode = not trainable
    if dropout is not None:
        setattr(
            config, "deft_dropout" if isinstance(config, DeftConfig) else "lora_dropout", dropout
        )
    check_patterns(transformer, folder, config)
    check_ranks(folder, config, tensors)
    transformer.requires_grad_(False)
    try:
        with loading(f"adapter {folder}", "its settings do not fit this model"):
            add(transformer, config)
        check_fit(transformer, folder, config, tensors)
    except UserError:
        detach(transformer)
        raise
    keep_single_precision(transformer)
    if not trainable:
        transformer.requires_grad_(False)  # diffusers makes what it adds trainable
    deft.adopt(transformer)
    deft.share_factors(transformer)
    set_peft_model_state_dict(
        transformer, {k.removeprefix("base_model.model."): v for k, v in tensors.items()}, NAME
    )


def check_patterns(transformer: nn.Module, folder: Path, config: PeftConfig) -> None:
    """Raise `UserError` for a regular expression in an adapter's settings that is none, or takes
    too long: peft matches each with every layer's name."""
    found: list[str] = []
    for name in ("target_modules", "exclude_modules", "layers_pattern"):
        told = getattr(config, name)
        found += [told] if isinstance(told, str) else []
    for name in ("rank_pattern", "alpha_pattern") if isinstance(config, LoraConfig) else ():
        found += [rf"(.*\.)?({key})" for key in getattr(config, name) or ()]
    names = [name for name, _ in transformer.named_modules()]
    matches(f"{folder / CONFIG}", found, names)


def check_ranks(folder: Path, config: PeftConfig, tensors: dict[str, Tensor]) -> None:
    """Raise `UserError` where settings name a rank that no tensor has: layers of it would be made
    first, however large."""
    ranks = {config.r}
    if isinstance(config, LoraConfig):
        ranks |= {*(config.rank_pattern or {}).values()}
    sides = [side for tensor in tensors.values() for side in tensor.shape]
    if max(ranks) > max(sides, default=0):
        raise UserError(
            f"{folder / CONFIG}: rank {max(ranks)}, and no tensor of {WEIGHTS} is that large"
        )


def check_fit(
    transformer: nn.Module, folder: Path, config: PeftConfig, tensors: dict[str, Tensor]
) -> None:
    """Raise `UserError` unless a file's tensors are those of the layers that were added."""
    expected = {
        file_name(name): parameter.shape
        for name, parameter in transformer.named_parameters()
        if f".{NAME}" in name
    }
    if set(expected) != set(tensors):
        odd = sorted(set(expected) ^ set(tensors))
        raise UserError(
            f"adapter {folder}: made for another model; {len(odd)} of its layers and the model's "
            f"do not pair, e.g. {odd[0]}"
        )
    for name, tensor in tensors.items():
        if tensor.shape != expected[name]:
            raise UserError(
                f"adapter {folder}: {name} has shape {tuple(tensor.shape)}, this model and rank "
                f"{config.r} need {tuple(expected[name])}"
            )


def changes_of(transformer: nn.Module, strength: float = 1.0) -> dict[str, Change]:
    """The change of every adapted layer's weight as A (r i) and B (o r) in float32."""
    found = {}
    for name, layer in transformer.named_modules():
        if isinstance(layer, deft.DeftLinear):
            q, a = layer.factors(NAME)
            found[name] = (strength * a, q)
        elif isinstance(layer, LoraLayer):
            a, b = (part[NAME].weight for part in (layer.lora_A, layer.lora_B))
            scale = strength * layer.scaling[NAME]
            found[name] = (a.detach().float(), scale * b.detach().float())
    return found


def detach(transformer: FluxTransformer2DModel) -> None:
    """Take the adapter off again; the layers are what they were before."""
    for name, layer in list(transformer.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            parent, _, last = name.rpartition(".")
            setattr(transformer.get_submodule(parent), last, layer.get_base_layer())
    if hasattr(transformer, "peft_config"):
        del transformer.peft_config
    transformer._hf_peft_config_loaded = False


def read_config(folder: Path) -> PeftConfig:
    fields, path = adapter_settings(folder), folder / CONFIG
    kind = fields.get("peft_type")
    if kind not in ("DEFT", "LORA"):
        raise UserError(f"{path}: peft_type {kind!r}; DEFT (with PaRa) and LORA are known")
    with reading(path, "no settings of an adapter"):
        return PeftConfig.from_peft_type(**fields)


def read_weights(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    if not path.is_file():
        raise UserError(f"adapter {folder}: no {WEIGHTS} there")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: damaged or truncated ({error}); save or copy it again") from None
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise UserError(f"{path}: {name} holds values that are not finite; use another step's")
    return tensors
