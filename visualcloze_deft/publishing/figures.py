"""The figures of an evaluation, as its folder holds them, for a card."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from visualcloze_deft.backbones.peft_files import WEIGHTS
from visualcloze_deft.errors import UserError
from visualcloze_deft.evaluation.cases import Shot
from visualcloze_deft.evaluation.notes import FEW, MEANING
from visualcloze_deft.evaluation.report_tables import (
    Scored,
    before_after_cells,
    before_after_of,
    cells_of,
    table_of,
)
from visualcloze_deft.evaluation.settings import RESULTS, SETTINGS
from visualcloze_deft.reporting import tables
from visualcloze_deft.storage.hashing import digest
from visualcloze_deft.storage.settings_files import SettingsFile, check_fields, checked
from visualcloze_deft.storage.text_files import parse_json, read_text

Score = Annotated[float, Field(ge=-1e9, le=1e9)]


class Made(SettingsFile):
    """What decided the images of an evaluation, as far as a card tells it."""

    suite: str
    adapters_sha256: list[Annotated[list[str | float], Field(min_length=2, max_length=2)]]
    steps: int
    guidance: float
    seed: int
    rows: int


class Scoring(SettingsFile):
    edge_tolerance: Annotated[int, Field(ge=0, le=1000)] = 0


class EvaluationSettings(SettingsFile):
    """Of `settings.json`."""

    made: Made
    scored: Scoring


class ResultLine(SettingsFile):
    """Of `results.jsonl`: one image."""

    image: str
    row: str
    unit: str
    grid: str = ""
    scores: dict[str, Score]
    base: dict[str, Score] | None = None


@dataclass(frozen=True, kw_only=True)
class Figures:
    """An evaluation in words. table: in Markdown. notes: how to read it."""

    suite: str
    about: str
    table: str
    notes: Sequence[str]


def figures_of(folder: Path, adapter: Path) -> Figures:
    """What `vcdeft eval` found in `folder`, of the adapter in the folder `adapter`.

    Raises `UserError` where it is no evaluation, or one of another adapter.
    """
    path = folder / SETTINGS
    if not path.is_file():
        raise UserError(f"--evaluation {folder}: no evaluation there; name a folder of vcdeft eval")
    told = EvaluationSettings.model_validate(
        checked(path, EvaluationSettings, "no settings of an evaluation of an adapter")
    )
    scale = scale_of(folder, told.made, digest(adapter / WEIGHTS))
    found = read_results(folder / RESULTS)
    try:
        table = table_of(found, tolerance=told.scored.edge_tolerance)
    except KeyError as error:
        raise UserError(f"{folder / RESULTS}: unknown metric {error}") from None
    kept = before_after_of(found)
    cells = before_after_cells(kept, table.metrics) if kept else cells_of(table)
    grids, images = len({one.shot.grid for one in found}), len(found)
    made = told.made
    about = (
        f"{images} images of {grids} grids with {made.rows} rows, seed {made.seed}; "
        f"{made.steps} steps, guidance {made.guidance:g}"
    )
    return Figures(
        suite=made.suite,
        about=about + (f"; the adapter at scale {scale:g}" if scale != 1 else ""),
        table=tables.markdown(*cells),
        notes=[MEANING, *few(found)],
    )


def scale_of(folder: Path, made: Made, published: str) -> float:
    """The scale of the one adapter that was evaluated, which must be the one that is published."""
    if len(made.adapters_sha256) != 1:
        which = "of several adapters" if made.adapters_sha256 else "of the base alone"
        raise UserError(f"--evaluation {folder}: {which}; name one of this run's adapter")
    ((sha256, scale),) = made.adapters_sha256
    if sha256 != published or not isinstance(scale, float | int):
        raise UserError(
            f"--evaluation {folder}: of another adapter than this run's is now; evaluate it again"
        )
    return float(scale)


def read_results(path: Path) -> list[Scored]:
    """The scores of every image. Raises `UserError` for a line that is none."""
    found = []
    for number, text in enumerate(read_text(path).splitlines(), 1):
        where = f"{path}, line {number}"
        fields: Any = parse_json(where, text)
        if not isinstance(fields, dict):
            raise UserError(f"{where}: no object")
        check_fields(where, ResultLine, fields)
        found.append(scored(ResultLine.model_validate(fields)))
    if not found:
        raise UserError(f"{path}: no image was scored")
    return found


def scored(line: ResultLine) -> Scored:
    shot = Shot(image=Path(line.image), row=line.row, unit=line.unit, grid=line.grid)
    return Scored(shot=shot, scores=line.scores, base=line.base)


def few(found: Sequence[Scored]) -> list[str]:
    """What to say where a row rests on few units."""
    units: dict[str, set[str]] = {}
    for one in found:
        units.setdefault(one.shot.row, set()).add(one.shot.unit)
    fewest = min(map(len, units.values()))
    if fewest >= FEW:
        return []
    return [f"The smallest row has {fewest} units. Intervals of fewer than {FEW} are too narrow."]
