"""Reading a source whole: what each item has, how large it is, how it was read, what is broken."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from visualcloze_deft.data.base import Source
from visualcloze_deft.data.derive import ALIGNED, ALIKE, misfits, missing
from visualcloze_deft.data.served import Kinds, served
from visualcloze_deft.data.unpaired import OWN
from visualcloze_deft.errors import UserError, one_line
from visualcloze_deft.images.depth import SPAN
from visualcloze_deft.images.maps import MASKS, TURNED
from visualcloze_deft.images.reading import READ_AS
from visualcloze_deft.reporting.numbers import counted_as
from visualcloze_deft.task_registry.task import Task

PLAIN = 64  # of 255 levels: a role most of whose pictures use fewer is worth a look


@dataclass(frozen=True, kw_only=True)
class PictureReport:
    """size: (width, height) in pixels. levels: from its darkest value to its lightest, of 255. how:
    its file was read, "" where there is nothing to say. span: near and far in metres. turned: the
    EXIF orientation, 1 for none."""

    size: tuple[int, int]
    levels: int
    how: str = ""
    span: tuple[float, float] | None = None
    turned: int = 1


@dataclass(frozen=True, kw_only=True)
class ItemReport:
    """One item: role -> what could be read, role -> what is wrong. instead: see `Item`."""

    key: str
    pictures: Mapping[str, PictureReport]
    faults: Mapping[str, str] = field(default_factory=dict)
    texts: tuple[str, ...] = ()
    instead: Mapping[str, str] = field(default_factory=dict)


def look(source: Source, index: int) -> ItemReport:
    """Read every picture of an item."""
    try:
        item = source.item(index)
    except UserError as error:
        return ItemReport(key=f"item {index}", pictures={}, faults={"": str(error)})
    pictures, faults = {}, {}
    for role in item.images:
        try:
            pictures[role] = seen_in(item.image(role))
        except UserError as error:
            faults[role] = str(error)
    for role, why in misfits({role: one.size for role, one in pictures.items()}).items():
        faults[role] = why
        del pictures[role]
    texts = tuple(name for name, text in item.texts.items() if text)
    return ItemReport(
        key=item.key, pictures=pictures, faults=faults, texts=texts, instead=item.instead
    )


def seen_in(image: Image.Image) -> PictureReport:
    """What `report` tells of an RGB picture."""
    values = np.asarray(image)
    return PictureReport(
        size=image.size,
        levels=int(values.max()) - int(values.min()),
        how=image.info.get(READ_AS, ""),
        span=image.info.get(SPAN),
        turned=image.info.get(TURNED, 1),
    )


def look_at_all(source: Source, *, workers: int) -> Iterator[ItemReport]:
    """Every item of `source`, in order, read by `workers` processes (0: by this one)."""
    if workers == 0:
        yield from (look(source, index) for index in range(len(source)))
        return
    with ProcessPoolExecutor(workers, initializer=_receive, initargs=(source,)) as pool:
        yield from pool.map(_look, range(len(source)), chunksize=8)


_source: Source  # of a reading process


def _receive(source: Source) -> None:
    global _source
    _source = source


def _look(index: int) -> ItemReport:
    return look(_source, index)


@dataclass(frozen=True, kw_only=True)
class SourceReport:
    """A source that was read whole. lines: what there is; broken: what is not, and why. kinds: how
    many items have which roles. units: of a user's folder, see `units_of`."""

    lines: Sequence[str]
    broken: Sequence[str]
    kinds: Counter[frozenset[str]]
    units: int = 0


def report(
    seen: Iterable[ItemReport], tasks: Mapping[str, Task], *, source: str, notes: Sequence[str] = ()
) -> SourceReport:
    """What is told of a source, by its name. notes: how it was read, beside what its pictures
    tell."""
    found: dict[str, list[PictureReport]] = defaultdict(list)
    texts: Counter[str] = Counter()
    broken: list[str] = []
    kinds: Counter[frozenset[str]] = Counter()
    unsure: Counter[str] = Counter()
    instead: Counter[tuple[str, str]] = Counter()
    uneven: list[ItemReport] = []
    for one in seen:
        unsure.update(doubtful(one.pictures))
        instead.update(one.instead.items())
        uneven += [one] if source == OWN and is_uneven(one.pictures) else []
        kinds[frozenset(one.pictures)] += 1
        texts.update(one.texts)
        for role, picture in one.pictures.items():
            found[role].append(picture)
        broken += [f"{one.key}{role and f', {role}'}: {why}" for role, why in one.faults.items()]
    remarks = [*notes, *remarks_on(found, unsure)]
    remarks += [*texts_instead(instead, kinds, tasks), *cropped(uneven)]
    if remarks:
        remarks = ["", "how files were read", *(f"  {line}" for line in remarks)]
    lines = [*sizes_of(found, texts, sum(kinds.values())), *remarks, *served(kinds, tasks)]
    broken = [one_line(line) for line in broken]
    return SourceReport(lines=lines, broken=broken, kinds=kinds)


def sizes_of(
    found: Mapping[str, Sequence[PictureReport]], texts: Counter[str], count: int
) -> list[str]:
    """Lines on how many pictures and texts there are, and how large."""
    width = max(map(len, [*found, *texts, "role"])) + 2
    lines = [f"{count} items", "", f"{'role':{width}}items  pixels, middle of all"]
    for role, pictures in sorted(found.items(), key=lambda pair: (-len(pair[1]), pair[0])):
        sizes = [picture.size for picture in pictures]
        middle = " x ".join(
            str(round(statistics.median(side))) for side in zip(*sizes, strict=True)
        )
        least, most = min(map(min, sizes)), max(map(max, sizes))
        lines.append(f"{role:{width}}{len(sizes):5}  {middle} ({least} to {most} a side)")
    return lines + [f"{name:{width}}{count:5}  (text)" for name, count in texts.most_common()]


def remarks_on(
    found: Mapping[str, Sequence[PictureReport]], unsure: Mapping[str, int]
) -> Iterator[str]:
    """How the files of all roles were read. unsure: role -> how many maps `doubtful` names."""
    for role, pictures in found.items():
        yield from noted(role, pictures)
    for role, count in unsure.items():
        yield (
            f"{role}: {count} lie beside a target that EXIF turns, and no shape tells whether they "
            "are turned alike; see 'vcdeft data preview'"
        )


def doubtful(pictures: Mapping[str, PictureReport]) -> list[str]:
    """The maps of an item whose target EXIF turns, but not them, and whose shape would be the same
    either way: of half a turn, a mirrored photo, or a square."""
    target = pictures.get("target")
    if target is None or target.turned == 1:
        return []
    width, height = target.size
    if target.turned not in (2, 3, 4) and abs(width / height - 1) > ALIKE:
        return []
    return [role for role in pictures if role in ALIGNED and pictures[role].turned == 1]


def is_uneven(pictures: Mapping[str, PictureReport]) -> bool:
    """Whether the pictures of an item have different proportions."""
    shapes = [width / height for width, height in (one.size for one in pictures.values())]
    return bool(shapes) and max(shapes) / min(shapes) - 1 > ALIKE


def cropped(uneven: Sequence[ItemReport]) -> Iterator[str]:
    """What becomes of the items whose pictures have different proportions."""
    if uneven:
        first = uneven[0]
        sizes = [f"{role} {one.size[0]} x {one.size[1]}" for role, one in first.pictures.items()]
        yield (
            f"{counted_as(len(uneven), 'item')} with images of different proportions, first "
            f"{first.key} ({', '.join(sizes)}): cropped to the shape of the first image of a row; "
            "--set data.cells=own keeps the shape of each"
        )


def texts_instead(
    instead: Mapping[tuple[str, str], int], kinds: Kinds, tasks: Mapping[str, Task]
) -> Iterator[str]:
    """The texts that tasks read in place of those that items lack. instead: how many items have
    the second of two texts, but not the first."""
    for (lacked, read), count in instead.items():
        readers = [
            task.name
            for task in tasks.values()
            if task.content == lacked and any(not missing(task.roles, roles) for roles in kinds)
        ]
        if readers:
            told = f"{lacked}: missing in {counted_as(count, 'item')}"
            yield f"{told}; {' and '.join(readers)}: the {read} is read instead"


def noted(role: str, pictures: Sequence[PictureReport]) -> Iterator[str]:
    """What to know of how the files of a role were read."""
    ways: dict[str, list[PictureReport]] = defaultdict(list)
    for picture in pictures:
        if picture.how:
            ways[picture.how].append(picture)
    for how, those in ways.items():
        spans = [one.span for one in those if one.span]
        near, far = min(spans, default=(0, 0))[0], max((far for _, far in spans), default=0)
        metres = f", {near:.3g} to {far:.3g} m" if spans else ""
        yield f"{role}: {how}{metres} ({len(those)} items)"
    if len(ways) > 1:
        yield f"{role}: its files were read in {len(ways)} ways; they may mean different things"
    if role in MASKS and (flat := sum(not picture.levels for picture in pictures)):
        yield f"{role}: all of one value in {flat} items, so it marks all or nothing"
    levels = round(statistics.median(picture.levels for picture in pictures))
    if levels < PLAIN:
        yield f"{role}: uses {levels} of 255 levels, in the middle of all; is it meant so dark?"
