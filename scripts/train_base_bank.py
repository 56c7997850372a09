"""Encode training grids once: python scripts/train_base_bank.py --out work/base --shards 0:40

A bundle is four rows of one task, with one order of columns and one colour code, each row encoded
complete and with a hidden cell: any of its rows can be the query and the others its examples.
Every third shard holds rows of three columns, whose roles are those of the two-column tasks.
Bundle i is a function of i alone; shards can be made by several processes side by side.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image, ImageChops, ImageOps
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
    "subject-driven": 2,
    "image-editing": 3,
}
CHANGED = 3  # on the same scale: a photo whose colours, place or size changed, and the photo
TRIPLES = (
    ("depth", "segmentation", "target"),
    ("reference", "depth", "target"),
    ("reference", "segmentation", "target"),
    ("depth", "before", "target"),
    ("segmentation", "before", "target"),
    ("reference", "before", "target"),
    ("target", "depth", "segmentation"),
    ("target", "segmentation", "depth"),
)
RECODED = 0.7  # how often maps come in another colour code, to be read from the examples
HIDE_TARGET = 0.65
SEED = 0


def recode(image: Image.Image, code: np.ndarray) -> Image.Image:
    """A signed permutation of the colour channels: inverted, swapped, as `code` says."""
    values = np.array(image)[..., code[:3]]
    return Image.fromarray(np.where(code[3:], 255 - values, values).astype(np.uint8))


def change(image: Image.Image, kind: int, code: np.ndarray) -> Image.Image:
    """One of five ways in which a photo can differ: what it is, only the examples tell."""
    width, height = image.size
    if kind == 0:
        return recode(image, code)
    if kind == 1:
        return ImageOps.mirror(image)
    if kind == 2:
        return ImageOps.flip(image)
    if kind == 3:
        return ImageChops.offset(image, width // 2, 0)
    return image.resize((width, height), Image.Resampling.LANCZOS, (0, 0, width / 2, height / 2))


def made_task(roles: tuple[str, ...], instruction: str, tasks: dict[str, Task]) -> Task:
    """A task of the bank's own, its columns named as the shipped tasks name them."""
    phrases = {role: phrase for name in TASKS for role, phrase in tasks[name].columns.items()}
    return Task(
        name="-".join(roles),
        group="",
        summary="",
        columns={role: phrases.get(role, "photo") for role in roles},
        targets=(roles[-1],),
        instruction=instruction,
        content="instruction" if "before" in roles else "caption",
        path=Path(),
    )


def draw_task(index: int, rng: np.random.Generator, tasks: dict[str, Task]) -> Task:
    if index // BUNDLES % 3 == 2:
        roles = TRIPLES[rng.integers(len(TRIPLES))]
        words = "From the {{{}}} and the {{{}}} to the {{{}}}.".format(*roles)
        return made_task(roles, words, tasks)
    odds = np.array([*TASKS.values(), CHANGED]) / (sum(TASKS.values()) + CHANGED)
    chosen = rng.choice(len(odds), p=odds)
    if chosen == len(TASKS):
        return made_task(("changed", "target"), "", tasks)
    return tasks[list(TASKS)[chosen]]


def bundle(index: int, tasks: dict[str, Task], source: Scenes) -> tuple[list[grid.Grid], dict]:
    rng = np.random.default_rng([SEED, index])
    task = draw_task(index, rng, tasks)
    order = task.roles if rng.random() < 0.8 else task.roles[::-1]
    kind = int(rng.integers(5))
    code = np.array([0, 1, 2, 0, 0, 0])
    maps = {"depth", "segmentation"} & set(order)
    coded = "changed" in order or (maps and rng.random() < RECODED)
    if coded:
        code = np.concatenate([rng.permutation(3), rng.integers(0, 2, 3)])
    grids, words = [], []
    for row in range(ROWS):
        item = source.item(index * ROWS + row)
        images = []
        for role in order:
            if role == "changed":
                images.append(change(picture(item, "target"), kind, code))
            elif role in ("depth", "segmentation"):
                images.append(recode(picture(item, role), code))
            else:
                images.append(picture(item, role))
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
