"""Encode training grids once: python scripts/train_base_bank.py --out work/base --shards 0:40

A bundle is four rows of one task, with one order of columns and one colour code, each row encoded
complete and with a hidden cell: any of its rows can be the query and the others its examples.
Bundle i is a function of i alone; shards can be made by several processes side by side.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import save_file
from tqdm import tqdm

from visualcloze_deft import grid
from visualcloze_deft.data.mixture import content, picture
from visualcloze_deft.data.scenes import Scenes
from visualcloze_deft.registry import Task, load_tasks

BUNDLES = 250  # a shard
ROWS = 4
TASKS = {
    "depth-to-image": 3,
    "segmentation-to-image": 2,
    "image-to-depth": 2,
    "subject-driven": 1,
    "image-editing": 4,
}
RECODED = 0.4  # how often maps come in another colour code, to be read from the examples
HIDE_TARGET = 0.65
SEED = 0


def recode(image: Image.Image, code: np.ndarray) -> Image.Image:
    """A signed permutation of the colour channels: inverted, swapped, as `code` says."""
    values = np.array(image)[..., code[:3]]
    return Image.fromarray(np.where(code[3:], 255 - values, values).astype(np.uint8))


def bundle(index: int, tasks: dict[str, Task], source: Scenes) -> tuple[list[grid.Grid], dict]:
    rng = np.random.default_rng([SEED, index])
    odds = np.array(list(TASKS.values())) / sum(TASKS.values())
    task = tasks[list(TASKS)[rng.choice(len(TASKS), p=odds)]]
    order = task.roles if rng.random() < 0.8 else task.roles[::-1]
    code = np.array([0, 1, 2, 0, 0, 0])
    if coded := rng.random() < RECODED:
        code = np.concatenate([rng.permutation(3), rng.integers(0, 2, 3)])
    grids, words = [], []
    for row in range(ROWS):
        item = source.item(index * ROWS + row)
        images = [
            recode(picture(item, role), code)
            if role in ("depth", "segmentation")
            else picture(item, role)
            for role in order
        ]
        target = len(order) - 1 if rng.random() < HIDE_TARGET else int(rng.integers(len(order)))
        hidden = [k == target for k in range(len(order))]
        grids.append(grid.build([images], resolution=source.size, hidden=hidden))
        words.append(content(task, item))
    sentence = "" if coded else task.sentence(order)
    return grids, {"task": task.name, "sentence": sentence, "content": words}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shards", required=True, help="FIRST:END")
    options = parser.parse_args()
    torch.set_num_threads(1)
    vae = AutoencoderKL.from_pretrained(options.out / "vae").eval()
    folder = options.out / "bank"
    folder.mkdir(exist_ok=True)
    tasks, source = load_tasks(), Scenes(size=64, seed=SEED)
    first, end = map(int, options.shards.split(":"))
    for shard in range(first, end):
        path = folder / f"{shard:05d}.safetensors"
        if path.exists():
            continue
        clean, seen, masks, notes = [], [], [], []
        for index in tqdm(
            range(shard * BUNDLES, (shard + 1) * BUNDLES), desc=path.name, miniters=50
        ):
            grids, note = bundle(index, tasks, source)
            strips = [g.strips[0] for g in grids] + [g.seen[0] for g in grids]
            latents = vae.encode(torch.stack(strips)).latent_dist.mode()
            latents = (latents - vae.config.shift_factor) * vae.config.scaling_factor
            tokens = grid.pack(latents).half()
            clean.append(tokens[:ROWS])
            seen.append(tokens[ROWS:])
            masks.append(
                torch.stack([g.hidden[0] for g in grids])[:, :, ::16, ::16].flatten(1).bool()
            )
            notes.append(note)
        tensors = {"clean": clean, "seen": seen, "mask": masks}
        staged = path.with_suffix(f".{first}.part")
        save_file(
            {name: torch.stack(parts) for name, parts in tensors.items()},
            staged,
            {"notes": json.dumps(notes)},
        )
        staged.rename(path)


if __name__ == "__main__":
    main()
