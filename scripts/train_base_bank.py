"""Encode training grids once: python scripts/train_base_bank.py --out work/base --shards 0:40

A bundle is four rows of one task, with one order of columns and one colour code, each row encoded
complete and with a hidden cell: any of its rows can be the query and the others its examples.
Every third shard holds rows of three columns, whose roles are those of the two-column tasks; every
seventh holds dead leaves instead of scenes, so that copying and filling are not tied to scenes.
Bundle i is a function of i alone; shards can be made by several processes side by side.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from einops import rearrange
from families import families
from PIL import Image, ImageChops, ImageDraw, ImageOps
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from visualcloze_deft import grid
from visualcloze_deft.data.mixture import content
from visualcloze_deft.data.scenes import Scenes
from visualcloze_deft.registry import Task

BUNDLES = 250  # a shard
ROWS = 4
TASKS = {
    "depth-to-image": 3,
    "segmentation-to-image": 2,
    "image-to-depth": 2,
    "subject-driven": 2,
    "image-editing": 3,
}
PAIRS = {  # on the same scale, the bank's own
    ("changed", "target"): 2,  # a photo whose colours, place or size changed, and the photo
    ("copy", "target"): 2,  # the photo twice: without them nothing asks for an exact copy
    ("hole", "target"): 2,  # FLUX.1-Fill is made for filling holes, and so is its small image
    ("view", "again"): 8,  # an object on plain ground twice: nothing else shows such ground
}
TRIPLES = (
    ("reference", "hole", "target"),
    ("depth", "hole", "target"),
    ("depth", "segmentation", "target"),
    ("reference", "depth", "target"),
    ("reference", "segmentation", "target"),
    ("depth", "before", "target"),
    ("segmentation", "before", "target"),
    ("reference", "before", "target"),
    ("target", "depth", "segmentation"),
    ("target", "segmentation", "depth"),
)
RECODED = 0.5  # how often maps come in another colour code, to be read from the examples
HIDE_TARGET = 0.65
SEED = 0
UNSAID = 255  # a class that is not known
STEP = 4  # pixels a class stands for


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


def dead_leaves(rng: np.random.Generator, size: int) -> Image.Image:
    """Shapes of all sizes that hide each other, with the statistics of photographs.

    Lee, Mumford and Huang 2001: radii fall off as their cube.
    """
    side = 2 * size
    palette = rng.integers(20, 236, (6, 1)) + rng.normal(0, 40, (6, 3))
    image = Image.new("RGB", (side, side), tuple(np.clip(palette[0], 0, 255).astype(int)))
    draw = ImageDraw.Draw(image)
    small, large = (side / 16) ** -2.0, (side / 1.6) ** -2.0
    for radius in (large + (small - large) * rng.random(70)) ** -0.5:
        shade = np.clip(palette[rng.integers(6)] + rng.normal(0, 22, 3), 0, 255).astype(int)
        x, y = rng.random(2) * side
        turns = rng.random() * 2 * np.pi + np.linspace(0, 2 * np.pi, rng.integers(4, 8))[:-1]
        if rng.random() < 0.5:
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), tuple(shade))
        else:
            corners = np.stack([x + radius * np.cos(turns), y + radius * np.sin(turns)], axis=-1)
            draw.polygon([tuple(corner) for corner in corners], tuple(shade))
    light = 1 + np.linspace(-0.3, 0.3, size) * np.sign(rng.normal())
    values = np.asarray(image.reduce(2), float) * light[:, None, None]
    return Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))


def punched(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A box of middle grey somewhere, as in the scenes' hole."""
    width, height = (np.array(image.size) * rng.uniform(0.3, 0.6, 2)).astype(int)
    left, top = (rng.random(2) * (np.array(image.size) - (width, height))).astype(int)
    image = image.copy()
    image.paste((128, 128, 128), (left, top, left + width, top + height))
    return image


def made_task(roles: tuple[str, ...], instruction: str, tasks: dict[str, Task]) -> Task:
    """A task of the bank's own, its columns named as the shipped tasks name them."""
    named = (*TASKS, "object-insertion")
    phrases = {role: phrase for name in named for role, phrase in tasks[name].columns.items()}
    return Task(
        name="-".join(roles),
        group="",
        summary="",
        columns={role: phrases.get(role, ("photo",)) for role in roles},
        targets=(roles[-1],),
        instructions=(instruction,),
        content="instruction" if "before" in roles else "caption",
        path=Path(),
    )


def is_leaves(index: int) -> bool:
    return index // BUNDLES % 7 == 6


def draw_task(index: int, rng: np.random.Generator, tasks: dict[str, Task]) -> Task:
    if is_leaves(index):
        roles = list(PAIRS)[rng.integers(len(PAIRS))]
        return made_task(roles, "From the {{{}}} to the {{{}}}.".format(*roles), tasks)
    if index // BUNDLES % 3 == 2:
        roles = TRIPLES[rng.integers(len(TRIPLES))]
        words = "From the {{{}}} and the {{{}}} to the {{{}}}.".format(*roles)
        return made_task(roles, words, tasks)
    known = [tasks[name] for name in TASKS]
    made = [
        made_task(roles, "From the {{{}}} to the {{{}}}.".format(*roles), tasks) for roles in PAIRS
    ]
    odds = np.array([*TASKS.values(), *PAIRS.values()], float)
    return (known + made)[rng.choice(len(odds), p=odds / odds.sum())]


def strip_classes(order: tuple[str, ...], item: int, source: Scenes, *, leaves: bool) -> Tensor:
    """(n, 16, 3) of each token's 4 x 4 squares: `Scenes.classes`, `UNSAID` where a cell changed."""
    whole = {"changed": "target", "copy": "target", "view": "target", "again": "target"}
    cells = [source.classes(item, whole.get(role, role)) for role in order]
    for cell, role in zip(cells, order, strict=True):
        if role in ("changed", "view", "again") or leaves:
            cell[:] = UNSAID
    strip = np.concatenate(cells, axis=1)[STEP // 2 :: STEP, STEP // 2 :: STEP]
    return torch.from_numpy(rearrange(strip, "(h p) (w q) k -> (h w) (p q) k", p=4, q=4))


def bundle(
    index: int, tasks: dict[str, Task], source: Scenes
) -> tuple[list[grid.Grid], Tensor, dict]:
    """Four rows of one task, the classes of what they show (r, n, 16, 3), and their words."""
    rng = np.random.default_rng([SEED, index])
    task = draw_task(index, rng, tasks)
    order = task.roles if rng.random() < 0.8 else task.roles[::-1]
    kind = int(rng.integers(5))
    code = np.array([0, 1, 2, 0, 0, 0])
    maps = {"depth", "segmentation"} & set(order)
    coded = "changed" in order or (maps and rng.random() < RECODED)
    if coded:
        code = np.concatenate([rng.permutation(3), rng.integers(0, 2, 3)])
    leaves = is_leaves(index)
    grids, words, classes = [], [], []
    for row in range(ROWS):
        item = source.item(index * ROWS + row)
        photo = dead_leaves(rng, source.size) if leaves else item.image("target")
        images = []
        for role in order:
            if role == "changed":
                images.append(change(photo, kind, code))
            elif role in ("copy", "target") or (leaves and role in ("view", "again")):
                images.append(photo)
            elif role in ("view", "again"):
                images.append(item.image("view"))
            elif role == "hole" and leaves:
                images.append(punched(photo, rng))
            elif role in ("depth", "segmentation"):
                images.append(recode(item.image(role), code))
            else:
                images.append(item.image(role))
        target = order.index("target") if "hole" in order else len(order) - 1
        if "hole" not in order and rng.random() > HIDE_TARGET:
            target = int(rng.integers(len(order)))
        hidden = [k == target for k in range(len(order))]
        grids.append(grid.build([images], resolution=source.size, hidden=hidden))
        words.append("" if leaves else content(task, item))
        classes.append(strip_classes(order, index * ROWS + row, source, leaves=leaves))
    sentence = "" if coded else task.sentence(order)
    notes = {"task": task.name, "sentence": sentence, "content": words}
    return grids, torch.stack(classes), notes


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
    tasks, source = families(), Scenes(size=64, seed=SEED)
    first, end = map(int, options.shards.split(":"))
    for shard in range(first, end):
        path = folder / f"{shard:05d}.safetensors"
        if path.exists():
            continue
        clean, seen, masks, classes, notes = [], [], [], [], []
        for index in tqdm(
            range(shard * BUNDLES, (shard + 1) * BUNDLES), desc=path.name, miniters=50
        ):
            grids, shown, note = bundle(index, tasks, source)
            strips = [g.strips[0] for g in grids] + [g.seen[0] for g in grids]
            latents = vae.encode(torch.stack(strips)).latent_dist.mode()
            latents = (latents - vae.config.shift_factor) * vae.config.scaling_factor
            tokens = grid.pack(latents).half()
            clean.append(tokens[:ROWS])
            seen.append(tokens[ROWS:])
            masks.append(
                torch.stack([g.hidden[0] for g in grids])[:, :, ::16, ::16].flatten(1).bool()
            )
            classes.append(shown)
            notes.append(note)
        tensors = {"clean": clean, "seen": seen, "mask": masks, "classes": classes}
        staged = path.with_suffix(f".{first}.part")
        save_file(
            {name: torch.stack(parts) for name, parts in tensors.items()},
            staged,
            {"notes": json.dumps(notes)},
        )
        staged.rename(path)


if __name__ == "__main__":
    main()
