"""Low-rank changes of FLUX's weights, and LoRA files of them under the names of several tools.

A change of a layer's weight (o i) is B A, all scales within: A (r i) is "down", B (o r) "up".
diffusers keeps attention's projections apart; the original FLUX code, whose names kohya's
scripts and ComfyUI use, fuses them into one layer, rows below rows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Literal, cast

import torch
from torch import Tensor, nn

from visualcloze_deft.backbones import tensor_files

Change = tuple[Tensor, Tensor]  # A (r i), B (o r)
Shapes = Mapping[str, tuple[int, int]]  # layer in diffusers' naming -> (o, i)
FileFormat = Literal["diffusers", "comfyui", "kohya"]

# Original name -> names in diffusers, from black-forest-labs/flux and diffusers' own converter.
DOUBLE = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "img_attn.proj": ("attn.to_out.0",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "img_mod.lin": ("norm1.linear",),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "txt_attn.proj": ("attn.to_add_out",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
    "txt_mod.lin": ("norm1_context.linear",),
}
SINGLE = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation.lin": ("norm.linear",),
}
BLOCKS = {
    "double_blocks": ("transformer_blocks", DOUBLE),
    "single_blocks": ("single_transformer_blocks", SINGLE),
}
OTHERS = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
SWAPPED = "final_layer.adaLN_modulation.1"  # shift above scale there, scale above shift here


def originals(names: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Original layer -> its parts in diffusers' naming, for a transformer with layers `names`."""
    found: dict[str, tuple[str, ...]] = {
        original: (name,) for original, name in OTHERS.items() if name in names
    }
    for group, (ours, table) in BLOCKS.items():
        numbers = {int(m[1]) for name in names if (m := re.match(rf"{ours}\.(\d+)\.", name))}
        for k in sorted(numbers):
            for original, parts in table.items():
                members = tuple(f"{ours}.{k}.{part}" for part in parts)
                if all(member in names for member in members):
                    found[f"{group}.{k}.{original}"] = members
    return found


def fuse(changes: Mapping[str, Change], shapes: Shapes) -> dict[str, Change]:
    """The changes of the original layers: parts share no rank, so B is zero between them."""
    found = {}
    for original, members in originals(shapes).items():
        present = [name for name in members if name in changes]
        if not present:
            continue
        a = torch.cat([changes[name][0] for name in present])
        b = a.new_zeros(sum(shapes[name][0] for name in members), len(a))
        row = column = 0
        for name in members:
            if name in changes:
                part = changes[name][1]
                b[row : row + part.shape[0], column : column + part.shape[1]] = part
                column += part.shape[1]
            row += shapes[name][0]
        found[original] = (a, swap_halves(b) if original == SWAPPED else b)
    return found


def split(change: Change, members: Sequence[str], shapes: Shapes) -> dict[str, Change]:
    """The changes of the layers `members`, whose rows one layer held; ranks that a part does not
    use are left out of it. Raises `ValueError` where the rows are not theirs."""
    a, b = change
    sizes = [shapes[name][0] for name in members]
    if b.shape[0] != sum(sizes):
        raise ValueError(f"{b.shape[0]} outputs in the file, {sum(sizes)} here")
    found = {}
    for name, part in zip(members, b.split(sizes), strict=True):
        used = part.abs().amax(dim=0) > 0
        if used.any():
            found[name] = (a[used], part[:, used])
    return found


def swap_halves(b: Tensor) -> Tensor:
    upper, lower = b.chunk(2)
    return torch.cat([lower, upper])


def layers_of(
    changes: Mapping[str, Change], kind: FileFormat, shapes: Shapes
) -> Mapping[str, Change]:
    """The changes of the layers that a file of `kind` names."""
    return changes if kind == "diffusers" else fuse(changes, shapes)


def write(
    path: Path,
    changes: Mapping[str, Change],
    kind: FileFormat,
    *,
    shapes: Shapes,
    metadata: Mapping[str, str],
    hashes: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Write `changes` (by diffusers' layer names) as a LoRA file for a kind of tool. hashes: see
    `tensor_files.save`."""
    tensors: dict[str, Tensor] = {}
    layers = layers_of(changes, kind, shapes)
    if kind == "diffusers":
        for name, (a, b) in layers.items():
            tensors |= {
                f"transformer.{name}.lora_A.weight": a,
                f"transformer.{name}.lora_B.weight": b,
            }
    else:
        for name, (a, b) in layers.items():
            if kind == "comfyui":
                whole = f"diffusion_model.{name}"
                tensors |= {f"{whole}.lora_A.weight": a, f"{whole}.lora_B.weight": b}
            else:
                whole = f"lora_unet_{name.replace('.', '_')}"
                tensors |= {f"{whole}.lora_down.weight": a, f"{whole}.lora_up.weight": b}
                tensors[f"{whole}.alpha"] = torch.tensor(float(len(a)))  # scale alpha / r = 1
    on_host = {name: t.cpu().contiguous() for name, t in tensors.items()}
    tensor_files.save(on_host, path, metadata, hashes=hashes)


def layer_shapes(transformer: nn.Module) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of every linear layer, those under an adapter by their own name."""
    return {
        name.removesuffix(".base_layer"): (module.out_features, module.in_features)
        for name, module in transformer.named_modules()
        if isinstance(module, nn.Linear) and ".lora_" not in name
    }


def merge(
    network: nn.Module,
    changes: Mapping[str, Change],
    *,
    dtype: torch.dtype | None = None,
    merged: Callable[[nn.Module], None] | None = None,
) -> None:
    """Add `changes` to the weights of a plain network for good, in float32 and rounded once.

    dtype: what the changed weights become, by default what they were. merged: called on each layer
    that was changed.
    """
    for name, (a, b) in changes.items():
        layer = cast(nn.Linear, network.get_submodule(name))
        weight = layer.weight
        weight.data = (weight.data.float() + b @ a).to(dtype or weight.dtype)
        if merged is not None:
            merged(layer)
