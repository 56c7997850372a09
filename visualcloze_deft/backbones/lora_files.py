"""The one reader of FLUX LoRA files: whatever tool wrote them, used whole or refused by name."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from visualcloze_deft.backbones.flux_fill.files import CHANNELS, check_folder
from visualcloze_deft.backbones.lora_names import (
    SWAPPED,
    Change,
    Shapes,
    originals,
    split,
    swap_halves,
)
from visualcloze_deft.backbones.lora_places import lora_file
from visualcloze_deft.backbones.model_settings import AdapterFile
from visualcloze_deft.backbones.peft_files import WEIGHTS, adapter_settings
from visualcloze_deft.backbones.table import backbone_of
from visualcloze_deft.config.patterns import matches
from visualcloze_deft.errors import UserError, reading
from visualcloze_deft.runtime.launch import say_once
from visualcloze_deft.storage.adapter_places import CONFIG
from visualcloze_deft.storage.settings_files import check_fields
from visualcloze_deft.storage.text_files import brief, parse_json

TextEncoders = Literal["refused", "left out"]

HEADER = "lora_adapter_metadata"  # where diffusers' own files state settings, scales among them
TEXT_ENCODERS = ("lora_te", "text_encoder", "clip_l.", "clip_g.", "t5.")
ALPHA = ".alpha"

# A tensor's name: its layer, which matrix it is, and maybe peft's name of the adapter. XLabs
# numbers a layer behind the word lora.
_MATRIX = re.compile(
    r"(?P<layer>.+?)(?:\.lora_(?P<peft>[AB])|[._]lora(?P<number>\d?)[._](?P<way>down|up))"
    r"(?:\.(?!(?:weight|bias)$)[^.]+)?(?:\.weight)?$"
)
_WRAPPER = re.compile(r"\b(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_PREFIX = re.compile(
    r"^(?:(?:transformer|diffusion_model|base_model|model|module|unet)\."
    r"|lora_unet_|lora_transformer_|lycoris_|_orig_mod_)+"
)
_XLABS = {  # its single blocks' queries, keys and values are three of the four parts of linear1
    "double_blocks.{}.processor.qkv1": "double_blocks.{}.img_attn.qkv",
    "double_blocks.{}.processor.proj1": "double_blocks.{}.img_attn.proj",
    "double_blocks.{}.processor.qkv2": "double_blocks.{}.txt_attn.qkv",
    "double_blocks.{}.processor.proj2": "double_blocks.{}.txt_attn.proj",
    "single_blocks.{}.processor.proj": "single_blocks.{}.linear2",
}
_OTHERS = {  # what else such files hold, by a part of the name
    r"\.hada_": "LoHa",
    r"\.lokr_": "LoKr",
    r"\.oft_|\.boft_": "OFT",
    r"\.dora_scale|\.lora_magnitude_vector": "DoRA",
    r"\.lora_mid": "a LoRA with a Tucker core",
    r"\.(?:diff|diff_b|set_weight)$": "whole weights",
    r"\.bias$": "a bias",
    r"norm": "a norm",
}
_ADDED = re.compile(r"\.(?:diff|diff_b)$|\.lora_(?:B|up)\b.*\.bias$")  # zeros there add nothing
_MOVED = ("pissa", "olora", "corda", "loftq", "lora_ga")  # starts that change the base


def read(
    path: Path, *, shapes: Shapes, text_encoders: TextEncoders = "refused"
) -> dict[str, Change]:
    """The changes (by diffusers' layer names, float32) of a FLUX LoRA file of any known naming.

    Names: diffusers', peft's, those of the original FLUX code (ComfyUI), kohya's, OneTrainer's,
    LyCORIS' and XLabs', bare or behind prefixes and wrappers. Scales: tensors named alpha, the
    header that diffusers writes, or peft's settings beside its own file.

    A warning says what is filled up: the 64 inputs that `x_embedder` has in FLUX.1-dev, with zeros
    to the 384 of FLUX.1-Fill. text_encoders: what happens to a file with tensors for them, which
    have no place here.
    Raises `UserError` where the file is damaged, holds anything that would not be used, or does not
    fit `shapes`.
    """
    tensors, about = contents(path, text_encoders=text_encoders)
    rows = known_rows(shapes)
    found: dict[str, Change] = {}
    changed_by: dict[str, str] = {}
    layers = gathered(tensors, path)
    check_patterns(about, layers, path)
    for name, keys in layers.items():
        change = change_of(name, keys, tensors, about, path)
        key = keys["down"]
        if name not in rows:
            raise UserError(
                f"LoRA {path}: {key} is no layer of this transformer; names look like "
                f"{next(iter(shapes))}"
            )
        for member, part in rows[name].parts(change, shapes, f"LoRA {path}: {key}").items():
            if member in found:
                raise UserError(
                    f"LoRA {path}: {changed_by[member]} and {key} both change {member}; give a "
                    "file with one LoRA"
                )
            found[member] = fitting(member, part, shapes[member], path)
            changed_by[member] = key
    if not any(b.any() for _, b in found.values()):
        raise UserError(f"LoRA {path}: it changes nothing: all its up matrices are zero")
    return found


def changes_of(name: str, lora: str) -> dict[str, Change]:
    """What a LoRA, a file, folder or hub id, changes of the transformer of a model: see `read`."""
    return read(lora_file(lora), shapes=shapes_of(name))


def shapes_of(name: str) -> Shapes:
    """(outputs, inputs) of every linear layer of a model's transformer, without its weights."""
    check_folder(name, parts=("transformer",))
    linear = backbone_of(name).sizes(name).linear
    return {layer: (outputs, inputs) for layer, (inputs, outputs) in linear.items()}


def contents(
    path: Path, *, text_encoders: TextEncoders
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a file that are no text encoder's, and the settings that belong to them.

    Raises `UserError` for one that is neither a matrix nor the scale of a plain LoRA.
    """
    with reading(f"LoRA {path}", "damaged, or no safetensors file"):
        tensors = load_file(path)
        with safe_open(path, "pt") as file:
            header = (file.metadata() or {}).get(HEADER, "{}")
    about = parse_json(f"LoRA {path}: its header's {HEADER}", header)
    check_settings(about, f"LoRA {path}: its header's {HEADER}")
    if path.name == WEIGHTS and (path.parent / CONFIG).is_file():
        about |= beside(path)
    left_out = sorted(name for name in tensors if name.startswith(TEXT_ENCODERS))
    if left_out and len(left_out) == len(tensors):
        raise UserError(f"LoRA {path}: it changes text encoders only; those stay as they are here")
    if left_out and text_encoders == "refused":
        raise UserError(
            f"LoRA {path}: {left_out[0]} is one of {len(left_out)} tensors for text encoders, "
            "which stay as they are here; 'vcdeft import FILE --without-text-encoders --output "
            "DIR' makes a LoRA of the others, to give as DIR"
        )
    found = {name: tensor for name, tensor in tensors.items() if name not in set(left_out)}
    for name in sorted(found):
        if not found[name].float().isfinite().all():  # float8 has no isfinite
            raise UserError(f"LoRA {path}: {name} holds values that are not finite")
        if _ADDED.search(name) and not found[name].any():
            del found[name]
        elif not _MATRIX.match(name) and not name.endswith(ALPHA):
            kind = next((k for mark, k in _OTHERS.items() if re.search(mark, name)), None)
            raise UserError(
                f"LoRA {path}: {name} is {f'of {kind}' if kind else 'no part of a LoRA'}; only "
                "plain LoRA is read: no LoHa, LoKr, DoRA, trained biases or norms"
            )
    return found, about


def beside(path: Path) -> dict[str, Any]:
    """The settings of an adapter that peft wrote, which lie beside its weights."""
    where, found = path.parent / CONFIG, adapter_settings(path.parent)
    if found.get("peft_type") != "LORA":
        raise UserError(
            f"{where}: an adapter of type {found.get('peft_type')!r}, not a LoRA; give its folder "
            "with --adapter"
        )
    start = found.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_MOVED):
        raise UserError(
            f"{where}: init_lora_weights {start!r} changed the base before training; have peft "
            "convert the adapter to a plain LoRA"
        )
    return found


def gathered(tensors: Mapping[str, Tensor], path: Path) -> dict[str, dict[str, str]]:
    """Plain name of each layer -> the file's name of its "down" and "up" matrix and its "alpha".

    Raises `UserError` where one lacks a matrix or has two of a kind.
    """
    found: dict[str, dict[str, str]] = {}
    for key in sorted(tensors):
        if matrix := _MATRIX.match(key):
            name = plain(matrix["layer"]) + (matrix["number"] or "")
            role = matrix["way"] or {"A": "down", "B": "up"}[matrix["peft"]]
        else:
            name, role = plain(key.removesuffix(ALPHA)), "alpha"
        keys = found.setdefault(name, {})
        if role in keys:
            raise UserError(
                f"LoRA {path}: {keys[role]} and {key} are of one layer; give a file with one LoRA"
            )
        keys[role] = key
    for keys in found.values():
        if "down" not in keys and "up" not in keys:
            raise UserError(f"LoRA {path}: {keys['alpha']} is no part of a LoRA: no matrices")
        for role, other in (("down", "up"), ("up", "down")):
            if other not in keys:
                raise UserError(f"LoRA {path}: {keys[role]} has no partner, the {other} matrix")
    return found


def plain(layer: str) -> str:
    """The name of a layer in a file, without what tools put around it.

    >>> plain("transformer.base_model.model.proj_out"), plain("lora_unet_double_blocks_0_img_mlp_0")
    ('proj_out', 'double_blocks_0_img_mlp_0')
    """
    return _PREFIX.sub("", _WRAPPER.sub("", layer))


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The layers whose rows one layer of a file holds. swapped: their halves in the other order."""

    members: tuple[str, ...]
    swapped: bool = False

    def parts(self, change: Change, shapes: Shapes, where: str) -> dict[str, Change]:
        """The change of each member. Raises `UserError`, begun by `where`, if rows are missing."""
        a, b = change
        if len(self.members) == 1 and not self.swapped:
            return {self.members[0]: change}
        expected = sum(shapes[name][0] for name in self.members)
        if b.shape[0] != expected:
            raise UserError(f"{where}: {b.shape[0]} outputs in the file, {expected} here")
        return split((a, swap_halves(b) if self.swapped else b), self.members, shapes)


def known_rows(shapes: Shapes) -> dict[str, Rows]:
    """Every plain name that a layer has in some tool's files, with points or underscores."""
    fused = originals(shapes)
    found = {name: (name,) for name in shapes} | fused
    for original, members in fused.items():
        if len(members) > 1:  # OneTrainer numbers the parts
            found |= {f"{original}.{k}": (member,) for k, member in enumerate(members)}
        if original.endswith(".linear1"):
            found[f"{original.removesuffix('linear1')}processor.qkv"] = members[:3]
    for k in range(len(shapes)):
        for theirs, original in _XLABS.items():
            if (known := original.format(k)) in fused:
                found[theirs.format(k)] = fused[known]
    rows = {name: Rows(members=m, swapped=name == SWAPPED) for name, m in found.items()}
    return rows | {name.replace(".", "_"): row for name, row in rows.items()}


def change_of(
    name: str,
    keys: Mapping[str, str],
    tensors: Mapping[str, Tensor],
    about: Mapping[str, Any],
    path: Path,
) -> Change:
    """The change of one layer, its scale within B."""
    a, b = (tensors[keys[role]].float() for role in ("down", "up"))
    if a.ndim != 2 or b.ndim != 2 or len(a) != b.shape[1] or not len(a):
        raise UserError(f"LoRA {path}: {keys['down']} and its partner are no matrices of one rank")
    told = header_scale(about, name, len(a), path)
    if "alpha" not in keys:
        return a, (1.0 if told is None else told) * b
    alpha = tensors[keys["alpha"]]
    if alpha.numel() != 1:
        raise UserError(f"LoRA {path}: {keys['alpha']} holds {alpha.numel()} values, not one")
    scale = float(alpha) / len(a)
    if scale == 0:
        raise UserError(f"LoRA {path}: {keys['alpha']} is 0, so it changes nothing")
    if told is not None and abs(told - scale) > 1e-3 * abs(scale):
        raise UserError(
            f"LoRA {path}: {keys['alpha']} gives a scale of {scale:.4g}, its settings {told:.4g}"
        )
    return a, scale * b


def fitting(name: str, change: Change, shape: tuple[int, int], path: Path) -> Change:
    """`change`, filled up to the inputs of FLUX.1-Fill where it is of FLUX.1-dev's `x_embedder`.

    Raises `UserError` where it changes a weight of another shape.
    """
    a, b = change
    channels, here = CHANNELS[1], shape[1]
    if name == "x_embedder" and a.shape[1] == channels < here:
        say_once(
            f"LoRA {path}: x_embedder has {channels} inputs there, as in FLUX.1-dev, and {here} "
            "here: the others are filled with zeros"
        )
        a = nn.functional.pad(a, (0, here - channels))
    if (b.shape[0], a.shape[1]) != tuple(shape):
        raise UserError(
            f"LoRA {path}: {name} changes a weight of {b.shape[0]} x {a.shape[1]}, here it has "
            f"{shape[0]} x {shape[1]}"
        )
    return a, b


def check_settings(about: object, where: str) -> None:
    """Raise `UserError` unless a LoRA's settings can be what they should be. where: in words."""
    if not isinstance(about, dict):
        raise UserError(f"{where} must be an object, not {brief(about)}")
    for prefix in {key.rpartition(".")[0] for key in about}:
        own = {k.rpartition(".")[2]: v for k, v in about.items() if k.rpartition(".")[0] == prefix}
        check_fields(where, AdapterFile, own)


def check_patterns(about: Mapping[str, Any], names: Collection[str], path: Path) -> None:
    """Raise `UserError` for a regular expression in a LoRA's settings that is none, or takes too
    long for these names of layers."""
    patterns = [
        rf"(.*\.)?({key})"  # as peft matches them
        for name, told in about.items()
        if name.rpartition(".")[2] in ("alpha_pattern", "rank_pattern")
        for key in told or ()
    ]
    matches(f"LoRA {path}: its settings", patterns, names)


def header_scale(about: Mapping[str, Any], name: str, rank: int, path: Path) -> float | None:
    """The scale of a layer that settings state beside the tensors; None where they do not."""
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
        return None
    rank = of_layer("rank_pattern", "r") or rank
    return float(alpha) / (rank**0.5 if settings.get("use_rslora") else rank)
