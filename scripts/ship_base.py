"""Put a trained base into the package: python scripts/ship_base.py --out work/base

Writes visualcloze_deft/base: a diffusers folder in half precision, from the averaged weights, and
its model card with what the training log says.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, VisualClozePipeline
from safetensors import safe_open
from train_base import CELL, new_transformer
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer

from visualcloze_deft.folders import BASE

HISTORY = "training.jsonl"  # one line for each training that led to these weights
LIMIT = 16_000_000  # bytes in all
CARD = Path(__file__).with_name("base_card.md")


def card(stages: list[dict]) -> str:
    told = [
        f"{s['samples']:,} grids in {s['minutes']:.0f} minutes, from {s['bundles']:,} bundles"
        f"{' (' + s['note'] + ')' if 'note' in s else ''}"
        for s in stages
    ]
    return CARD.read_text().format(stages=";\n  then ".join(told), **stages[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    t5 = T5Tokenizer.from_pretrained(options.out / "tokenizer_2")
    clip = CLIPTokenizer.from_pretrained(options.out / "tokenizer")
    transformer = new_transformer(torch.ones(64))
    with safe_open(options.out / "base_state.safetensors", "pt") as file, torch.no_grad():
        for name, parameter in transformer.named_parameters():
            parameter.copy_(file.get_tensor(f"average.transformer.{name}"))
    pipe = VisualClozePipeline(
        # FLUX.1-Fill-dev's scheduler settings
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True,
            base_shift=0.5,
            max_shift=1.15,
            base_image_seq_len=256,
            max_image_seq_len=4096,
            shift=3.0,
        ),
        vae=AutoencoderKL.from_pretrained(options.out / "vae"),
        text_encoder=CLIPTextModel.from_pretrained(options.out / "text_encoder"),
        tokenizer=clip,
        text_encoder_2=T5EncoderModel.from_pretrained(options.out / "text_encoder_2"),
        tokenizer_2=t5,
        transformer=transformer,
        resolution=CELL,
    ).to(torch.float16)
    shutil.rmtree(BASE, ignore_errors=True)
    pipe.save_pretrained(BASE, safe_serialization=True)
    shutil.copyfile(
        options.out / "tokenizer_2" / "spiece.model", BASE / "tokenizer_2" / "spiece.model"
    )
    for config in BASE.glob("*/config.json"):
        fields = json.loads(config.read_text())
        fields.pop("_name_or_path", None)  # a path of the machine that trained it
        if config.parent.name.startswith("text_encoder"):  # stored in half, computed in single
            fields["dtype"] = "float32"
        config.write_text(json.dumps(fields, indent=2))
    last = (options.out / "base_log.jsonl").read_text().splitlines()[-1]
    earlier = options.out / HISTORY  # of a base that was trained on with --warm
    stages = [*(earlier.read_text().splitlines() if earlier.exists() else []), last]
    (BASE / HISTORY).write_text("".join(f"{stage}\n" for stage in stages))
    (BASE / "README.md").write_text(card([json.loads(stage) for stage in stages]))
    size = sum(path.stat().st_size for path in BASE.rglob("*") if path.is_file())
    print(f"{BASE}: {size / 1e6:.2f} MB, {last}")
    if size > LIMIT:
        raise SystemExit(f"{size} bytes, more than the {LIMIT} allowed")


if __name__ == "__main__":
    main()
