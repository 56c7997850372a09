"""What can be known of a model from its name and folder, before any weight is read."""

from __future__ import annotations

import hashlib
import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open

from visualcloze_deft.errors import UserError
from visualcloze_deft.folders import BASE

Bits = Literal["none", "int8", "nf4", "fp8"]  # what frozen blocks are kept in
Precision = Literal["auto", "float32", "bfloat16"]  # of a frozen base

TINY = "tiny"
FLUX_RESOLUTION = 384  # VisualCloze's first stage, for models that name none
CONFIG = "adapter_config.json"  # peft's names for an adapter's settings and tensors
WEIGHTS = "adapter_model.safetensors"
CHANNELS = (384, 64)  # in and out of FLUX.1-Fill's transformer
SAMPLE = 1 << 20  # bytes of a weight file that its fingerprint reads at either end
PARTS = "transformer vae text_encoder text_encoder_2 tokenizer tokenizer_2 scheduler".split()


def check_folder(name: str) -> None:
    """Raise `UserError` if `name` can be no model: before any weight is read."""
    path = BASE if name == TINY else Path(name)
    if path.is_dir():
        lacking = [part for part in PARTS if not (path / part).is_dir()]
        if lacking:
            raise UserError(
                f"model folder {path}: no {', '.join(lacking)}; expected a diffusers folder of "
                f"FLUX.1-Fill with {', '.join(PARTS)}"
            )
        check_channels(path)
    elif name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UserError(
            f"unknown model {name!r}; give 'tiny', a diffusers folder or a hub id such as "
            "black-forest-labs/FLUX.1-Fill-dev"
        )


def check_channels(path: Path) -> None:
    """Raise `UserError` unless the transformer in the model folder `path` completes grids."""
    config = path / "transformer" / "config.json"
    try:
        fields = json.loads(config.read_text(encoding="utf-8-sig"))
        # out_channels came with Fill; before it, a transformer had as many out as in
        found = fields["in_channels"], fields.get("out_channels") or fields["in_channels"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{config}: no settings of a transformer: {error}") from None
    if found != CHANNELS:
        raise UserError(
            f"model folder {path}: its transformer has {found[0]} input and {found[1]} output "
            f"channels; FLUX.1-Fill has {CHANNELS[0]} and {CHANNELS[1]} (FLUX.1-dev cannot "
            "complete grids)"
        )


def fingerprint(name: str) -> str:
    """What tells the transformer's weights in a folder from others; "" for a hub id.

    SHA-256 over names, sizes and both ends of the weight files: 24 GB are not read for it.
    """
    folder = (BASE if name == TINY else Path(name)) / "transformer"
    told = hashlib.sha256()
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    for path in files:
        size = path.stat().st_size
        told.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            told.update(file.read(SAMPLE))
            file.seek(max(size - SAMPLE, 0))
            told.update(file.read())
    return told.hexdigest() if files else ""


def told_by(adapter: Path) -> dict[str, str]:
    """What the adapter in a folder says of itself."""
    try:
        with safe_open(adapter / WEIGHTS, "np") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{adapter / WEIGHTS}: missing, damaged or truncated ({error})") from None


def check_base(adapter: Path, name: str) -> None:
    """Raise `UserError` if the adapter in a folder says that it was trained on another base."""
    told = told_by(adapter)
    before, now = told.get("base_fingerprint"), fingerprint(name)
    if before and now and before != now:
        raise UserError(
            f"adapter {adapter}: made for another base than {name!r} is here (it names "
            f"{told.get('base_model', 'none')!r}, whose weight files were others); name that base "
            "with --model, or train the adapter again"
        )


def check_start(folder: Path, method: str, rank: int, base_lora: str) -> None:
    """Raise `UserError` unless the adapter in a folder is of this method and rank, and was trained
    on a base with the same LoRA merged into it ("": none)."""
    path = folder / CONFIG
    try:
        fields = json.loads(path.read_text(encoding="utf-8-sig"))
        kind, found = fields["peft_type"], fields["r"]
        if kind == "DEFT":
            relaxed = "deft-relaxed" if fields["decomposition_method"] == "relu" else "deft"
            kind = "para" if fields["para"] else relaxed
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"adapter.start {folder}: no adapter folder ({error})") from None
    if (kind.lower(), found) != (method, rank):
        raise UserError(
            f"adapter.start {folder}: it is {kind.lower()} of rank {found}, this run trains "
            f"{method} of rank {rank}; give --method {kind.lower()} --rank {found}"
        )
    before = told_by(folder).get("base_lora", "")
    if before != base_lora:
        raise UserError(
            f"adapter.start {folder}: made for a base with the LoRA {before or 'none'} merged, "
            f"this run's has {base_lora or 'none'}; set model_lora"
        )


def check_quantise(kind: Bits, *, zero3: bool = False) -> None:
    """Raise `UserError` where weights cannot be kept in `kind`. zero3: under ZeRO-3."""
    if kind in ("int8", "nf4") and find_spec("bitsandbytes") is None:
        raise UserError(f"quantise {kind!r} needs bitsandbytes: pip install bitsandbytes")
    if kind != "none" and zero3:
        raise UserError(
            f"quantise {kind!r} with --zero 3: a quantised weight cannot be split over processes; "
            "give --zero 2"
        )


def index_of(name: str) -> dict[str, Any]:
    """What a model's `model_index.json` says; {} where it has none here."""
    path = (BASE if name == TINY else Path(name)) / "model_index.json"
    if not path.is_file():
        return {}
    try:
        fields = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: no index of a model: {error}") from None
    if not isinstance(fields, dict):
        raise UserError(f"{path}: no index of a model: {fields!r}")
    return fields


def resolution_of(name: str) -> int:
    """The cell side the model's `model_index.json` names, or a hub id's end, else FLUX's."""
    named = re.search(r"-(384|512)$", name)  # VisualCloze's two releases
    found: Any = index_of(name).get("resolution", named[1] if named else FLUX_RESOLUTION)
    try:
        return int(found)
    except (ValueError, TypeError) as error:
        path = (BASE if name == TINY else Path(name)) / "model_index.json"
        raise UserError(f"{path}: resolution: {error}") from None


def check_lora(name: str) -> None:
    """Raise `UserError` if `name` is neither a file, a folder nor possibly a hub id."""
    if not Path(name).exists() and (name.count("/") != 1 or name.startswith((".", "/", "~"))):
        raise UserError(f"LoRA {name!r}: no such file or folder, and no hub id")
