"""The table of data sources, and the spec that opens one: "scenes", "scenes=N" or "name=PATH"."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from visualcloze_deft.config.source_specs import PROCEDURAL, name_and_place
from visualcloze_deft.data.base import Source
from visualcloze_deft.data.sources.dreambench_plus import DreamBenchPlus
from visualcloze_deft.data.sources.dreambooth import DreamBooth
from visualcloze_deft.data.sources.folder import Folder
from visualcloze_deft.data.sources.graph200k import Graph200K
from visualcloze_deft.data.sources.insdet import InsDet
from visualcloze_deft.data.sources.photos import Photos
from visualcloze_deft.data.sources.scenes import Scenes, Subject
from visualcloze_deft.errors import OnFault, UserError, stop, suggestion


@dataclass(frozen=True, kw_only=True)
class Opening:
    """size: the side in pixels pictures are wanted at; seed: of what is made, not read; cache: a
    folder for indexes, None for none; on_fault: gets what is wrong with an item that is passed
    over, of sources that are told by rows."""

    size: int
    seed: int
    cache: Path | None = None
    on_fault: OnFault = stop


def open_source(
    spec: str, *, size: int, seed: int, cache: Path | None = None, on_fault: OnFault = stop
) -> Source:
    """The source named by `spec`.

    size, seed, cache, on_fault: see `Opening`.
    """
    name, argument = name_and_place(spec)
    if name not in SOURCES:
        raise UserError(f"unknown data source {name!r}; {suggestion(name, SOURCES)}")
    if name not in PROCEDURAL and not argument:
        raise UserError(f"data source {name!r} needs a path: {name}=PATH")
    return SOURCES[name](argument, Opening(size=size, seed=seed, cache=cache, on_fault=on_fault))


def _scenes(count: str, opening: Opening) -> Source:
    if not count:
        return Scenes(size=opening.size, seed=opening.seed)
    if not _is_number(count) or not int(count):
        raise UserError(f"scenes={count}: the number of scenes must be a whole number above 0")
    return Scenes(size=opening.size, seed=opening.seed, count=int(count))


def _is_number(text: str) -> bool:
    """Whether a text is a whole number that something can be counted with."""
    return text.isdecimal() and len(text) < 10


def _subject(argument: str, opening: Opening) -> Source:
    """Subject number N (0 where not said) in the pictures that are trained on, or, with "views" or
    "N/views", in others."""
    number, _, views = argument.rpartition("/") if "views" in argument else (argument, "", "")
    if views not in ("", "views") or not _is_number(number or "0"):
        raise UserError(f"subject={argument}: expected subject=N, or subject=N/views")
    return Subject(size=opening.size, number=int(number or 0), views=bool(views))


def _graph200k(place: str, opening: Opening) -> Source:
    """Unpacked (a data.json beside its pictures), or as a table: a folder of parquet or arrow
    files, or a data set of the hub, with "@SPLIT" behind it ("train" where not said)."""
    if Path(place).is_file() or (Path(place) / "data.json").is_file():
        return Graph200K(Path(place), cache=opening.cache, on_fault=opening.on_fault)
    from visualcloze_deft.data.sources.graph200k_hub import GraphTable

    return GraphTable(place)


ROLES_OF: dict[str, frozenset[str]] = {  # what items of a source may have; "folder": anything
    "scenes": Scenes.roles,
    "subject": Subject.roles,
    "graph200k": Graph200K.may_have,
    "photos": Photos.roles,
    "dreambooth": DreamBooth.roles,
    "dreambench-plus": DreamBenchPlus.roles,
    "insdet": InsDet.may_have,
}
SOURCES: dict[str, Callable[[str, Opening], Source]] = {
    "scenes": _scenes,
    "subject": _subject,
    "folder": lambda path, opening: Folder(
        Path(path), cache=opening.cache, on_fault=opening.on_fault
    ),
    "graph200k": _graph200k,
    "photos": lambda path, _: Photos(Path(path)),
    "dreambooth": lambda path, _: DreamBooth(Path(path)),
    "dreambench-plus": lambda path, _: DreamBenchPlus(Path(path)),
    "insdet": lambda path, opening: InsDet(Path(path), size=opening.size),
}
