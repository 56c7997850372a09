"""What an evaluation is asked for, and whether a folder holds the same one."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from visualcloze_deft.config.sameness import MAY_DIFFER, differences
from visualcloze_deft.config.source_specs import from_root, place_and_split
from visualcloze_deft.data.annotation.store import RECORD
from visualcloze_deft.errors import UserError
from visualcloze_deft.evaluation.encoders.load import Encoder
from visualcloze_deft.evaluation.suite_queries import GridSettings, Row
from visualcloze_deft.images.depth import DECLARED
from visualcloze_deft.inference.settings import InferenceSettings
from visualcloze_deft.storage.atomic import check_foreign
from visualcloze_deft.storage.locks import LOCK
from visualcloze_deft.storage.settings_files import SettingsFile, checked
from visualcloze_deft.storage.text_files import brief

SETTINGS, RESULTS, REPORT = "settings.json", "results.jsonl", "report.html"
LISTED_IN = ("data.json", RECORD)  # files that tell the pictures of a folder


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """How images are scored. encoders: as `features.load_encoder` reads them; None for the offline
    one where it is installed. annotate: role -> model. tolerance: of edges in pixels; None is 0,
    and of folders edges are not compared."""

    encoders: tuple[str, ...] | None = None
    annotate: Mapping[str, str] = field(default_factory=dict)
    tolerance: int | None = None
    lpips: bool = False


@dataclass(frozen=True, kw_only=True)
class EvaluationRequest:
    """What `vcdeft eval RUN` is told. settings: how grids are completed, the adapter in them;
    making: but for what the model says; images: of each grid, None for the suite's number;
    against_base: whether the base completes them too."""

    suite: str
    settings: InferenceSettings
    scoring: Scoring
    making: GridSettings
    images: int | None = None
    against_base: bool = False
    processes: int = 0


def name_of(asked: EvaluationRequest) -> str:
    told = [str(f) + (f"={s:g}" if s != 1 else "") for f, s in asked.settings.adapters.items()]
    return " + ".join(told) or f"{asked.settings.model} without adapter"


def request_facts(
    asked: EvaluationRequest,
    making: GridSettings,
    rows: Sequence[Row],
    images: int,
    shared: Mapping[str, Any],
) -> dict[str, Any]:
    """What grids and images hang on: where one of these differs, a folder is of another
    evaluation."""
    places = {name: from_root(place) for name, place in making.data.items()}
    annotate = dict(making.annotate) if asked.suite in ("graph200k", "folder") else {}
    fields = {
        "suite": asked.suite,
        "data": places,
        "tasks": making.tasks,
        "task_folders": list(making.task_folders),
        "rows": making.rows,
        "limit": making.limit,
        "images": images,
        "seed": making.seed,
        "validation_every": making.validation_every,
        # where data may lack roles, they are part of the grids
        "annotate": annotate,
    }
    fields |= {k: v for k, v in shared.items() if k not in MAY_DIFFER["infer"]}
    return fields | {
        "grids": {row.name: row.count for row in rows},
        "data_state": {n: state_of(place) for n, place in {**making.data, **annotate}.items()},
    }


def state_of(place: str) -> str | None:
    """What changes when files of data come, go or are written: SHA-256 of their names, sizes and
    times. Of Graph200K unpacked and of annotations it is that of the file that lists the pictures,
    of which there may be millions; None of what is made here or on the hub."""
    root = Path(place)
    if place and not root.exists():
        root = Path(place_and_split(place)[0])
    if not place or not root.exists():
        return None
    root = next((root / name for name in LISTED_IN if (root / name).is_file()), root)
    files = [root] if root.is_file() else sorted(path for path in root.rglob("*") if path.is_file())
    if root.is_file():  # and what says what its depth maps mean
        files += [path for path in (root.parent / DECLARED,) if path.is_file()]
    told = hashlib.sha256()
    for path in files:
        if not path.name.startswith("."):
            found = path.stat()
            told.update(os.fsencode(os.path.relpath(path, root)))
            told.update(f" {found.st_size} {found.st_mtime_ns}\n".encode())
    return told.hexdigest()


class MadeFile(SettingsFile):
    """What is read again of `SETTINGS`."""

    made: dict[str, Any]


def check_same(output: Path, made: Mapping[str, Any]) -> None:
    """Raise `UserError` where `output` holds anything but this very evaluation."""
    path = output / SETTINGS
    if not path.is_file():
        check_foreign(output, (LOCK, f".{SETTINGS}.*.part"), what="evaluation")
        return
    try:
        before = checked(path, MadeFile, "no evaluation's settings")["made"]
    except UserError as error:
        raise UserError(f"--output {output}: {error}; give another folder") from None
    now = json.loads(json.dumps(made))
    for other in differences(before, now):
        if other.name == "data_state":
            told = other.before if isinstance(other.before, dict) else {}
            changed = [name for name, state in other.now.items() if state != told.get(name)]
            raise UserError(
                f"--output {output}: its grids are of data whose files have come, gone or been "
                f"written since ({', '.join(changed)}); give another folder"
            )
        raise UserError(
            f"--output {output}: holds another evaluation, with {other.name} "
            f"{brief(other.before)} where now {brief(other.now)} is asked for; give another folder"
        )


def settings_text(
    made: Mapping[str, Any],
    scoring: Scoring,
    encoders: Sequence[Encoder],
    shared: Mapping[str, Any],
) -> str:
    """`settings.json`: `made` is compared when a folder is given again, the rest may change."""
    also = ("model", "adapters", "dtype", "device", "batch", "versions")
    scored = {
        "encoders": [
            {"name": e.name, "place": e.place, "fingerprint": e.fingerprint} for e in encoders
        ],
        "annotate": dict(scoring.annotate),
        "edge_tolerance": scoring.tolerance or 0,
        "lpips": scoring.lpips,
    }
    here = {key: shared[key] for key in also if key in shared}
    return json.dumps({"made": made, "scored": scored, "here": here}, indent=1) + "\n"
