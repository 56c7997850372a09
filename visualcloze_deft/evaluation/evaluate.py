"""What `vcdeft eval` does: grids made, completed, scored and reported.

OUTPUT/settings.json   what was asked, to the number; another evaluation's folder is refused
OUTPUT/grids/          the grids of the suite, see `cases`
OUTPUT/images/, base/  what `vcdeft infer` makes of them; base: without the adapter
OUTPUT/features/       features of images by their content and their encoder; maps/: conditions
OUTPUT/results.jsonl   the scores of every image
OUTPUT/table.md, table.csv, report.html; retention.csv, drift.csv, sets.csv where they have rows
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from visualcloze_deft.backbones.embedding_cache import Encodings
from visualcloze_deft.data.annotation.models import check_role, fastest
from visualcloze_deft.data.annotation.source import check_models
from visualcloze_deft.data.annotation.store import is_stored
from visualcloze_deft.data.unpaired import OWN
from visualcloze_deft.errors import UserError
from visualcloze_deft.evaluation.cases import (
    GRID_FILE,
    GRIDS,
    Case,
    Shot,
    left_out,
    shots_of,
    write_cases,
)
from visualcloze_deft.evaluation.encoders.efficientnet_lite0 import PACKAGE
from visualcloze_deft.evaluation.encoders.load import OFFLINE, Encoder, load_encoder
from visualcloze_deft.evaluation.notes import ceiling, facts_of, notes_of, records, unlike, unmade
from visualcloze_deft.evaluation.own_data import held_out_by, remarks_on
from visualcloze_deft.evaluation.report_page import Results, as_markdown, as_page
from visualcloze_deft.evaluation.report_tables import (
    Scored,
    as_csv,
    as_jsonl,
    before_after_csv,
    before_after_of,
    drift_table,
    lines_of,
    sets_csv,
    table_of,
)
from visualcloze_deft.evaluation.scoring import (
    Measures,
    SetScore,
    check_lpips,
    drifts,
    score,
    set_scores,
)
from visualcloze_deft.evaluation.settings import (
    REPORT,
    RESULTS,
    SETTINGS,
    EvaluationRequest,
    Scoring,
    check_same,
    name_of,
    request_facts,
    settings_text,
)
from visualcloze_deft.evaluation.suite_queries import GridSettings, Row
from visualcloze_deft.evaluation.suites import SUITES, check_suite, rows_of
from visualcloze_deft.inference.checks import check
from visualcloze_deft.inference.infer import infer
from visualcloze_deft.inference.records import WAY_OUT, shared_of
from visualcloze_deft.inference.settings import InferenceSettings
from visualcloze_deft.runtime.launch import check_processes
from visualcloze_deft.storage.atomic import write_text
from visualcloze_deft.storage.locks import only_writer

IMAGES, BASE, FEATURES, MAPS = "images", "base", "features", "maps"


def evaluate_suite(asked: EvaluationRequest, output: Path, *, dry_run: bool = False) -> Path | None:
    """Evaluate an adapter (or, without one, the base) on a suite; returns the report. What a run
    before this one has made in `output` is used.

    Raises `UserError` for whatever can be known to be wrong before anything is made.
    """
    check_suite(asked.suite)
    if asked.against_base and not asked.settings.adapters:
        raise UserError("--against-base compares an adapter with its base: name one, not none")
    check(asked.settings)
    check_processes(asked.processes)
    shared = shared_of(asked.settings)
    making, held_out = making_of(asked, shared)
    rows = rows_of(asked.suite, making)
    spec = f"{OWN}={making.data.get(OWN, '')}"
    remarks = remarks_on(held_out, spec, making.validation_every, rows)
    images = asked.images or SUITES[asked.suite].images
    made = request_facts(asked, making, rows, images, shared)
    check_same(output, made)
    check_scoring(asked.scoring)
    encoders = load_encoders(asked.scoring.encoders, output)
    for line in (*(described(asked, rows, images) if dry_run else ()), *remarks):
        tqdm.write(line)
    if dry_run:
        return None
    with only_writer(output):
        write_text(output / SETTINGS, settings_text(made, asked.scoring, encoders, shared))
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
        notes += remarks
        notes += unlike({name: records(cases, output / name) for name in ways})
        facts = facts_of(asked, making, cases, len(found), encoders, shared)
        title = f"{asked.suite}: {name_of(asked)}"
        tolerance = asked.scoring.tolerance or 0
        return report(output, title, facts, found, sets, notes, cases, tolerance=tolerance)


def making_of(
    asked: EvaluationRequest, shared: Mapping[str, Any]
) -> tuple[GridSettings, int | None]:
    """How grids are made, with what the model and the adapter's run say; and `held_out_by` it."""
    making = replace(
        asked.making,
        resolution=shared["resolution"],
        cells=shared["cells"],
        task_folders=tuple(map(str, asked.settings.all_task_folders)),
    )
    if asked.suite != OWN:
        return making, None
    held_out = held_out_by(asked.settings.adapters, f"{OWN}={making.data.get(OWN, '')}")
    every = making.validation_every or held_out or 0
    return replace(making, validation_every=every), held_out


def described(asked: EvaluationRequest, rows: Sequence[Row], images: int) -> list[str]:
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
    asked: EvaluationRequest, cases: Sequence[Case], output: Path, shared: Mapping[str, Any]
) -> list[list[Shot]]:
    """The images of all grids, by the adapter, and by the base where it is asked."""
    ways = {IMAGES: asked.settings}
    if asked.against_base:
        ways[BASE] = replace(
            asked.settings,
            adapters={},
            task_folders=tuple(map(str, asked.settings.all_task_folders)),
            clip_text=shared["clip_text"],
            cells=shared["cells"],
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


def command(settings: InferenceSettings, output: Path, name: str) -> list[str]:
    """The `vcdeft infer` that makes the same images, for further processes."""
    words: list[object] = ["infer", "--examples", output / GRIDS / GRID_FILE]
    words += [
        "--output",
        output / name,
        "--model",
        settings.model,
        "--inference-steps",
        settings.steps,
    ]
    words += ["--guidance", settings.guidance, "--batch", settings.batch]
    words += ["--quantise", settings.quantise]
    for folder, scale in settings.adapters.items():
        words += ["--adapter", f"{folder}={scale!r}"]
    for option, value in (
        ("--model-lora", settings.lora),
        ("--clip-text", settings.clip_text),
        ("--cells", settings.cells),
        *(("--task-folder", folder) for folder in settings.task_folders),
    ):
        words += [option, value] if value else []
    return [str(word) for word in words]


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
        kept=before_after_of(found),
        sets=sets,
        notes=notes,
        settings=text,
    )
    write_text(output / RESULTS, as_jsonl(lines_of(found, output)))
    write_text(output / "table.csv", as_csv(results.table))
    for name, text in further_csv(results).items():
        if text:
            write_text(output / name, text)
        else:
            (output / name).unlink(missing_ok=True)  # of a call that asked for more
    write_text(output / "table.md", as_markdown(results))
    write_text(output / REPORT, as_page(results, output, cases))
    return output / REPORT


def further_csv(results: Results) -> dict[str, str]:
    """The tables below the first one, "" for those without rows."""
    kept, drift, sets = results.kept, results.drift, results.sets
    return {
        "retention.csv": before_after_csv(kept, results.table.metrics) if kept else "",
        "drift.csv": as_csv(drift) if drift.rows else "",
        "sets.csv": sets_csv(sets) if sets else "",
    }
