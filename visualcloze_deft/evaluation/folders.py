"""Images that were made elsewhere, scored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from visualcloze_deft.data.annotation.source import check_models
from visualcloze_deft.errors import UserError
from visualcloze_deft.evaluation.cases import Shot
from visualcloze_deft.evaluation.encoders.load import OFFLINE
from visualcloze_deft.evaluation.evaluate import (
    check_scoring,
    chosen,
    load_encoders,
    measures_of,
    report,
)
from visualcloze_deft.evaluation.notes import notes_of, told_encoders
from visualcloze_deft.evaluation.pairing import left_out_sheets, partners, pictures_of, resized
from visualcloze_deft.evaluation.report_tables import Scored
from visualcloze_deft.evaluation.score_metrics import COMPARED
from visualcloze_deft.evaluation.scoring import FeatureCache, SetScore, score, set_distances
from visualcloze_deft.evaluation.settings import SETTINGS, Scoring, check_same, settings_text
from visualcloze_deft.storage.atomic import write_text
from visualcloze_deft.storage.locks import only_writer
from visualcloze_deft.storage.text_files import read_json, sound


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
    """Score the pictures in the folder `images` against those in `against`: see `partners`, or as
    two sets where they are `unpaired`. prompts: a JSON object, stem -> prompt.

    Raises `UserError` where there are none, or one has no partner.
    """
    pictures, sheets = pictures_of("images", images)
    truths, more_sheets = pictures_of("against", against)
    leaving = left_out_sheets(sheets + more_sheets)
    if not unpaired:
        truths = partners(images, pictures, against, truths)
        leaving += resized(pictures, truths)
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
    if dry_run:
        encoders = ", ".join(chosen(scoring.encoders)) or "none: pixels alone"
        for line in (*leaving, f"{len(shots)} images to score; encoders: {encoders}"):
            tqdm.write(line)
        return None
    with only_writer(output):
        write_text(output / SETTINGS, settings_text(made, scoring, loaded, {}))
        edges = () if scoring.tolerance is None else ("canny",)
        always = (*scoring.annotate, *edges)
        scores = score(shots, replace(measures_of(scoring, loaded, output), always=always))
        found = [Scored(shot=shot, scores=one) for shot, one in zip(shots, scores, strict=True)]
        others = [*dict.fromkeys(truths.values())]
        sets: list[SetScore] = []
        for encoder in loaded if min(len(shots), len(others)) >= 4 else ():
            kept = FeatureCache(encoder, "sets")
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
