"""The suites of subjects: DreamBooth and DreamBench++."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import numpy as np

from visualcloze_deft.data.base import Item
from visualcloze_deft.data.eligible import EligibleItems, eligible
from visualcloze_deft.data.sources.dreambench_plus import DreamBenchPlus, pictures_below
from visualcloze_deft.data.sources.dreambooth import CLASSES, DreamBooth, words
from visualcloze_deft.errors import UserError
from visualcloze_deft.evaluation.suite_queries import (
    SHOWING,
    GridSettings,
    Query,
    Row,
    example_of,
    source_of,
)
from visualcloze_deft.images.reading import folders_in, images_in, read_image
from visualcloze_deft.storage.text_files import read_text
from visualcloze_deft.task_registry.files import load_tasks

LIVE = frozenset({"cat", "dog"})  # classes of DreamBooth that its prompts for live subjects are for
PROMPT = re.compile(r"'(.*\{0\} \{1\}.*)'\.format\(unique_token, class_token\)")


def dreambooth(making: GridSettings) -> list[Row]:
    """Every subject with every prompt of the list for its kind."""
    source = DreamBooth(Path(making.data["dreambooth"]))
    root = Path(making.data["dreambooth"])
    folder = root / "dataset" if (root / "dataset").is_dir() else root
    prompts = read_prompts(folder / CLASSES)
    task = load_tasks()["subject-driven"]
    asked = []
    for subject in folders_in(folder):
        photos = images_in(subject)
        if len(photos) < 2:
            continue
        called = source.classes.get(subject.name) or words(subject.name)
        own = prompts["live" if called in LIVE else "object"]
        asked += [(subject, list(photos.values()), prompt(text, called)) for text in own]
    total = len(asked)
    count = min(making.limit or total, total)

    def make(index: int) -> Query:
        place = index * total // count
        subject, photos, text = asked[place]
        rng = np.random.default_rng([making.seed, index])
        others = [k for k, (_, shown) in enumerate(source.pairs) if shown.parent != subject]
        chosen = rng.choice(others, min(making.rows - 1, len(others)), replace=False)
        photo = photos[place % len(photos)]
        query = Item(
            key=f"{subject.name} {photo.stem}",
            images={"reference": partial(read_image, photo)},
            texts={"caption": text},
        )
        shown = [source.item(int(k)) for k in chosen]
        return Query(
            example=example_of(task, shown, query, making, index),
            unit=subject.name,
            roles=task.roles,
            prompt=text,
            references={f"{subject.name}/{path.stem}": path for path in photos},
        )

    return [Row(name="dreambooth", count=count, make=make)]


def read_prompts(path: Path) -> dict[str, list[str]]:
    """The prompts for "object" and "live" subjects in DreamBooth's `prompts_and_classes.txt`."""
    if not path.is_file():
        raise UserError(f"{path}: the prompts are missing; it comes with DreamBooth's data set")
    text = read_text(path)
    objects, _, live = text.partition("Live Subject Prompts")
    found = {"object": PROMPT.findall(objects), "live": PROMPT.findall(live)}
    for kind, prompts in found.items():
        if not prompts:
            raise UserError(
                f"{path}: no prompt for {kind} subjects; expected lines like "
                "'a {0} {1} in the snow'.format(unique_token, class_token), under the headings "
                "'Object Prompts' and 'Live Subject Prompts'"
            )
    return found


def prompt(text: str, called: str) -> str:
    """A prompt of DreamBooth without a token for the subject, which the grid shows instead.

    >>> prompt("a {0} {1} in the snow", "dog")
    'a dog in the snow'
    """
    return " ".join(text.format("", called).split())


def dreambench_plus(making: GridSettings) -> list[Row]:
    """Every subject with every prompt of its own."""
    root = Path(making.data["dreambench-plus"])
    source = DreamBenchPlus(root)
    pictures = pictures_below((root / "data" if (root / "data").is_dir() else root) / "images")
    task = load_tasks()["subject-driven"]
    others: EligibleItems | None = None
    if making.rows > 1:
        given = [name for name in SHOWING["dreambench-plus"] if name in making.data]
        found = eligible(task.roles, [source_of(name, making) for name in given])
        if not found:
            raise UserError(
                "--suite dreambench-plus: it has no picture of an answer, so the rows above a "
                "query must come from elsewhere: --data dreambooth=PATH (or graph200k, scenes), or "
                "ask without example: --rows 1"
            )
        others = found[0]
    total = len(source)
    count = min(making.limit or total, total)

    def make(index: int) -> Query:
        query = source.item(index * total // count)
        rng = np.random.default_rng([making.seed, index])
        places = others.choose(making.rows - 1, rng) if others else []
        stem = query.key.rpartition(" ")[0]
        return Query(
            example=example_of(
                task, [others.item(k) for k in places] if others else [], query, making, index
            ),
            unit=stem,
            roles=task.roles,
            prompt=query.texts["caption"],
            references={stem: pictures[stem]},
        )

    return [Row(name="dreambench-plus", count=count, make=make)]
