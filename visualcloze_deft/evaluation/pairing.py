"""Which image is held to which truth, where both lie in folders."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Set
from pathlib import Path

from visualcloze_deft.data.derive import ALIKE
from visualcloze_deft.errors import UserError
from visualcloze_deft.images.reading import images_in, listing, picture_size
from visualcloze_deft.inference.records import SHEET, is_record
from visualcloze_deft.reporting.contact_sheet import image_metadata

TRUTH = re.compile(r"(\d{3,})-\d(\d)-truth")  # of `vcdeft tasks example`: its grid and column
MADE = re.compile(r"(?:.+-)?(\d{3,})(?:-seed\d+)?(?:-(\d))?")  # of `vcdeft infer`: as well


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
    told = image_metadata(path)
    return "of_seed" not in told and ("rows_sha256" in told or is_record(record))


def left_out_sheets(count: int) -> list[str]:
    return [f"Contact sheets of 'vcdeft infer' left out: {count}."] if count else []


def partners(
    images: Path, made: Mapping[str, Path], against: Path, others: Mapping[str, Path]
) -> dict[str, Path]:
    """The truth of each image of `made`, by its stem: the picture of that stem or, where `against`
    holds grids of 'vcdeft tasks example', the truth of that grid and column.

    Raises `UserError` unless every picture has a partner of its proportions.
    """
    truths = {stem: path for stem, path in others.items() if TRUTH.fullmatch(stem)}
    wanted = truths or dict(others)
    grids = by_grid(truths)
    found = {stem: partner for stem in made if (partner := partner_of(stem, wanted, grids))}
    check_partners((images, made, {*found}), (against, wanted, {*found.values()}))
    for stem, partner in found.items():
        (a, b), (c, d) = picture_size(made[stem]), picture_size(partner)
        if abs(a * d / (b * c) - 1) > ALIKE:
            raise UserError(
                f"{made[stem]}: {a} x {b} pixels, its partner {partner} has {c} x {d}: other "
                "proportions; cut them alike"
            )
    return found


def by_grid(truths: Mapping[str, Path]) -> dict[str, dict[str, Path]]:
    """The truths of 'vcdeft tasks example', by grid and column.

    >>> by_grid({"001-22-truth": Path("a")})
    {'001': {'2': PosixPath('a')}}
    """
    found: dict[str, dict[str, Path]] = defaultdict(dict)
    for stem, path in truths.items():
        if told := TRUTH.fullmatch(stem):
            found[told[1]][told[2]] = path
    return dict(found)


def partner_of(
    stem: str, others: Mapping[str, Path], grids: Mapping[str, Mapping[str, Path]]
) -> Path | None:
    """The picture among `others` that an image called `stem` is held to, if one is. grids: see
    `by_grid`.

    >>> partner_of("001-seed7", {}, {"001": {"2": Path("a")}})
    PosixPath('a')
    """
    if stem in others:
        return others[stem]
    parts = MADE.fullmatch(stem)
    name, column = parts.groups() if parts else (None, None)
    of_grid = grids.get(name or "", {})
    if column is None:
        return next(iter(of_grid.values())) if len(of_grid) == 1 else None
    return of_grid.get(column)


def check_partners(
    *sides: tuple[Path, Mapping[str, Path], Set[str | Path]],
) -> None:
    """Raise `UserError` where a picture of a side is without a partner. Each side: its folder, its
    pictures by stem, and the stems or paths of those that have one."""
    way_out = "name pairs alike, or compare the folders as sets: --unpaired"
    for (folder, pictures, paired), (other, there, _) in zip(sides, reversed(sides), strict=True):
        lonely = [p.name for stem, p in pictures.items() if not {stem, p} & paired]
        if lonely:
            more = f" and {len(lonely) - 1} more" if len(lonely) > 1 else ""
            raise UserError(
                f"{folder / lonely[0]}{more}: no partner of that stem in {other} "
                f"({len(pictures)} images against {len(there)}); {way_out}"
            )


def resized(made: Mapping[str, Path], truths: Mapping[str, Path]) -> list[str]:
    """What to say of truths that have another size than their images."""
    odd = [stem for stem, path in truths.items() if picture_size(path) != picture_size(made[stem])]
    if not odd:
        return []
    (a, b), (c, d) = picture_size(made[odd[0]]), picture_size(truths[odd[0]])
    example = f"{truths[odd[0]].name} from {c} x {d} to {a} x {b}"
    return [f"{len(odd)} truths were resized to the size of their images, e.g. {example}."]
