"""Make a diffusers folder of what the stages trained, in half precision, with a model card."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, VisualClozePipeline
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer

from recipe import transformer
from recipe.stage import Plan, last_note, refuse
from visualcloze_deft.paths import BASE

STAGE = "pack"
HISTORY = "training.jsonl"  # one line for each training that led to these weights
LIMIT = 16_000_000  # bytes in all
CARD = Path(__file__).with_name("card.md")
SCHEDULER = {  # FLUX.1-Fill-dev's
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
    "shift": 3.0,
}


def card(plan: Plan, history: list[dict[str, Any]]) -> str:
    told = [
        f"{s['samples']:,} grids in {s['minutes']:.0f} minutes, from {s['bundles']:,} bundles"
        f"{' (' + s['note'] + ')' if 'note' in s else ''}"
        for s in history
    ]
    decoder = last_note(plan, "decoder")
    return CARD.read_text("utf-8").format(
        cell=plan.cell,
        stages=";\n  then ".join(told),
        error=history[-1]["target_error"],
        decoder=f": {decoder['before_db']} -> {decoder['now_db']} dB"
        if decoder
        else " at that time",
    )


def make(plan: Plan) -> None:
    """Write `output/base`; ends with an error where it is larger than what may be shipped."""
    folder, output = plan.output / "base", plan.output
    net = transformer.averaged(plan)
    clip = CLIPTokenizer.from_pretrained(output / "tokenizer")
    t5 = T5Tokenizer.from_pretrained(output / "tokenizer_2")
    pipe = VisualClozePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULER),
        vae=AutoencoderKL.from_pretrained(output / "vae"),
        text_encoder=CLIPTextModel.from_pretrained(output / "text_encoder"),
        tokenizer=clip,
        text_encoder_2=T5EncoderModel.from_pretrained(output / "text_encoder_2"),
        tokenizer_2=t5,
        transformer=net.transformer,
        resolution=plan.cell,
    ).to("cpu", torch.float16)
    shutil.rmtree(folder, ignore_errors=True)
    pipe.save_pretrained(folder, safe_serialization=True)
    pieces = Path("tokenizer_2", "spiece.model")
    shutil.copyfile(output / pieces, folder / pieces)
    for config in folder.glob("*/config.json"):
        fields = json.loads(config.read_text("utf-8"))
        fields.pop("_name_or_path", None)  # a path of the machine that trained it
        if config.parent.name.startswith("text_encoder"):  # stored in half, computed in single
            fields["dtype"] = "float32"
        config.write_text(json.dumps(fields, indent=2), encoding="utf-8")
    earlier = output / "start" / HISTORY
    lines = earlier.read_text("utf-8").splitlines() if earlier.exists() else []
    history = [*map(json.loads, lines), last_note(plan, transformer.STAGE)]
    lines = [f"{json.dumps(line)}\n" for line in history]
    (folder / HISTORY).write_text("".join(lines), encoding="utf-8")
    (folder / "README.md").write_text(card(plan, history), encoding="utf-8")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: {size / 1e6:.2f} MB")
    if size > LIMIT:
        refuse(f"{folder} has {size:,} bytes, more than the {LIMIT:,} that may be shipped")


def ship(plan: Plan) -> None:
    """Replace the base in the package."""
    shutil.rmtree(BASE)
    shutil.copytree(plan.output / "base", BASE)
