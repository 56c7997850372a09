"""Roles that a source lacks, computed from its targets by models: whenever they are asked for, or
once into a folder.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from visualcloze_deft.data.annotation.models import (
    ANNOTATORS,
    check_model,
    check_role,
    computed,
    fastest,
    loaded,
)
from visualcloze_deft.data.annotation.store import (
    Made,
    Record,
    another,
    fingerprint,
    finished,
    is_stored,
    key_of,
    picture_path,
    read_record,
    save,
    write_record,
)
from visualcloze_deft.data.base import Item, Source, photos_of, units_of
from visualcloze_deft.errors import UserError, one_line
from visualcloze_deft.images.reading import read_image
from visualcloze_deft.storage.atomic import check_foreign, clear_parts
from visualcloze_deft.storage.locks import LOCK, only_writer


@dataclass(frozen=True, kw_only=True)
class Written:
    """What `annotate` did: pictures made and found there, and a line for each broken item."""

    made: int
    kept: int
    broken: tuple[str, ...]


class Annotated:
    """`source`, with the roles of `places` in every item that has a target and lacks them.

    places: role -> a model (a folder or hub id), or a folder that `annotate` wrote of this very
    source. A model is loaded in each process that asks for a picture, when it first asks.
    """

    def __init__(self, source: Source, places: Mapping[str, str]) -> None:
        self.name = source.name
        self.source = source
        self.places = dict(places)
        self.units = units_of(source)
        self.photos = photos_of(source)
        self.skipped: dict[str, frozenset[int]] = {}  # of the roles that lie in a folder
        for role, place in places.items():
            if is_stored(place):
                if message := another(Path(place), source):
                    raise UserError(message)
                self.skipped[role] = frozenset(finished(role, Path(place)).skipped)
        self.roles = frozenset(role for roles in self.kinds for role in roles)

    def __len__(self) -> int:
        return len(self.source)

    @cached_property
    def kinds(self) -> dict[frozenset[str], Sequence[int]]:
        parts: dict[frozenset[str], list[Sequence[int]]] = defaultdict(list)
        for roles, indices in self.source.kinds.items():
            added = self._added(roles)
            odd = {k for role in added for k in self.skipped.get(role, ())}.intersection(indices)
            for index in odd:
                parts[roles | self._added(roles, index)].append([index])
            if usual := [k for k in indices if k not in odd] if odd else indices:
                parts[roles | added].append(usual)
        return {
            roles: found[0] if len(found) == 1 else sorted(k for part in found for k in part)
            for roles, found in parts.items()
        }

    def item(self, index: int) -> Item:
        item = self.source.item(index)
        added = {
            role: self._picture(role, index, item.images["target"])
            for role in self._added(item.images, index)
        }
        return replace(item, images={**item.images, **added})

    def _added(self, roles: Iterable[str], index: int | None = None) -> set[str]:
        """The roles that an item with `roles` gets, or item `index`, if any is skipped of that."""
        has = {*roles}
        new = self.places.keys() - has if "target" in has else set()
        return {role for role in new if index not in self.skipped.get(role, ())}

    def _picture(
        self, role: str, index: int, target: Callable[[], Image.Image]
    ) -> Callable[[], Image.Image]:
        place = self.places[role]
        if role in self.skipped:
            return partial(read_image, picture_path(Path(place), role, index))
        return partial(_computed, role, place, target)


def _computed(role: str, place: str, target: Callable[[], Image.Image]) -> Image.Image:
    return computed(role, place, "cpu", target())  # a forked reading process has no GPU


def check_places(places: Mapping[str, str]) -> None:
    """Raise `UserError` for a role that no model computes, and a place that is neither a model nor
    a finished folder of annotations."""
    for role, place in places.items():
        check_role(role)
        if is_stored(place):
            finished(role, Path(place))
        else:
            check_model(role, place)


def annotated(sources: Iterable[Source], places: Mapping[str, str]) -> list[Source]:
    """The sources, with the roles of `places` where they lack them.

    A folder of annotations serves the source that it was made of, and no other. Raises `UserError`
    where none of the sources lacks a role, or those that do are not its folder's.
    """
    found: list[Source] = []
    unused = {
        role: f"annotate {role}={place}: no data lacks it, or none has a target"
        for role, place in places.items()
    }
    for source in sources:
        wanted = {}
        for role in lacking(source, places):
            place = places[role]
            of_another = another(Path(place), source) if is_stored(place) else ""
            if not of_another:
                wanted[role] = place
                unused.pop(role, None)
            elif role in unused:
                unused[role] = of_another
        found.append(Annotated(source, wanted) if wanted else source)
    for message in unused.values():
        raise UserError(message)
    return found


def lacking(source: Source, roles: Iterable[str]) -> list[str]:
    """Those of `roles` that some item with a target lacks."""
    return [r for r in roles if any("target" in own and r not in own for own in source.kinds)]


def check_models(models: Mapping[str, str]) -> None:
    """Raise `UserError` for a role that no model computes, and a place that is no model for it."""
    for role, model in models.items():
        check_role(role)
        if is_stored(model):
            raise UserError(f"annotate {role}={model}: a folder of annotations; name a model")
        check_model(role, model)


def annotate(source: Source, models: Mapping[str, str], output: Path, *, spec: str) -> Written:
    """Write the roles of `models` (role -> folder or hub id, checked) into the folder `output`, for
    all items of `source` that have a target and lack them. Pictures that are there are kept.

    spec: the name of the source, for people.
    """
    for role in models:
        if not lacking(source, [role]):
            raise UserError(f"{spec}: no item has a target and lacks {role}; nothing to do")
    if not is_stored(str(output)):
        check_foreign(output, (LOCK,), what="annotations of vcdeft")
    device = fastest()
    with only_writer(output):
        record = begun(source, models, output, spec)
        for role, model in models.items():
            loaded(ANNOTATORS[role].pipeline, model, device)  # or its fault were each item's
        write_record(record, output)
        written = make(source, record, models, output, device)
        write_record(record, output)
    return written


def begun(source: Source, models: Mapping[str, str], output: Path, spec: str) -> Record:
    """The record of `output`, new or gone on with, in which the roles of `models` are open."""
    if not is_stored(str(output)):
        record = Record(source=spec, items=len(source), fingerprint=fingerprint(source))
    elif message := another(output, source):
        raise UserError(message)
    else:
        record = read_record(output)
    for role, model in models.items():
        name = str(Path(model).resolve()) if Path(model).is_dir() else model
        made = record.roles.setdefault(role, Made(model=name))
        if made.model != name:
            raise UserError(
                f"output {output}: its {role} is made by {made.model}, not by {name}; choose "
                "another --output"
            )
        made.finished = False
    return record


def make(
    source: Source, record: Record, models: Mapping[str, str], output: Path, device: str
) -> Written:
    """Make the pictures that are not there, and note in `record` that the roles are finished."""
    kept = 0
    todo: dict[int, list[str]] = defaultdict(list)
    for role in models:
        (output / role).mkdir(exist_ok=True)
        clear_parts(output / role, "*.png")
        for own, indices in source.kinds.items():
            if "target" in own and role not in own:
                left = [k for k in indices if not picture_path(output, role, k).is_file()]
                kept += len(indices) - len(left)
                for index in left:
                    todo[index].append(role)
    broken: dict[int, str] = {}
    for index in tqdm(sorted(todo), desc="annotating", unit="item"):
        try:
            target = source.item(index).image("target")
            for role in todo[index]:
                image = computed(role, models[role], device, target)
                save(image, picture_path(output, role, index))
        except UserError as error:
            broken[index] = one_line(f"{key_of(source, index)}: {error}")
    for role in models:
        made = record.roles[role]
        made.finished, made.skipped = True, [k for k in sorted(broken) if role in todo[k]]
    count = sum(len(roles) for index, roles in todo.items() if index not in broken)
    return Written(made=count, kept=kept, broken=tuple(broken.values()))
