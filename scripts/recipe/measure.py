"""Measure a base on scenes that no stage saw: fidelity, sharpness, and whether textures are told.

Every grid has one example. Families that the base was shown, a copy, and a hole to fill. Textures
are read by a small classifier of regions, trained here on true scenes: regions of things and
floors that are striped, spotted, checkered or planked in the truth, and what it says of the same
region of what was made. Figures go to OUTPUT/measures.json and from there into the card.
Axes: b region, c channel, h w pixels.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from evaluate_scenes import reconstructed
from families import families
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from recipe.bundles import made_task
from recipe.pack import HISTORY, card
from recipe.stage import Plan, refuse
from visualcloze_deft.backbones.flux_fill.model import Models
from visualcloze_deft.data.example import Example
from visualcloze_deft.data.mixture import Mixture
from visualcloze_deft.data.queries import query_of
from visualcloze_deft.data.sources.scenes import NOUNS, SURFACES, Scenes
from visualcloze_deft.evaluation.metrics.fidelity import psnr
from visualcloze_deft.inference.pipeline import InContextPipeline
from visualcloze_deft.sampling.examples import complete_examples, truths_of

STAGE = "measure"
SEED = 77  # of the scenes: bundles are of seed 0
MEASURED = "measures.json"
STEPS = (10, 30)
COUNT = 64  # scenes a task
BATCH = 16  # grids made together
KNOWN = (
    "depth-to-image",
    "segmentation-to-image",
    "image-editing",
    "image-to-depth",
    "subject-driven",
)
PICTURED = KNOWN[:3]  # their answers show the scene's things where the truth has them
COPY, HOLE = "copy", "hole-target"
SIDE = 48  # pixels that a region is resized to
SMALLEST = 60  # pixels of a region that tells its texture, at cells of 64 px
FIGURES = """
## Measured

{scenes} scenes that it was never shown (seed {seed}), one example. PSNR in dB. Sharpness: mean
gradient of what was made over the truth's, at both numbers of steps. Textures told: how many
striped, spotted, checkered or planked regions a small classifier reads rightly in what was made
(in the truth {truth}).

{table}
"""
TRUE_SCENES, CLASSIFIER_STEPS, CLASSIFIER_BATCH = 1200, 900, 64


def queries(mixture: Mixture, name: str, count: int) -> list[Example]:
    """Grids of one task, its answer hidden; a copy is a grid whose cells are all the photo."""
    if name != COPY:
        return [query_of(mixture, mixture.tasks[name], index=k) for k in range(count)]
    found = queries(mixture, HOLE, count)
    sentence = made_task(
        ("copy", "target"), "From the {copy} to the {target}.", families()
    ).sentence()
    alike = [tuple((row[-1], row[-1]) for row in e.rows) for e in found]
    return [
        replace(e, rows=rows, task_sentence=sentence) for e, rows in zip(found, alike, strict=True)
    ]


def fidelity(made: Sequence[Image.Image], truths: Sequence[Image.Image]) -> float:
    """Mean PSNR in dB."""
    return round(float(np.mean([psnr(a, b) for a, b in zip(made, truths, strict=True)])), 2)


def sharpness(made: Sequence[Image.Image], truths: Sequence[Image.Image]) -> float:
    """Mean of the gradient of what was made over that of the truth."""
    parts = [gradient(a) / gradient(b) for a, b in zip(made, truths, strict=True)]
    return round(float(np.mean(parts)), 3)


def gradient(image: Image.Image) -> float:
    """Mean absolute difference of neighbours."""
    values = np.asarray(image.convert("RGB"), float)
    return float(np.abs(np.diff(values, axis=0)).mean() + np.abs(np.diff(values, axis=1)).mean())


# Textures


def regions(classes: NDArray[np.uint8]) -> Iterator[tuple[NDArray[np.bool_], int]]:
    """Things and floor of a scene that are large enough: where they are, and their surface.

    classes: as of `Scenes.classes`.
    """
    least = SMALLEST * (len(classes) / 64) ** 2
    for look in np.unique(classes.reshape(-1, 3), axis=0):
        where = (classes == look).all(axis=-1)
        if where.sum() >= least and NOUNS[look[0]] != "wall":
            yield where, int(look[2])


def cropped(image: Image.Image, where: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """A region of a picture (SIDE, SIDE, 4): colours, and where it is."""
    rows, columns = np.nonzero(where)
    box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    size = (SIDE, SIDE)
    colours = image.convert("RGB").crop(box).resize(size, Image.Resampling.BILINEAR)
    mask = Image.fromarray(where.astype(np.uint8) * 255).crop(box).resize(size)
    return np.dstack([np.asarray(colours), np.asarray(mask)])


def inputs(crops: Sequence[NDArray[np.uint8]]) -> Tensor:
    """(b 4 h w) in 0..1; each region's own mean colour is taken away, as colours tell nothing."""
    x = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float() / 255
    colours, mask = x[:, :3], x[:, 3:]
    mean = (colours * mask).sum((2, 3), keepdim=True) / mask.sum((2, 3), keepdim=True).clamp(min=1)
    return torch.cat([(colours - mean) * mask, mask], dim=1)


def classifier() -> nn.Module:
    layers: list[nn.Module] = []
    for before, width in ((4, 24), (24, 48), (48, 64)):
        layers += [nn.Conv2d(before, width, 5, stride=2, padding=2), nn.GroupNorm(8, width)]
        layers += [nn.GELU()]
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, len(SURFACES))
    )


def trained_classifier(side: int, scenes: int, steps: int) -> nn.Module:
    """Reads textures of regions of true scenes of `SEED + 1`."""
    torch.manual_seed(SEED)
    source, crops, surfaces = Scenes(size=side, seed=SEED + 1), [], []
    for index in tqdm(range(scenes), desc="scenes for the classifier"):
        image = source.item(index).image("target")
        for where, surface in regions(source.classes(index, "target")):
            crops.append(cropped(image, where))
            surfaces.append(surface)
    x, y, net = inputs(crops), torch.tensor(surfaces), classifier()
    rate = 3e-3
    optimiser = torch.optim.AdamW(net.parameters(), rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps)
    for _ in tqdm(range(steps), desc="classifier"):
        chosen = torch.randint(len(x), (CLASSIFIER_BATCH,))
        error = functional.cross_entropy(net(x[chosen]), y[chosen])
        optimiser.zero_grad()
        error.backward()
        optimiser.step()
        schedule.step()
    return net.eval()


@torch.no_grad()
def told(net: nn.Module, source: Scenes, pictures: Sequence[tuple[int, Image.Image]]) -> float:
    """The share of patterned regions whose texture `net` reads rightly.

    pictures: the index of a scene, and what shows it.
    """
    crops, surfaces = [], []
    for index, image in pictures:
        for where, surface in regions(source.classes(index, "target")):
            if SURFACES[surface] != "plain":
                crops.append(cropped(image, where))
                surfaces.append(surface)
    if not crops:
        return float("nan")
    right = net(inputs(crops)).argmax(-1) == torch.tensor(surfaces)
    return round(float(right.float().mean()), 3)


# The stage


def shown_by(
    examples: Sequence[Example], images: Sequence[Image.Image]
) -> list[tuple[int, Image.Image]]:
    """Each image with the number of the scene that its query shows."""
    numbers = [int(e.keys[-1].rsplit("/", 1)[1]) for e in examples]
    return list(zip(numbers, images, strict=True))


def measured(models: Models, count: int, scenes: int, steps: int) -> dict[str, Any]:
    """Figures of each task: PSNR in dB and sharpness (mean gradient over the truth's) by steps."""
    side = models.resolution
    source, tasks = Scenes(size=side, seed=SEED), families()
    hole = made_task(("hole", "target"), "From the {hole} to the {target}.", tasks)
    chosen = {name: tasks[name] for name in KNOWN} | {HOLE: hole}
    mixture = Mixture(chosen, [source], seed=SEED, resolution=side)
    net = trained_classifier(side, scenes, steps)
    found: dict[str, Any] = {}
    for name in tqdm((*KNOWN, COPY, HOLE), desc="tasks"):
        examples = queries(mixture, name, count)
        truths = [truths_of(e)[0] for e in examples]
        found[name] = {}
        for ways in STEPS:
            answers = complete_examples(models, examples, steps=ways, batch=BATCH)
            made = [images[0] for images in answers]
            found[name][str(ways)] = {
                "psnr": fidelity(made, truths),
                "sharpness": sharpness(made, truths),
            }
            if name in PICTURED:
                found[name][str(ways)]["textures"] = told(net, source, shown_by(examples, made))
        if name == KNOWN[0]:
            again = [reconstructed(models, truth) for truth in truths]
            found["truth"] = {"textures": told(net, source, shown_by(examples, truths))}
            found["vae"] = {
                "psnr": fidelity(again, truths),
                "textures": told(net, source, shown_by(examples, again)),
            }
    return found


def table(found: dict[str, Any]) -> str:
    """Rows of tasks, columns of figures, as Markdown."""
    few, many = map(str, STEPS)
    lines = [
        f"| task | PSNR, {few} steps | {many} steps | sharpness | textures told |",
        "|---|---|---|---|---|",
    ]
    for name in (*KNOWN, COPY, HOLE):
        short, long = found[name][few], found[name][many]
        textures = [f"{one['textures']:.0%}" for one in (short, long) if "textures" in one]
        sharp = f"{short['sharpness']:.2f}, {long['sharpness']:.2f}"
        cells = [name, f"{short['psnr']:.1f}", f"{long['psnr']:.1f}", sharp, ", ".join(textures)]
        lines.append(f"| {' | '.join(cells)} |")
    vae = found["vae"]
    lines.append(f"| VAE alone | {vae['psnr']:.1f} | | | {vae['textures']:.0%} |")
    return "\n".join(lines)


def write_card(plan: Plan) -> None:
    """The card of `output/base`, with the figures of its last measurement."""
    path = plan.output / MEASURED
    figures = json.loads(path.read_text("utf-8")) if path.exists() else None
    history = (plan.output / "base" / HISTORY).read_text("utf-8").splitlines()
    text = card(plan, [json.loads(line) for line in history])
    if figures is not None:
        text += FIGURES.format(
            scenes=figures["scenes"],
            seed=SEED,
            truth=f"{figures['truth']['textures']:.0%}",
            table=table(figures),
        )
    (plan.output / "base" / "README.md").write_text(text, encoding="utf-8")


def make(plan: Plan) -> None:
    """Measure `output/base`."""
    folder = plan.output / "base"
    if not folder.is_dir():
        refuse(f"{folder} is not there; run the stage pack first")
    part = min(1.0, plan.minutes[STAGE])  # less than a minute: a trial of the recipe itself
    models = InContextPipeline.from_pretrained(folder).models
    count = max(round(COUNT * part), 2)
    found = measured(
        models, count, max(round(TRUE_SCENES * part), 20), max(round(CLASSIFIER_STEPS * part), 5)
    )
    found = {"scenes": count, "cell": models.resolution} | found
    (plan.output / MEASURED).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    write_card(plan)
    print(table(found))
