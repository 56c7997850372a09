"""WebDataset shards: `*.tar` whose members are called `KEY.ROLE.EXT`, with `KEY.txt` or `KEY.json`
for the texts (https://github.com/webdataset/webdataset, "The WebDataset Format").

Members are read where they lie in the archive. A picture without a role, `KEY.jpg`, is the target.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from visualcloze_deft.data.index import Row, key_of_states
from visualcloze_deft.data.sources.layouts.reading import (
    TARGET,
    Reading,
    as_role,
    check_role,
    with_target,
)
from visualcloze_deft.data.sources.layouts.tables import SAID, texts_in
from visualcloze_deft.errors import UserError
from visualcloze_deft.images.reading import SUFFIXES
from visualcloze_deft.storage.tar_members import Member, members_of
from visualcloze_deft.storage.text_files import as_text, parse_json, sound

SUFFIX = ".tar"
LONGEST = 1 << 20  # bytes of a text
Fields = dict[str, Member]  # "depth.png" -> its member


def shards_in(path: Path) -> list[Path]:
    """The shards at `path`: that file itself, or all in that folder, sorted."""
    if path.is_dir():
        return sorted(path.glob(f"*{SUFFIX}"))
    return [path] if path.suffix == SUFFIX else []


def fits(path: Path) -> bool:
    return bool(shards_in(path))


def key(path: Path) -> str:
    """The key of an index of these shards, whose bytes are too many to be read for it."""
    return key_of_states(map(str, shards_in(path)))


def read(path: Path, reading: Reading) -> Iterator[Row]:
    """One item for each key of each shard that has a picture."""
    for shard in shards_in(path):
        reading.note(f"items are the keys in {shard.name}")
        try:
            samples = samples_in(shard, reading)
        except UserError as fault:
            reading.on_fault(fault)
            continue
        for name, fields in samples.items():
            try:
                if row := row_of(shard, name, fields, reading):
                    yield row
            except UserError as fault:
                reading.on_fault(fault)


def samples_in(shard: Path, reading: Reading) -> dict[str, Fields]:
    """Key -> its members by field. A key is a path up to the first dot of its last part."""
    samples: dict[str, Fields] = defaultdict(dict)
    for member in members_of(shard):
        folder, slash, name = member.name.rpartition("/")
        stem, dot, field = name.partition(".")
        if not stem or not dot:
            continue  # hidden, or without an ending: no part of a sample
        fields = samples[f"{folder}{slash}{stem}"]
        if field in fields:
            reading.on_fault(UserError(f"{shard}: {member.name} is there twice; pack it anew"))
        fields[field] = member
    return samples


def row_of(shard: Path, name: str, fields: Fields, reading: Reading) -> Row | None:
    """The item of a key; None where it has no picture."""
    where = f"{shard}/{name}"
    paths: dict[str, str] = {}
    for field, member in fields.items():
        role, dot, ending = field.rpartition(".")
        if f".{ending.lower()}" not in SUFFIXES:
            continue
        if not dot:
            reading.note(f"KEY.{ending}: read as target")
        role = as_role(role) or TARGET
        check_role(where, role)
        if role in paths:
            raise UserError(f"{where}: two pictures are its {role}; keep one of them")
        paths[role] = member.place
    if not paths:
        return None
    texts = texts_of(where, shard, fields)
    key = f"{shard.stem}/{name}"
    return Row(key=key, paths=with_target(paths, reading), texts=texts)


def texts_of(where: str, shard: Path, fields: Fields) -> dict[str, str]:
    """The texts in KEY.json, under the names that imagefolders have, then those in KEY.txt and
    KEY.instruction.txt, which count more."""
    found = {}
    if "json" in fields:
        said = parse_json(f"{where}.json", read_text(where, shard, fields["json"]))
        if isinstance(said, dict):
            found = texts_in(f"{where}.json", said)
    for name, columns in SAID.items():
        endings = [
            *(f"{column}.txt" for column in columns),
            *(["txt"] if name == "caption" else []),
        ]
        for ending in endings:
            if ending in fields:
                found[name] = sound(read_text(where, shard, fields[ending])).strip()
    return found


def read_text(where: str, shard: Path, member: Member) -> str:
    if member.size > LONGEST:
        raise UserError(f"{shard}/{member.name}: {member.size} bytes are too many for a text")
    return as_text(f"{shard}/{member.name}", member.read(str(shard.parent)))
