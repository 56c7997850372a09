"""The lines that a run and an evaluation write, each an object of JSON, as they are read again."""

from __future__ import annotations

import math
from os.path import lexists
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from visualcloze_deft.errors import UserError
from visualcloze_deft.storage.settings_files import SettingsFile, check_fields
from visualcloze_deft.storage.text_files import parse_json, read_text

Whole = Annotated[int, Field(ge=0, le=10**12)]
Figure = float | None  # None: not finite


class Line(SettingsFile):
    """Any line: of a step."""

    step: Whole


class StepLine(Line):
    """Of `metrics.jsonl`; older runs have fewer figures."""

    examples: Whole
    seconds: Annotated[float, Field(ge=0)]
    loss: Figure
    tasks: dict[str, Figure]
    exact: dict[str, Figure] = Field(default_factory=dict)
    norms: dict[str, Figure] = Field(default_factory=dict)
    lr: Figure = None
    gradient_norm: Figure = None
    examples_per_second: Figure = None
    tokens_per_second: Figure = None
    utilisation: Figure = None
    waiting: Figure = None
    idle: Figure = None
    memory: Annotated[float, Field(ge=0)] | None = None


class EvaluationLine(Line):
    """Of `evaluation.jsonl`."""

    loss: Figure
    tasks: dict[str, Figure]
    times: dict[str, Figure]


class SkippedLine(Line):
    """Of `skipped.jsonl`."""

    source: str
    item: str
    why: str


def read_lines(path: Path, kind: type[Line] = Line) -> list[dict[str, Any]]:
    """The lines of a file; of one that is not there, none. A last line that is being written, or
    was cut short by a kill, is left out. Raises `UserError` for any other that is not of `kind`."""
    if not lexists(path):
        return []
    *lines, last = read_text(path).split("\n")
    if math.isfinite(step_of(last)):
        lines.append(last)
    return [read_line(f"{path}, line {k}", line, kind) for k, line in enumerate(lines, 1)]


def read_line(where: str, line: str, kind: type[Line]) -> dict[str, Any]:
    try:
        found = parse_json(where, line)
        if not isinstance(found, dict):
            raise UserError(f"{where}: no object")
        check_fields(where, kind, found)
    except UserError as error:
        raise UserError(f"{error}; remove that line") from None
    return found


def step_of(line: str) -> float:
    """The step of a line; infinite where it has none, as of one cut short by a kill."""
    try:
        return Line.model_validate(parse_json("line", line)).step
    except (UserError, ValidationError):
        return math.inf
