"""LoRA files of other tools, read into adapter folders."""

from __future__ import annotations

import json
import re
from pathlib import Path

from peft import LoraConfig
from torch import Tensor

from visualcloze_deft.backbones import lora_files, tensor_files
from visualcloze_deft.backbones.peft_files import WEIGHTS
from visualcloze_deft.backbones.table import fingerprint
from visualcloze_deft.errors import UserError, writing
from visualcloze_deft.storage.adapter_places import CONFIG
from visualcloze_deft.storage.atomic import output_folder, staged_at


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
    if not path.is_file():
        raise UserError(f"LoRA {path}: no such file; name the .safetensors file itself")
    if output.exists():
        raise UserError(f"--output {output}: already there; name another, or remove it")
    changes = lora_files.read(path, shapes=lora_files.shapes_of(model), text_encoders=text_encoders)
    output_folder(output.parent)
    ranks = {name: len(a) for name, (a, _) in changes.items()}
    common = max(ranks.values(), key=list(ranks.values()).count)
    other = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != common}
    config = LoraConfig(
        r=common,
        lora_alpha=common,
        target_modules="|".join(re.escape(name) for name in sorted(ranks)),
        rank_pattern=other,
        alpha_pattern=dict(other),
        base_model_name_or_path=model,
        inference_mode=True,
    ).to_dict()
    tensors: dict[str, Tensor] = {}
    for name, (a, b) in changes.items():
        whole = f"base_model.model.{name}"
        tensors |= {f"{whole}.lora_A.weight": a, f"{whole}.lora_B.weight": b}
    about = {"method": "lora", "rank": str(common), "base_model": model}
    about |= {"base_fingerprint": fingerprint(model), "imported_from": path.name}
    text = json.dumps(config, indent=2, default=str)
    whole_tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with staged_at(output) as staged, writing(output):
        staged.mkdir()
        (staged / CONFIG).write_text(text, encoding="utf-8")
        tensor_files.save(whole_tensors, staged / WEIGHTS, about)
    return output
