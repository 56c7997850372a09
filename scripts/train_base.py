"""Make the embedded base: all stages from nothing, or one stage on another base.

    python scripts/train_base.py --output work/base
    python scripts/train_base.py --output work/base --stage transformer --minutes 60
    python scripts/train_base.py --output work/base --start visualcloze_deft/base --cell 64

Stages: text (tokenizers and text encoders), vae, transformer (bundles of scenes are rendered beside
it), decoder (adapts the VAE to what the transformer makes), pack (a diffusers folder in
OUTPUT/base), measure (figures on 64 scenes a task, into OUTPUT/measures.json and the card; for
less than one minute on fewer scenes). A stage that is killed goes on where it was; a second call
trains on for its minutes.
Progress lies in OUTPUT/*_log.jsonl, samples in OUTPUT/samples: what was made above what is true.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from recipe import decoder, measure, pack, text, transformer, vae
from recipe.stage import Plan, refuse

STAGES = {module.STAGE: module.make for module in (text, vae, transformer, decoder, pack, measure)}
MINUTES = {"text": 1.0, "vae": 1.5, "transformer": 9.0, "decoder": 1.5, "pack": 0.0, "measure": 1.0}
ONCE = {"text": "text_encoder_2", "vae": "vae"}  # what a stage makes; with all stages not again
STARTED = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "vae")
SMALLER = 1 / 16  # batches on a CPU
SPARED = 3  # cores of a machine with a GPU that do not render


def options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of this base")
    parser.add_argument("--stage", choices=STAGES, help="only this one")
    parser.add_argument("--minutes", type=float, help="of training, for every stage that runs")
    parser.add_argument(
        "--anneal", type=float, default=5, help="last minutes, the transformer's rate to 0"
    )
    parser.add_argument("--cell", type=int, default=128, help="pixels of a cell's side")
    parser.add_argument(
        "--start", type=Path, help="a base to begin with: its text side, VAE and transformer"
    )
    parser.add_argument("--bundles", type=int, default=24_000, help="that the transformer sees")
    parser.add_argument("--processes", type=int, help="that render; default: by the cores")
    parser.add_argument("--batch", type=float, help="part of the largest batches; 1 on a GPU")
    parser.add_argument("--ship", action="store_true", help="put the result into the package")
    return parser.parse_args(arguments)


def plan_of(asked: argparse.Namespace) -> Plan:
    if asked.cell < 32 or asked.cell % 16:
        refuse(f"--cell {asked.cell}: give a multiple of 16, at least 32")
    for name in ("minutes", "bundles", "processes", "batch"):
        value = getattr(asked, name)
        if value is not None and not 0 < value < 1e7:
            refuse(f"--{name} {value}: give a number above 0")
    gpu, cores = torch.cuda.is_available(), os.cpu_count() or 1
    usual = max(cores - SPARED, 1) if gpu else 1
    return Plan(
        output=asked.output,
        cell=asked.cell,
        minutes=MINUTES if asked.minutes is None else dict.fromkeys(STAGES, asked.minutes),
        anneal=asked.anneal,
        processes=asked.processes or usual,
        bundles=asked.bundles,
        batch=asked.batch or (1.0 if gpu else SMALLER),
    )


def begin_with(plan: Plan, start: Path) -> None:
    """Copy another base's parts into the output, where nothing has begun there yet."""
    index = start / "model_index.json"
    if not index.is_file():
        refuse(f"--start {start}: no model_index.json there; give the folder of a base")
    if (plan.output / "start").exists():
        return
    staged = plan.output / "start.part"
    shutil.rmtree(staged, ignore_errors=True)
    shutil.copytree(start / "transformer", staged)
    if (start / pack.HISTORY).exists():
        shutil.copy(start / pack.HISTORY, staged)
    (staged / "cell").write_text(str(json.loads(index.read_text("utf-8"))["resolution"]))
    for part in STARTED:
        if not (plan.output / part).exists():
            shutil.copytree(start / part, plan.output / part)
    staged.rename(plan.output / "start")


def main(arguments: Sequence[str] | None = None) -> None:
    asked = options(arguments)
    plan = plan_of(asked)
    plan.output.mkdir(parents=True, exist_ok=True)
    if asked.start is not None:
        begin_with(plan, asked.start)
    for name in [asked.stage] if asked.stage else STAGES:
        if asked.stage is None and name in ONCE and (plan.output / ONCE[name]).is_dir():
            continue
        STAGES[name](plan)
    if asked.ship:
        pack.ship(plan)


if __name__ == "__main__":
    main()
