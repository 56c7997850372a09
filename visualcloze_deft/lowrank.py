"""FLUX LoRA files: one set of low-rank changes of weights under the names of several tools.

A change of a layer's weight (o i) is B A, all scales within: A (r i) is "down", B (o r) "up".
diffusers keeps attention's projections apart; the original FLUX code, whose names kohya's
scripts and ComfyUI use, fuses them into one layer, rows below rows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from visualcloze_deft.errors import UserError

HEADER = "lora_adapter_metadata"  # where diffusers' own files state settings, scales among them
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


def split(changes: Mapping[str, Change], shapes: Shapes) -> dict[str, Change]:
    """The inverse of `fuse`; ranks that a part does not use are left out of it."""
    found = {}
    for original, members in originals(shapes).items():
        if original not in changes:
            continue
        a, b = changes[original]
        b = swap_halves(b) if original == SWAPPED else b
        sizes = [shapes[name][0] for name in members]
        if b.shape[0] != sum(sizes):
            raise UserError(f"{original}: {b.shape[0]} outputs in the file, {sum(sizes)} here")
        for name, part in zip(members, b.split(sizes), strict=True):
            used = part.abs().amax(dim=0) > 0
            if used.any():
                found[name] = (a[used], part[:, used])
    return found


def swap_halves(b: Tensor) -> Tensor:
    upper, lower = b.chunk(2)
    return torch.cat([lower, upper])


def write(
    path: Path,
    changes: Mapping[str, Change],
    kind: FileFormat,
    *,
    shapes: Shapes,
    metadata: Mapping[str, str],
) -> None:
    """Write `changes` (by diffusers' layer names) as a LoRA file for a kind of tool."""
    tensors: dict[str, Tensor] = {}
    if kind == "diffusers":
        for name, (a, b) in changes.items():
            tensors |= {
                f"transformer.{name}.lora_A.weight": a,
                f"transformer.{name}.lora_B.weight": b,
            }
    else:
        for name, (a, b) in fuse(changes, shapes).items():
            if kind == "comfyui":
                whole = f"diffusion_model.{name}"
                tensors |= {f"{whole}.lora_A.weight": a, f"{whole}.lora_B.weight": b}
            else:
                whole = f"lora_unet_{name.replace('.', '_')}"
                tensors |= {f"{whole}.lora_down.weight": a, f"{whole}.lora_up.weight": b}
                tensors[f"{whole}.alpha"] = torch.tensor(float(len(a)))  # scale alpha / r = 1
    save_file(
        {name: t.cpu().contiguous() for name, t in tensors.items()},
        path,
        {"format": "pt", **metadata},
    )


def read(path: Path, *, shapes: Shapes) -> dict[str, Change]:
    """The changes (by diffusers' layer names, float32) of a FLUX LoRA file of any known naming.

    Raises `UserError` where the file is damaged, holds what is no LoRA of FLUX's transformer, or
    does not fit `shapes`.
    """
    try:
        tensors = {
            name: tensor.float() if tensor.is_floating_point() else tensor
            for name, tensor in load_file(path).items()
        }
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {}).get(HEADER, "{}"))
    except (SafetensorError, OSError) as error:
        raise UserError(f"LoRA {path}: damaged, or no safetensors file ({error})") from None
    except ValueError as error:
        raise UserError(f"LoRA {path}: its header's {HEADER} is no JSON ({error})") from None
    check_header(about, path)
    bad = [name for name, t in tensors.items() if not t.isfinite().all()]
    if bad:
        raise UserError(f"LoRA {path}: {bad[0]} holds values that are not finite")
    original: dict[str, Change] = {}
    found: dict[str, Change] = {}
    short = {name.replace(".", "_"): name for name in originals(shapes)}
    for key, change in pairs(tensors, path):
        name = re.sub(r"^(transformer\.|diffusion_model\.|base_model\.model\.|lora_unet_)", "", key)
        name = short.get(name, name)
        change = (change[0], header_scale(about, name, len(change[0]), path) * change[1])
        if name in shapes:
            found[name] = change
        elif name in short.values():
            original[name] = change
        else:
            raise UserError(
                f"LoRA {path}: {key} is no layer of this transformer; names look like "
                f"{next(iter(shapes))}"
            )
    found |= split(original, shapes)
    if not any(b.any() for _, b in found.values()):
        raise UserError(f"LoRA {path}: it changes nothing: all its up matrices are zero")
    for name, (a, b) in found.items():
        if (b.shape[0], a.shape[1]) != tuple(shapes[name]):
            raise UserError(
                f"LoRA {path}: {name} changes a weight of {b.shape[0]} x {a.shape[1]}, here it has "
                f"{shapes[name][0]} x {shapes[name][1]}"
            )
    return found


def check_header(about: object, path: Path) -> None:
    """Raise `UserError` unless the settings in diffusers' header can be what they should be."""
    where = f"LoRA {path}: its header's {HEADER}"
    if not isinstance(about, dict):
        raise UserError(f"{where} must be an object, not {str(about)[:60]!r}")
    for key, value in about.items():
        name = key.rpartition(".")[2]
        if name in ("alpha_pattern", "rank_pattern"):
            if not isinstance(value, dict | None):
                raise UserError(f"{where}: {key} must be an object, not {value!r}")
            for pattern, number in (value or {}).items():
                _check_number(f"{where}: {key} of {pattern!r}", number)
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise UserError(
                        f"{where}: {key} {pattern!r} is no regular expression: {error}"
                    ) from None
        elif name in ("lora_alpha", "r") and value is not None:
            _check_number(f"{where}: {key}", value)


def _check_number(where: str, value: object) -> None:
    if not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise UserError(f"{where} must be a number above 0, not {value!r}")


def header_scale(about: Mapping[str, Any], name: str, rank: int, path: Path) -> float:
    """The scale of a layer that diffusers' header states beside the tensors, 1 without one."""
    settings = {
        key.removeprefix("transformer."): value
        for key, value in about.items()
        if not key.startswith("text_encoder")
    }
    if settings.get("use_dora"):
        raise UserError(f"LoRA {path}: DoRA cannot be read; give a plain LoRA")

    def of_layer(pattern: str, common: str) -> Any:
        for key, value in (settings.get(pattern) or {}).items():
            if re.fullmatch(rf"(.*\.)?({key})", name):  # as peft matches them
                return value
        return settings.get(common)

    alpha = of_layer("alpha_pattern", "lora_alpha")
    if alpha is None:
        return 1.0
    rank = of_layer("rank_pattern", "r") or rank
    return float(alpha) / (rank**0.5 if settings.get("use_rslora") else rank)


_ENDS = {
    ".lora_A.weight": ".lora_B.weight",
    ".lora_down.weight": ".lora_up.weight",
    ".lora.down.weight": ".lora.up.weight",
}


def pairs(tensors: Mapping[str, Tensor], path: Path) -> Iterator[tuple[str, Change]]:
    """Layer names as in the file, without those of text encoders, and their scaled changes."""
    left = {name for name in tensors if not name.startswith(("lora_te", "text_encoder"))}
    if not left:
        raise UserError(f"LoRA {path}: it changes text encoders only; those stay as they are here")
    for down, up in _ENDS.items():
        for key in sorted(name for name in left if name.endswith(down)):
            layer = key.removesuffix(down)
            if layer + up not in tensors:
                raise UserError(f"LoRA {path}: {key} has no partner {layer + up}")
            a, b = tensors[key].float(), tensors[layer + up].float()
            if a.ndim != 2 or b.ndim != 2 or len(a) != b.shape[1] or not len(a):
                raise UserError(f"LoRA {path}: {key} and its partner are no matrices of one rank")
            alpha = tensors.get(f"{layer}.alpha")
            if alpha is not None and alpha.numel() != 1:
                raise UserError(f"LoRA {path}: {layer}.alpha holds {alpha.numel()} values, not one")
            scale = 1.0 if alpha is None else float(alpha) / len(a)
            if scale == 0:
                raise UserError(f"LoRA {path}: {layer}.alpha is 0, so it changes nothing")
            left -= {key, layer + up, f"{layer}.alpha"}
            yield layer, (a, scale * b)
    if left:
        raise UserError(
            f"LoRA {path}: {sorted(left)[0]} is no part of a LoRA; LoHa, LoKr, DoRA and trained "
            "biases or norms cannot be read"
        )
