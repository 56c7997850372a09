"""Pictures of a comparison: what the base and each method make of a few grids, beside the truth.

OUTPUT/evaluations/NAME/samples/GROUP-TASK-G-C.png   target C of grid G, by an adapter or the base
OUTPUT/evaluations/queries/GROUP-TASK-G-C.png        column C of the query of grid G, with its truth
OUTPUT/samples.png                                   all beside each other

Adapters are those of the first seed, which is chosen before anything is measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from visualcloze_deft.comparison.measure import Answer
from visualcloze_deft.comparison.records import BASE, QuerySet
from visualcloze_deft.comparison.trainings import Training
from visualcloze_deft.config.comparison import Comparison
from visualcloze_deft.images.reading import read_image
from visualcloze_deft.reporting.contact_sheet import draw_grid, draw_sheet
from visualcloze_deft.storage.atomic import write_png

QUERIES = "queries"
ROWS = 12  # of a group on the sheet
CELL = 144  # pixels


class SampleFiles:
    """Where the pictures of a comparison lie, in `folder`, and how many grids of a task."""

    def __init__(self, comparison: Comparison) -> None:
        self.folder = Path(comparison.output) / "evaluations"
        self.seed = comparison.seeds[0]
        self.each = comparison.evaluate.samples

    def shown(self, one: QuerySet) -> range:
        """The grids of a task whose pictures are kept."""
        return range(min(self.each, one.grids))

    def keeps(self, training: Training | None) -> bool:
        """Whether pictures of this adapter, or of the base, are kept."""
        return training is None or training.seed == self.seed

    def made(self, name: str, one: QuerySet, number: int) -> list[Path]:
        """The pictures of an adapter, or the base, in the hidden cells of a grid."""
        stem = f"{one.group}-{one.task.name}-{number}"
        folder = self.folder / name / "samples"
        return [folder / f"{stem}-{c}.png" for c in range(len(targets(one)))]

    def query(self, one: QuerySet, number: int) -> list[Path]:
        """All columns of the query of a grid."""
        stem = f"{one.group}-{one.task.name}-{number}"
        return [self.folder / QUERIES / f"{stem}-{c}.png" for c in range(len(one.task.roles))]

    def complete(self, training: Training | None, one: QuerySet) -> bool:
        """Whether all pictures that an adapter, or the base, should have are there."""
        if not self.keeps(training):
            return True
        wanted = []
        for number in self.shown(one):
            wanted += self.made(training.name if training else BASE, one, number)
            wanted += [] if training else self.query(one, number)
        return all(path.exists() for path in wanted)

    def write(self, training: Training | None, one: QuerySet, answers: Sequence[Answer]) -> None:
        """Keep the first answers; of the base, which comes first, also what was asked."""
        if not self.keeps(training):
            return
        name = training.name if training else BASE
        for number in self.shown(one):
            answer = answers[number]
            pictures = dict(zip(self.made(name, one, number), answer.made, strict=True))
            if training is None:
                query = answer.example.complete[-1]
                pictures |= zip(self.query(one, number), query, strict=True)
            for path, picture in pictures.items():
                path.parent.mkdir(parents=True, exist_ok=True)
                write_png(path, picture)


def targets(one: QuerySet) -> list[int]:
    """The columns of a task that are asked for."""
    return [c for c, role in enumerate(one.task.roles) if role in one.task.targets]


def contact_sheet(
    files: SampleFiles, asked: Sequence[QuerySet], trainings: Sequence[Training]
) -> Image.Image | None:
    """A block for each task, a row for each grid: conditions, base, adapters, truth. None where no
    pictures are kept. trainings: in the order of the columns."""
    blocks = []
    for group in dict.fromkeys(one.group for one in asked):
        own = [one for one in asked if one.group == group][:ROWS]
        each = max(ROWS // len(own), 1)
        blocks += [task_block(files, one, trainings, each) for one in own if files.shown(one)]
    return draw_sheet(blocks, columns=1, gap=8) if blocks else None


def task_block(
    files: SampleFiles, one: QuerySet, trainings: Sequence[Training], rows: int
) -> Image.Image:
    """The grids of one task. rows: at most."""
    hidden = targets(one)
    seen = [c for c in range(len(one.task.roles)) if c not in hidden]
    columns = {BASE: BASE}
    columns |= {t.name: f"{t.method} r{t.rank}" for t in trainings if files.keeps(t)}
    labels = [one.task.roles[c] for c in seen]
    labels += [label for label in (*columns.values(), "truth") for _ in hidden]
    cells = []
    for number in files.shown(one)[:rows]:
        query = files.query(one, number)
        made = [path for name in columns for path in files.made(name, one, number)]
        paths = [query[c] for c in seen] + made + [query[c] for c in hidden]
        cells.append([read_image(path) for path in paths])
    framed = [
        (r, c) for r in range(len(cells)) for c in range(len(seen), len(labels) - len(hidden))
    ]
    title = f"{one.group}: {one.task.name}"
    return draw_grid(cells, title=title, made=framed, cell=CELL, labels={0: labels})
