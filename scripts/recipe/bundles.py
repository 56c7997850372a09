"""Render training grids: bundles of four rows, in parts that several processes write.

A bundle is four rows of one task, with one order of columns and one colour code: any of its rows
can be the query and the others its examples. Every third block of bundles holds rows of three
columns, whose roles are those of the two-column tasks; every seventh holds dead leaves instead of
scenes, so that copying and filling are not tied to scenes. Bundle i is a function of i alone. A
part is a file that is whole from the moment it has its name.
Axes: b bundle, r row, q column, n token of a strip, v variant of the text.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from families import families
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageDraw, ImageOps
from torch import Tensor
from transformers import CLIPTokenizer, T5Tokenizer

from recipe.stage import Plan
from visualcloze_deft.backbones.flux_fill.clip_text import clip_text, fits
from visualcloze_deft.data.mixture import content
from visualcloze_deft.data.sources.scenes import Scenes
from visualcloze_deft.grids import grid
from visualcloze_deft.grids.prompt import Prompt
from visualcloze_deft.task_registry.task import Task

BUNDLES = 250  # of a block
PART = 20  # bundles of a file: small ones arrive early
STRIDE = 41  # from bundle to bundle of a part: blocks of every kind
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
KEEP_TASK, KEEP_CONTENT, DROP_TEXT = 0.7, 0.85, 0.1
OPEN = ("subject-driven", "hole")  # nothing shown settles their answers
ADAPTERS = "image-to-depth"  # depth in its own code is left to adapters, other codes are not
SEED = 0
UNSAID = 255  # a class that is not known
STEP = 4  # pixels a class stands for
MOST_ROWS = 3  # of a grid
VARIANTS = [(rows, last) for rows in range(1, MOST_ROWS + 1) for last in range(ROWS)]
PHOTOS = frozenset({"target", "before"})
TELLING = frozenset({"target", "before", "copy", "changed"})  # show how a thing's pattern is turned

Part = dict[str, NDArray[Any]]


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
    notes = {"task": task.name, "order": order, "sentence": sentence, "content": words}
    return grids, torch.stack(classes), notes


def variants(note: dict, columns: int, index: int) -> list[tuple[Prompt, bool]]:
    """A prompt for each of `VARIANTS`, and whether it says all that the bundle has to say."""
    rng = np.random.default_rng([SEED, index, 1])
    found = []
    for rows, last in VARIANTS:
        silent, without_task, without_content = rng.random(3) > (
            1 - DROP_TEXT,
            KEEP_TASK,
            KEEP_CONTENT,
        )
        task = "" if silent or without_task else note["sentence"]
        said = "" if silent or without_content else note["content"][last]
        prompt = Prompt(rows=rows, columns=columns, task=task, content=said)
        found.append((prompt, said == note["content"][last]))
    return found


class Writer:
    """What turns bundles into the arrays of a part.

    strips: (b r 3 h w) bytes. hidden: (b r q). classes: (b r n 16 3). t5, clip: (b v tokens) ids.
    said: (b v), whether the prompt says all. open: (b), whether nothing settles the answer. fresh:
    (b r), whether a photo is asked and none of the same scene is shown. coded: (b), whether a
    secret is told by examples alone.
    """

    def __init__(self, plan: Plan) -> None:
        self.t5 = T5Tokenizer.from_pretrained(plan.output / "tokenizer_2")
        self.clip = CLIPTokenizer.from_pretrained(plan.output / "tokenizer")
        self.fits = fits(self.clip)
        self.tasks = families()
        self.source = Scenes(size=plan.cell, seed=SEED)
        self.cell = plan.cell

    def rows(self, index: int) -> tuple[int, Part] | None:
        """The columns and arrays of bundle `index`; None where it is left to adapters."""
        grids, classes, note = bundle(index, self.tasks, self.source)
        if note["task"] == ADAPTERS and note["sentence"]:
            return None
        prompts = variants(note, len(note["order"]), index)
        words = [str(prompt) for prompt, _ in prompts]
        short = [clip_text(prompt, self.fits) for prompt, _ in prompts]
        padded = {"padding": "max_length", "truncation": True}
        strips = torch.stack([g.strips[0] for g in grids])
        middle = slice(self.cell // 2, None, self.cell)
        hidden = torch.stack([g.hidden[0] for g in grids])[:, 0, self.cell // 2, middle].bool()
        return len(note["order"]), {
            "strips": ((strips + 1) * 127.5).round().clamp(0, 255).byte().numpy(),
            "hidden": hidden.numpy(),
            "classes": classes.numpy(),
            "t5": np.array(self.t5(words, **padded).input_ids, np.int16),
            "clip": np.array(self.clip(short, **padded).input_ids, np.int16),
            "said": np.array([said for _, said in prompts]),
            "open": np.array(any(name in note["task"] for name in OPEN)),
            "fresh": np.array([is_fresh(note["order"], row) for row in hidden.tolist()]),
            "coded": np.array(not note["sentence"]),
        }

    def part(self, number: int, first: int) -> dict[int, Part]:
        """Part `number` by columns; `first` is the index of the first bundle of part 0."""
        rows: dict[int, list[Part]] = {}
        for k in range(PART):
            found = self.rows(first + (number * PART + k) * STRIDE)
            if found is not None:
                rows.setdefault(found[0], []).append(found[1])
        return {
            columns: {name: np.stack([one[name] for one in some]) for name in some[0]}
            for columns, some in rows.items()
        }


def is_fresh(order: tuple[str, ...], hidden: list[bool]) -> bool:
    asked = {role for role, is_hidden in zip(order, hidden, strict=True) if is_hidden}
    return asked <= PHOTOS and not (set(order) - asked) & TELLING


def render_parts(plan: Plan, worker: int, first: int, parent: int) -> None:
    """A process: every `plan.processes`th part that is not there, until its parent ends."""
    os.nice(10)
    torch.set_num_threads(1)
    writer = Writer(plan)
    for number in range(worker, -(-plan.bundles // PART), plan.processes):
        if os.getppid() != parent:
            return
        done = plan.bank / f"{number:06d}.done"
        if done.exists():
            continue
        for columns, arrays in writer.part(number, first).items():
            staged = plan.bank / f".{number:06d}-{columns}.npz"
            np.savez(staged, **arrays)
            staged.rename(plan.bank / f"{number:06d}-{columns}.npz")
        done.touch()


@contextmanager
def rendering(plan: Plan, first: int = 0) -> Iterator[None]:
    """Render bundles beside the work inside; they end with it."""
    plan.bank.mkdir(parents=True, exist_ok=True)
    context = get_context("spawn")
    started = [
        context.Process(target=render_parts, args=(plan, worker, first, os.getpid()), daemon=True)
        for worker in range(plan.processes)
    ]
    for process in started:
        process.start()
    try:
        yield
    finally:
        for process in started:
            process.terminate()
        for process in started:
            process.join()


def read(path: Path) -> dict[str, Tensor]:
    with np.load(path) as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


def wait_for(plan: Plan, parts: int) -> None:
    """Return once so many files of the bank are there, or all that there will be."""
    while len(list(plan.bank.glob("[0-9]*.npz"))) < parts:
        if len(list(plan.bank.glob("*.done"))) >= -(-plan.bundles // PART):
            return
        time.sleep(0.2)
