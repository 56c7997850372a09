"""What of its folder a source did not take, and why."""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

from visualcloze_deft.data.base import Source
from visualcloze_deft.data.index import Indexed
from visualcloze_deft.data.sources.dreambench_plus import DreamBenchPlus
from visualcloze_deft.data.sources.dreambooth import DreamBooth
from visualcloze_deft.data.sources.folder import Folder
from visualcloze_deft.data.sources.graph200k_hub import COLUMNS, WORDS, GraphTable
from visualcloze_deft.data.sources.insdet import SAME_PLACE, InsDet, boxes_of
from visualcloze_deft.data.sources.photos import Photos
from visualcloze_deft.errors import one_line
from visualcloze_deft.images.reading import SUFFIXES, files_below, folders_in, images_in
from visualcloze_deft.storage.inside import path_inside
from visualcloze_deft.storage.tar_members import member_at

NO_PICTURES = frozenset(  # suffixes of files that stand beside pictures and are none
    ".txt .json .jsonl .toml .md .csv .tsv .xml .yaml .yml .html .pdf .parquet .arrow .lock "
    ".license .py .sh".split()
)
CAPTION = ".txt"  # of a text that would be read
NAMED = 3  # files that a line names
SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.parquet")


def left_out(source: Source) -> list[str]:
    """A line for each reason for which something in the folder of `source` is in no item."""
    found: Iterable[str] = ()
    if isinstance(source, Folder):
        found = chain(unused(source.folder, files_of(source)), unread_texts(source))
    elif isinstance(source, Indexed):
        found = unused(source.folder, files_of(source))
    elif isinstance(source, GraphTable):
        found = of_table(source)
    elif isinstance(source, InsDet):
        found = chain(of_insdet(source), unused(source.root, used_by_insdet(source)))
    elif isinstance(source, DreamBooth):
        photos = {path for pair in source.pairs for path in pair}
        found = unused(source.folder, map(str, photos))
    elif isinstance(source, Photos):
        found = chain(of_photos(source), unused(source.folder, map(str, source.files)))
    elif isinstance(source, DreamBenchPlus):
        found = unused(source.images, map(str, source.pictures.values()))
    return [one_line(line) for line in found]


def files_of(source: Indexed) -> Iterator[str]:
    """The files that hold the pictures of a source: an archive, of those in one."""
    for paths in source.table["paths"]:
        for path in paths.as_py():
            place = os.fsdecode(path)
            member = member_at(place)
            yield path_inside(str(source.folder), member.archive if member else place)


def unused(folder: Path, used: Iterable[str]) -> Iterator[str]:
    """The files in `folder` and its folders that are no text and not among `used`, by reason."""
    taken = {os.path.abspath(path) for path in used}
    by_reason: dict[str, list[str]] = defaultdict(list)
    for path in files_below(folder):
        name = os.path.relpath(path, folder)
        suffix = os.path.splitext(name)[1].lower()
        beside = suffix in NO_PICTURES and (suffix != CAPTION or os.path.isfile(path))
        if is_hidden(name) or beside or os.path.abspath(path) in taken:
            continue
        if not os.path.exists(path):
            reason = "a link that leads nowhere"
        elif not os.path.isfile(path):
            reason = "a pipe or a device"
        elif suffix in SUFFIXES:
            reason = "a picture that belongs to no item"
        else:
            reason = f"{suffix or 'a name without suffix'} is not read"
        by_reason[reason].append(name)
    for reason, names in by_reason.items():
        yield f"{listed(names)}: {reason}"


def unread_texts(source: Folder) -> Iterator[str]:
    """Texts beside the pictures of a folder, or in folders there, that no item has."""
    read = {str(path) for index in range(len(source)) for path in source.text_files(index)}
    texts = (path for path in files_below(source.folder) if path.endswith(CAPTION))
    lone = [path for path in texts if path not in read and os.path.isfile(path)]
    names = (os.path.relpath(path, source.folder) for path in lone)
    if seen := [name for name in names if not is_hidden(name)]:
        yield f"{listed(seen)}: a text that is read for no item"


def is_hidden(name: str) -> bool:
    """Whether a relative path, or a folder in it, begins with a point."""
    return any(part.startswith(".") for part in name.split(os.sep))


def listed(names: list[str]) -> str:
    """The first names, and how many there are.

    >>> listed(["a", "b", "c", "d", "e"])
    'a, b, c and 2 more'
    """
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def of_photos(source: Photos) -> Iterator[str]:
    """Captions that no photo has the name of."""
    known = {path.stem for path in source.files}
    if lone := sorted(path.name for path in source.folder.glob("*.txt") if path.stem not in known):
        yield f"{listed(lone)}: no photo of that name"


def of_table(source: GraphTable) -> Iterator[str]:
    """Shards that are missing or of another split, and columns that nothing reads."""
    folder = Path(source.folder)
    shards = sorted(path.name for path in folder.rglob("*.parquet")) if folder.is_dir() else []
    if others := [name for name in shards if not name.startswith(source.split)]:
        yield f"{listed(others)}: of another split than {source.split}; @SPLIT behind the path"
    told: dict[tuple[str, str], set[str]] = defaultdict(set)
    for name in shards:
        if (parts := SHARD.fullmatch(name)) and name.startswith(source.split):
            told[parts[1], parts[3]].add(parts[2])
    for (split, count), numbers in told.items():
        every = {f"{k:05d}" for k in range(int(count))}
        if missing := sorted(every - numbers):
            names = [f"{split}-{number}-of-{count}.parquet" for number in missing]
            yield f"{listed(names)}: missing; {len(numbers)} of {int(count)} files are there"
    if columns := sorted({*source.table.column_names} - {*COLUMNS, *WORDS}):
        yield f"{listed(columns)}: columns that no role is read from"


def of_insdet(source: InsDet) -> Iterator[str]:
    """Boxes of objects that have no folder, and objects that cannot be turned."""
    if not source.same:
        yield f"Scenes/{SAME_PLACE}: not there; no photo is paired with one of the same place"
    strangers: Counter[str] = Counter(
        name
        for path in sorted(source.root.glob("Scenes/*/*/rgb_*.xml"))
        for name in boxes_of(path)
        if name not in source.views
    )
    if strangers:
        boxes = sum(strangers.values())
        yield f"{listed(sorted(strangers))}: no folder in Objects; {boxes} boxes are passed over"
    if few := [name for name, views in source.views.items() if len(views) < 2]:
        yield f"{listed(few)}: fewer than two views, so it is not shown turned"
    for objects in folders_in(source.root / "Objects"):
        photos = images_in(objects / "images")
        masks = images_in(objects / "masks") if (objects / "masks").is_dir() else {}
        if bare := sorted(photos.keys() - masks.keys()):
            yield f"{objects.name}: no mask for {listed(bare)}; the whole photo is shown"


def used_by_insdet(source: InsDet) -> Iterator[str]:
    places = source.root.glob("Scenes/*/*/rgb_*.xml")
    with_boxes = [path for path in places if any(n in source.views for n in boxes_of(path))]
    views = [view for views in source.views.values() for view in views]
    yield from (str(view.image) for view in views)
    yield from (str(view.mask) for view in views if view.mask)
    yield from (str(path.with_suffix(".jpg")) for path in with_boxes)
    yield from (str(photo) for same in source.same.values() for photos in same for photo in photos)
    background = source.root / "Background"
    if background.is_dir():
        yield from map(str, images_in(background).values())
