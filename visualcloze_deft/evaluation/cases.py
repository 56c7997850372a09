"""The grids of an evaluation on disk, and every image that is to be scored.

grids/grid.json      what `vcdeft infer` completes, with its pictures beside it
grids/cases.json     what the answers are held to, and how many grids could not be made; the last
grids/references/    pictures of subjects that are no files of the data
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from pydantic import TypeAdapter
from tqdm import tqdm

from visualcloze_deft.data.example import Example
from visualcloze_deft.errors import UserError, reading, writing
from visualcloze_deft.evaluation.metrics.fidelity import Colour
from visualcloze_deft.evaluation.suite_queries import Query, Row
from visualcloze_deft.inference.grid_files import write_grids
from visualcloze_deft.storage.atomic import clear, staged_at
from visualcloze_deft.storage.settings_files import SettingsFile, checked
from visualcloze_deft.storage.text_files import read_json, read_text

PICTURE = re.compile(r"\d{3,}-(\d\d(-truth)?|box)\.png")  # of a grid, as `write_grids` calls it
GRIDS, CASES, GRID_FILE = "grids", "cases.json", "grid.json"


@dataclass(frozen=True, kw_only=True)
class Case:
    """One grid. name: as `vcdeft infer` calls it. row: of the table. unit: see `Query`. roles:
    of the columns; targets: how many at their end are generated. truths: of each target, a path in
    the folder of grids, None where nobody has one. shown: the pictures of the query by role.
    references: paths. box: of a map of the box, white. classes: colours of segmentation maps."""

    name: str
    row: str
    unit: str
    task: str
    roles: tuple[str, ...]
    targets: int
    prompt: str
    seeds: tuple[int, ...]
    truths: tuple[str | None, ...]
    shown: Mapping[str, str]
    references: tuple[str, ...]
    box: str | None
    classes: tuple[Colour, ...] | None


@dataclass(frozen=True, kw_only=True)
class Shot:
    """One image to score, with all that it is held to; paths of files. See `Case`."""

    image: Path
    row: str
    unit: str
    grid: str = ""
    task: str = ""
    role: str = "target"
    seed: int | None = None
    prompt: str = ""
    truth: Path | None = None
    shown: Mapping[str, Path] = field(default_factory=dict)
    references: tuple[Path, ...] = ()
    box: Path | None = None
    classes: tuple[Colour, ...] | None = None


def write_cases(rows: Sequence[Row], output: Path, *, images: int) -> list[Case]:
    """Make all grids of `rows` in OUTPUT/grids, or read them where they are there whole.

    images: of each grid. An item that cannot be read is left out, said and counted: `left_out`.
    """
    folder = output / GRIDS
    if (folder / CASES).is_file():
        return read_cases(output)
    clear(folder)  # unfinished
    cases: list[Case] = []
    broken: Counter[str] = Counter()

    def examples(part: Path) -> Iterator[Example]:
        asked = [(row, index) for row in rows for index in range(row.count)]
        for row, index in tqdm(asked, desc="making grids", unit="grid"):
            try:
                question = row.make(index)
                case = case_of(question, row, len(cases), images, part)
            except UserError as error:
                tqdm.write(f"{row.name}: a grid is left out: {error}")
                broken[row.name] += 1
                continue
            cases.append(case)
            yield question.example

    with staged_at(folder) as part, writing(folder):
        part.mkdir(parents=True)
        path = write_grids(examples(part), part)
        if not cases:
            raise UserError("no grid could be made: every item is broken, see above")
        entries = read_json(path)
        for entry, case in zip(entries, cases, strict=True):
            entry["seed"] = list(case.seeds) if len(case.seeds) > 1 else case.seeds[0]
        path.write_text(json.dumps(entries, indent=1), encoding="utf-8")
        told = {"left_out": broken, "cases": [asdict(case) for case in cases]}
        (part / CASES).write_text(json.dumps(told, indent=1), "utf-8")
    return cases


def case_of(question: Query, row: Row, number: int, images: int, folder: Path) -> Case:
    """The record of a grid that `write_grids` gives the number `number` + 1. Pictures beside those
    of the grid are written here."""
    example, name = question.example, f"{number + 1:03d}"
    last = len(example.rows)
    targets = sum(example.hidden)
    seen = len(example.hidden) - targets
    first = number * images
    return Case(
        name=name,
        row=row.name,
        unit=question.unit,
        task=example.task,
        roles=question.roles,
        targets=targets,
        prompt=question.prompt,
        seeds=tuple(range(first, first + images)),
        truths=tuple(
            f"{name}-{last}{c + 1}-truth.png" if example.rows[-1][c] is not None else None
            for c in range(seen, len(example.hidden))
        ),
        shown={question.roles[c]: f"{name}-{last}{c + 1}.png" for c in range(seen)},
        references=tuple(references(question, folder)),
        box=saved(question.box, folder / f"{name}-box.png"),
        classes=question.classes,
    )


def references(question: Query, folder: Path) -> Iterator[str]:
    for name, place in question.references.items():
        if isinstance(place, Path):
            yield str(place.absolute())
            continue
        path = folder / "references" / f"{name}.png"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            place().save(path)
        yield str(path.relative_to(folder))


def saved(image: Image.Image | None, path: Path) -> str | None:
    if image is None:
        return None
    image.save(path)
    return path.name


@dataclass(frozen=True, kw_only=True)
class CasesFile:
    """What `cases.json` says. left_out: how many grids of each row could not be made."""

    left_out: dict[str, int]
    cases: list[Case]


def read_cases(output: Path) -> list[Case]:
    return read_told(output).cases


def left_out(output: Path) -> dict[str, int]:
    """How many grids of each row could not be made; only rows that have some."""
    return read_told(output).left_out


def read_told(output: Path) -> CasesFile:
    """What `cases.json` says. Raises `UserError` where it is something else."""
    path = output / GRIDS / CASES
    with reading(path, "damaged, or not written by 'vcdeft eval'; give another --output"):
        found = TypeAdapter(CasesFile).validate_json(read_text(path), strict=True, extra="forbid")
    for case in found.cases:
        names = [*case.truths, *case.shown.values(), case.box]
        last = len(case.roles) - case.targets
        whole = len(case.truths) == case.targets and 0 < len(case.shown) == last
        if not whole or not all(name is None or PICTURE.fullmatch(name) for name in names):
            raise UserError(f"{path}: not written by 'vcdeft eval'; give another --output")
    return found


class RecordFile(SettingsFile):
    """What is read of the record of a grid, beside what makes its images."""

    images: list[str]
    device: str
    dtype: str
    versions: dict[str, str]


def record_of(case: Case, images: Path) -> dict[str, Any]:
    """What `vcdeft infer` says of a grid in the folder `images`."""
    path = images / f"{case.name}.json"
    found = checked(path, RecordFile, "no record of vcdeft")
    if len(found["images"]) != len(case.seeds) * case.targets:
        raise UserError(f"{path}: no record of vcdeft: {len(found['images'])} images; remove it")
    return found


def shots_of(cases: Sequence[Case], output: Path, images: Path) -> list[Shot]:
    """Every image that `vcdeft infer` made in the folder `images` of the grids in `output`."""
    grids = output / GRIDS
    found = []
    for case in cases:
        names = record_of(case, images)["images"]
        answers = [(seed, k) for seed in case.seeds for k in range(case.targets)]
        for name, (seed, k) in zip(names, answers, strict=True):
            truth = case.truths[k]
            found.append(
                Shot(
                    image=images / name,
                    row=case.row,
                    unit=case.unit,
                    grid=case.name,
                    task=case.task,
                    role=case.roles[k - case.targets],
                    seed=seed,
                    prompt=case.prompt,
                    truth=grids / truth if truth else None,
                    shown={role: grids / path for role, path in case.shown.items()},
                    references=tuple(grids / path for path in case.references),
                    box=grids / case.box if case.box else None,
                    classes=case.classes,
                )
            )
    return found
