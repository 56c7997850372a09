"""Suites: which grids an adapter is asked to complete, and what there is to hold its answers to."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from visualcloze_deft.data.annotation.source import annotated, check_places, lacking
from visualcloze_deft.data.base import Item, Part, Source
from visualcloze_deft.data.eligible import EligibleItems, eligible, sources_for
from visualcloze_deft.data.example import Example
from visualcloze_deft.data.mixture import row_of
from visualcloze_deft.data.queries import query_of_items
from visualcloze_deft.data.sources import open_source
from visualcloze_deft.data.sources.dreambench_plus import DreamBenchPlus, pictures_below
from visualcloze_deft.data.sources.dreambooth import CLASSES, DreamBooth, words
from visualcloze_deft.data.sources.insdet import Place, View, alone, placed, read_places, read_views
from visualcloze_deft.data.sources.scenes import SEGMENT_COLOURS
from visualcloze_deft.errors import UserError, suggestion
from visualcloze_deft.evaluation.metrics.fidelity import Colour
from visualcloze_deft.grids.cell_sizes import Cells
from visualcloze_deft.images.reading import folders_in, images_in, read_image
from visualcloze_deft.storage.text_files import read_text
from visualcloze_deft.task_registry.files import load_tasks
from visualcloze_deft.task_registry.select import select
from visualcloze_deft.task_registry.task import Task

FAMILIES = (  # what the embedded base, its demo and its evaluation are about
    "canny-to-image",
    "depth-to-image",
    "segmentation-to-image",
    "image-to-depth",
    "image-to-normals",
    "image-editing",
    "novel-view",
    "object-insertion",
    "colourisation",
    "deblurring",
    "subject-driven",
)
MAPS = frozenset(  # roles that are no photos: an encoder of photos has no say on them
    "depth normal canny hed mlsd openpose segmentation uniformer object_masks mask box "
    "boxes".split()
)
SCENES, ITEMS = 64, 100  # grids of each task, unless --limit says otherwise
LIVE = frozenset({"cat", "dog"})  # classes of DreamBooth that its prompts for live subjects are for
PROMPT = re.compile(r"'(.*\{0\} \{1\}.*)'\.format\(unique_token, class_token\)")


@dataclass(frozen=True, kw_only=True)
class GridSettings:
    """How grids are made.

    data: name -> path of a source. resolution, cells: of the model. rows: of a grid, the query
    among them. images: of each grid. limit: grids of a row of the table at most, None for the
    suite's own number. tasks: as `select.select` reads them, None for the suite's own.
    validation_every: every N-th item alone, 0 for all. annotate: role -> model or folder, where
    data lacks a role.
    """

    data: Mapping[str, str]
    resolution: int = 384
    cells: Cells = "row"
    seed: int = 1
    rows: int = 2
    images: int = 1
    limit: int | None = None
    tasks: str | None = None
    validation_every: int = 0
    annotate: Mapping[str, str] = field(default_factory=dict)
    task_folders: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Query:
    """One grid, and what its answers are held to besides a truth in the example itself.

    unit: what it is about (a subject, an item): figures of one unit are alike. roles: of the
    columns. prompt: what an image is to show, "" for no words. references: name -> other pictures
    of the subject, a file or how to draw it. box: a map, white where an object is to stand.
    classes: the colours of segmentation maps, where they are known.
    """

    example: Example
    unit: str
    roles: tuple[str, ...]
    prompt: str
    references: Mapping[str, Path | Callable[[], Image.Image]] = field(default_factory=dict)
    box: Image.Image | None = None
    classes: tuple[Colour, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of the table: `count` grids, `make(k)` the k-th of them."""

    name: str
    count: int
    make: Callable[[int], Query]


@dataclass(frozen=True, kw_only=True)
class Suite:
    """rows: what it asks, without a picture read. data: what it needs, for people; images: of each
    grid, unless said otherwise."""

    rows: Callable[[GridSettings], list[Row]]
    data: str
    images: int = 1


def rows_of(name: str, making: GridSettings) -> list[Row]:
    """The rows of a suite. Raises `UserError` where its data is not there, with what was expected
    where."""
    suite = SUITES[name]
    for source in making.data:
        if source == name or source in SHOWING.get(name, ()):
            continue
        raise UserError(
            f"--data {source}: the suite {name} has no use for it; it takes {suite.data}"
        )
    if name not in making.data and name != "scenes":
        raise UserError(f"--suite {name}: needs --data {name}=PATH, {suite.data}")
    if making.validation_every and name not in ("scenes", "graph200k"):
        raise UserError(
            f"--validation-every goes with --suite graph200k; {name} is all for testing"
        )
    if making.tasks and name not in ("scenes", "graph200k"):
        raise UserError(f"--tasks goes with --suite scenes or graph200k, not {name}")
    if making.annotate and name not in ("scenes", "graph200k"):
        raise UserError(f"--annotate goes with --suite scenes or graph200k, not {name}")
    rows = suite.rows(making)
    if not sum(row.count for row in rows):
        raise UserError(f"--suite {name}: nothing to ask in {making.data.get(name)}")
    return rows


def check_suite(name: str) -> None:
    if name not in SUITES:
        raise UserError(f"--suite {name!r}: no such suite; {suggestion(name, SUITES)}")


def scenes(making: GridSettings) -> list[Row]:
    """Scenes of another seed than a training run's: each task with its truth."""
    known = load_tasks(map(Path, making.task_folders))
    wanted = select(known, making.tasks or ",".join(FAMILIES))
    return by_task({n: known[n] for n in wanted}, opened("scenes", making), making, usual=SCENES)


def graph200k(making: GridSettings) -> list[Row]:
    """Every task that the items have all roles of."""
    known = load_tasks(map(Path, making.task_folders))
    wanted = select(known, making.tasks or "all")
    return by_task({n: known[n] for n in wanted}, opened("graph200k", making), making, usual=ITEMS)


def opened(name: str, making: GridSettings) -> list[Source]:
    """The source that a suite is about, with what is annotated."""
    place = making.data.get(name, "")
    spec = f"{name}={place}" if place else name
    source = open_source(spec, size=making.resolution, seed=making.seed)
    check_places(making.annotate)
    lacks = {role: making.annotate[role] for role in lacking(source, making.annotate)}
    sources = annotated([source], lacks)
    every = making.validation_every
    if every and len(source) < every:
        raise UserError(
            f"--validation-every {every}: {name} has {len(source)} items; give a smaller one"
        )
    return [Part(s, every=every, held_out=True) for s in sources] if every else sources


def by_task(
    tasks: Mapping[str, Task], sources: Sequence[Source], making: GridSettings, *, usual: int
) -> list[Row]:
    """A row for each task that there is data for.

    Raises `UserError` where there is none for any, or for one that is called by its name.
    """
    rows = []
    parts = [part.partition("=")[0].strip() for part in (making.tasks or "").split(",")]
    for name, task in tasks.items():
        # one that is asked for by its own name must have data
        if found := sources_for(task, sources) if name in parts else eligible(task.roles, sources):
            count = min(making.limit or usual, len(found[0]))
            make = partial(known, task, found[0], making, count)
            rows.append(Row(name=name, count=count, make=make))
    if not rows:
        has = ", ".join(sorted({role for source in sources for role in source.roles}))
        raise UserError(f"none of the {len(tasks)} tasks has data here, which has the roles {has}")
    return rows


def known(task: Task, items: EligibleItems, making: GridSettings, count: int, index: int) -> Query:
    """Grid `index` of `count`, its queries spread evenly over all items, so that none comes
    twice."""
    rng = np.random.default_rng([making.seed, index])
    place = index * len(items) // count
    others = [other for other in items.choose(making.rows, rng) if other != place]
    shown = [items.item(other) for other in others[: making.rows - 1]]
    query = items.item(place)
    example = example_of(task, shown, query, making, index)
    photo = task.content == "caption" and task.targets[-1] not in MAPS
    return Query(
        example=example,
        unit=query.key,
        roles=task.roles,
        prompt=example.content if photo else "",
        classes=tuple(SEGMENT_COLOURS.values()) if items.source.name == "scenes" else None,
    )


def example_of(
    task: Task, shown: Sequence[Item], query: Item, making: GridSettings, index: int
) -> Example:
    """A grid as inference sees it: `shown` complete, the targets of `query` hidden, all words
    said."""
    return query_of_items(
        task,
        shown,
        query,
        index=index,
        resolution=making.resolution,
        cells=making.cells,
        rng=np.random.default_rng([making.seed, index, 1]),
    )


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


def source_of(name: str, making: GridSettings) -> Source:
    place = making.data[name]
    spec = f"{name}={place}" if place else name
    return open_source(spec, size=making.resolution, seed=making.seed)


def insdet(making: GridSettings) -> list[Row]:
    """Every box of a scene that an object with views stands in: the object is put there again."""
    root = Path(making.data["insdet"])
    if not (root / "Objects").is_dir():
        raise UserError(f"{root}: expected InsDet's folders Objects and Scenes")
    views = read_views(root / "Objects")
    files = sorted(root.glob("Scenes/*/*/rgb_*.xml"))
    places = [place for path in files for place in read_places(path, views)]
    if not places:
        raise UserError(
            f"{root}: no box in Scenes/*/*/rgb_*.xml has the name of an object in Objects"
        )
    task = load_tasks()["object-insertion"]
    total = len(places)
    count = min(making.limit or total, total)

    def make(index: int) -> Query:
        return inserted(task, places, index * total // count, views, making, index)

    return [Row(name="insdet", count=count, make=make)]


def inserted(
    task: Task,
    places: Sequence[Place],
    chosen: int,
    views: Mapping[str, Sequence[View]],
    making: GridSettings,
    index: int,
) -> Query:
    """The object of `places[chosen]` into its box; the rows above show other objects first."""
    place, size = places[chosen], making.resolution
    rng = np.random.default_rng([making.seed, index])
    order = [int(k) for k in rng.permutation(len(places)) if k != chosen]
    order.sort(key=lambda k: places[k].name == place.name)
    shown = [placed(places[k], size=size) for k in order[: making.rows - 1]]
    query = placed(place, size=size)
    *_, box = row_of(query, (*task.roles, "box"), size, making.cells, np.random.default_rng(index))
    return Query(
        example=example_of(task, shown, query, making, index),
        unit=place.name,
        roles=task.roles,
        prompt="",
        references={
            f"{place.name}/{view.image.stem}": partial(alone, view) for view in views[place.name]
        },
        box=box,
    )


SHOWING = {"dreambench-plus": ("dreambooth", "graph200k", "scenes")}  # whose items stand above
SUITES: dict[str, Suite] = {
    "scenes": Suite(rows=scenes, data="nothing (made here), or scenes=N"),
    "graph200k": Suite(
        rows=graph200k, data="a folder with Graph200K's data.json, or its parquet files @SPLIT"
    ),
    "dreambooth": Suite(
        rows=dreambooth,
        data=f"a folder with dataset/<subject>/NN.jpg and dataset/{CLASSES}",
        images=4,
    ),
    "dreambench-plus": Suite(
        rows=dreambench_plus,
        data="a folder with data/images and data/captions, and dreambooth=PATH for the rows above",
    ),
    "insdet": Suite(rows=insdet, data="a folder with InsDet's Objects and Scenes"),
}
