"""The one reader of FLUX LoRA files: whatever tool wrote them, used whole or refused by name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from visualcloze_deft.backbones.flux_fill.files import CHANNELS, check_folder
from visualcloze_deft.backbones.lora_names import (
    Change,
    Shapes,
)
from visualcloze_deft.backbones.lora_places import lora_file
from visualcloze_deft.backbones.lora_rows import known_rows
from visualcloze_deft.backbones.lora_settings import (
    beside,
    check_patterns,
    check_settings,
    header_scale,
)
from visualcloze_deft.backbones.peft_files import WEIGHTS
from visualcloze_deft.backbones.table import backbone_of
from visualcloze_deft.errors import UserError, reading
from visualcloze_deft.runtime.launch import say_once
from visualcloze_deft.storage.adapter_places import CONFIG
from visualcloze_deft.storage.text_files import parse_json

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
    tensors, about = stored(path)
    return changes_in(tensors, about, origin=path, shapes=shapes, text_encoders=text_encoders)


def changes_in(
    tensors: Mapping[str, Tensor],
    about: Mapping[str, Any],
    *,
    origin: object,
    shapes: Shapes,
    text_encoders: TextEncoders = "refused",
) -> dict[str, Change]:
    """The changes of a LoRA's tensors, see `read`. about: its settings; origin: for messages."""
    tensors = used(origin, tensors, text_encoders=text_encoders)
    rows = known_rows(shapes)
    found: dict[str, Change] = {}
    changed_by: dict[str, str] = {}
    layers = gathered(tensors, origin)
    check_patterns(about, layers, origin)
    for name, keys in layers.items():
        change = change_of(name, keys, tensors, about, origin)
        key = keys["down"]
        if name not in rows:
            raise UserError(
                f"LoRA {origin}: {key} is no layer of this transformer; names look like "
                f"{next(iter(shapes))}"
            )
        for member, part in rows[name].parts(change, shapes, f"LoRA {origin}: {key}").items():
            if member in found:
                raise UserError(
                    f"LoRA {origin}: {changed_by[member]} and {key} both change {member}; give a "
                    "file with one LoRA"
                )
            found[member] = fitting(member, part, shapes[member], origin)
            changed_by[member] = key
    if not any(b.any() for _, b in found.values()):
        raise UserError(f"LoRA {origin}: it changes nothing: all its up matrices are zero")
    return found


def changes_of(name: str, lora: str) -> dict[str, Change]:
    """What a LoRA, a file, folder or hub id, changes of the transformer of a model: see `read`."""
    return read(lora_file(lora), shapes=shapes_of(name))


def shapes_of(name: str) -> Shapes:
    """(outputs, inputs) of every linear layer of a model's transformer, without its weights."""
    check_folder(name, parts=("transformer",))
    linear = backbone_of(name).sizes(name).linear
    return {layer: (outputs, inputs) for layer, (inputs, outputs) in linear.items()}


def stored(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a file, and the settings that belong to them."""
    with reading(f"LoRA {path}", "damaged, or no safetensors file"):
        tensors = load_file(path)
        with safe_open(path, "pt") as file:
            header = (file.metadata() or {}).get(HEADER, "{}")
    about = parse_json(f"LoRA {path}: its header's {HEADER}", header)
    check_settings(about, f"LoRA {path}: its header's {HEADER}")
    if path.name == WEIGHTS and (path.parent / CONFIG).is_file():
        about |= beside(path)
    return tensors, about


def used(
    origin: object, tensors: Mapping[str, Tensor], *, text_encoders: TextEncoders
) -> dict[str, Tensor]:
    """The tensors that are no text encoder's.

    Raises `UserError` for one that is neither a matrix nor the scale of a plain LoRA.
    """
    left_out = sorted(name for name in tensors if name.startswith(TEXT_ENCODERS))
    if left_out and len(left_out) == len(tensors):
        raise UserError(
            f"LoRA {origin}: it changes text encoders only; those stay as they are here"
        )
    if left_out and text_encoders == "refused":
        raise UserError(
            f"LoRA {origin}: {left_out[0]} is one of {len(left_out)} tensors for text encoders, "
            "which stay as they are here; 'vcdeft import FILE --without-text-encoders --output "
            "DIR' makes a LoRA of the others, to give as DIR"
        )
    found = {name: tensor for name, tensor in tensors.items() if name not in set(left_out)}
    for name in sorted(found):
        if not found[name].float().isfinite().all():  # float8 has no isfinite
            raise UserError(f"LoRA {origin}: {name} holds values that are not finite")
        if _ADDED.search(name) and not found[name].any():
            del found[name]
        elif not _MATRIX.match(name) and not name.endswith(ALPHA):
            kind = next((k for mark, k in _OTHERS.items() if re.search(mark, name)), None)
            raise UserError(
                f"LoRA {origin}: {name} is {f'of {kind}' if kind else 'no part of a LoRA'}; only "
                "plain LoRA is read: no LoHa, LoKr, DoRA, trained biases or norms"
            )
    return found


def gathered(tensors: Mapping[str, Tensor], origin: object) -> dict[str, dict[str, str]]:
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
                f"LoRA {origin}: {keys[role]} and {key} are of one layer; give a file with one LoRA"
            )
        keys[role] = key
    for keys in found.values():
        if "down" not in keys and "up" not in keys:
            raise UserError(f"LoRA {origin}: {keys['alpha']} is no part of a LoRA: no matrices")
        for role, other in (("down", "up"), ("up", "down")):
            if other not in keys:
                raise UserError(f"LoRA {origin}: {keys[role]} has no partner, the {other} matrix")
    return found


def plain(layer: str) -> str:
    """The name of a layer in a file, without what tools put around it.

    >>> plain("transformer.base_model.model.proj_out"), plain("lora_unet_double_blocks_0_img_mlp_0")
    ('proj_out', 'double_blocks_0_img_mlp_0')
    """
    return _PREFIX.sub("", _WRAPPER.sub("", layer))


def change_of(
    name: str,
    keys: Mapping[str, str],
    tensors: Mapping[str, Tensor],
    about: Mapping[str, Any],
    origin: object,
) -> Change:
    """The change of one layer, its scale within B."""
    a, b = (tensors[keys[role]].float() for role in ("down", "up"))
    if a.ndim != 2 or b.ndim != 2 or len(a) != b.shape[1] or not len(a):
        raise UserError(
            f"LoRA {origin}: {keys['down']} and its partner are no matrices of one rank"
        )
    told = header_scale(about, name, len(a), origin)
    if "alpha" not in keys:
        return a, (1.0 if told is None else told) * b
    alpha = tensors[keys["alpha"]]
    if alpha.numel() != 1:
        raise UserError(f"LoRA {origin}: {keys['alpha']} holds {alpha.numel()} values, not one")
    scale = float(alpha) / len(a)
    if scale == 0:
        raise UserError(f"LoRA {origin}: {keys['alpha']} is 0, so it changes nothing")
    if told is not None and abs(told - scale) > 1e-3 * abs(scale):
        raise UserError(
            f"LoRA {origin}: {keys['alpha']} gives a scale of {scale:.4g}, its settings {told:.4g}"
        )
    return a, scale * b


def fitting(name: str, change: Change, shape: tuple[int, int], origin: object) -> Change:
    """`change`, filled up to the inputs of FLUX.1-Fill where it is of FLUX.1-dev's `x_embedder`.

    Raises `UserError` where it changes a weight of another shape.
    """
    a, b = change
    channels, here = CHANNELS[1], shape[1]
    if name == "x_embedder" and a.shape[1] == channels < here:
        say_once(
            f"LoRA {origin}: x_embedder has {channels} inputs there, as in FLUX.1-dev, and {here} "
            "here: the others are filled with zeros"
        )
        a = nn.functional.pad(a, (0, here - channels))
    if (b.shape[0], a.shape[1]) != tuple(shape):
        raise UserError(
            f"LoRA {origin}: {name} changes a weight of {b.shape[0]} x {a.shape[1]}, here it has "
            f"{shape[0]} x {shape[1]}"
        )
    return a, b
