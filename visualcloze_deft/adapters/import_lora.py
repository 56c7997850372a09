"""LoRA files of other tools, read as adapters and into adapter folders."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from peft import LoraConfig
from torch import Tensor

from visualcloze_deft.adapters.files import StoredAdapter
from visualcloze_deft.backbones import lora_files, tensor_files
from visualcloze_deft.backbones.lora_names import Change
from visualcloze_deft.backbones.peft_files import WEIGHTS
from visualcloze_deft.backbones.table import fingerprint
from visualcloze_deft.errors import UserError, writing
from visualcloze_deft.storage.adapter_places import CONFIG, adapter_folder
from visualcloze_deft.storage.atomic import output_folder, staged_at

OURS = "a run or adapter folder, which needs no import; 'vcdeft export' writes its LoRA"


def import_lora(
    path: Path,
    output: Path,
    *,
    model: str = "tiny",
    text_encoders: lora_files.TextEncoders = "refused",
) -> Path:
    """Turn a FLUX LoRA file (diffusers', kohya's or original names) into an adapter folder.

    Training starts from it with `adapter.init_from`, `vcdeft infer --adapter` uses it, and
    `--model-lora`, too. text_encoders: see `lora_files.read`.
    """
    if path.is_dir():
        made = (adapter_folder(path) / CONFIG).is_file()
        raise UserError(f"LoRA {path}: {OURS if made else 'a folder; name the file in it'}")
    if not path.is_file():
        raise UserError(f"LoRA {path}: no such file; name the .safetensors file itself")
    if output.exists():
        raise UserError(f"--output {output}: already there; name another, or remove it")
    changes = lora_files.read(path, shapes=lora_files.shapes_of(model), text_encoders=text_encoders)
    output_folder(output.parent)
    adapter = as_adapter(changes, origin=path, base=model)
    about = {"method": "lora", "rank": str(adapter.config.r), "base_model": model}
    about |= {"base_fingerprint": fingerprint(model), "imported_from": path.name}
    text = json.dumps(adapter.config.to_dict(), indent=2, default=str)
    with staged_at(output) as staged, writing(output):
        staged.mkdir()
        (staged / CONFIG).write_text(text, encoding="utf-8")
        tensor_files.save(adapter.tensors, staged / WEIGHTS, about)
    return output


def as_adapter(
    changes: Mapping[str, Change], *, origin: Path, base: str | None = None
) -> StoredAdapter:
    """Low-rank changes of layers as an adapter of method LoRA. origin: the file they are from, for
    messages; base: the name of the model that they change."""
    ranks = {name: len(a) for name, (a, _) in changes.items()}
    common = max(ranks.values(), key=list(ranks.values()).count)
    other = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != common}
    config = LoraConfig(
        r=common,
        lora_alpha=common,
        target_modules="|".join(re.escape(name) for name in sorted(ranks)),
        rank_pattern=other,
        alpha_pattern=dict(other),
        base_model_name_or_path=base,
        inference_mode=True,
    )
    tensors: dict[str, Tensor] = {}
    for name, (a, b) in changes.items():
        layer = f"base_model.model.{name}"
        tensors |= {f"{layer}.lora_A.weight": a, f"{layer}.lora_B.weight": b}
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    return StoredAdapter(folder=origin, config=config, tensors=whole)
