"""Copies of the parts of the material that a command reads."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

LARGE = 50_000  # bytes
TEXTS = (".json", ".jsonl", ".toml")  # may hold absolute paths
NEEDS = {
    "run.toml": ("micro", "photos", "own"),
    "thing.toml": ("micro", "thing", "listed", "own"),
    "compare.toml": ("micro",),
    "run": ("run.toml", "micro", "photos", "own"),
    "made": ("grids", "micro"),
    "compiled.safetensors": ("micro",),
    "evaluated": ("run", "micro"),
    "annotated": ("listed", "depth-model"),
    "encodings": ("run.toml",),
}


def parts_in(words: Iterable[str]) -> set[str]:
    """The files and folders of the material that a command line names, with what those need.

    >>> sorted(parts_in(["plan", "--config", "run.toml", "--data", "folder=listed"]))
    ['listed', 'micro', 'own', 'photos', 'run.toml']
    """
    found: set[str] = set()
    new = {part for word in words for part in re.split(r"[=/@,]", word)}
    while new - found:
        found |= new
        new = {part for name in found for part in NEEDS.get(name, ())}
    return found & NAMES


NAMES = frozenset(
    (
        "annotated captioner compare.toml compiled.safetensors depth-model dreambench "
        "dreambooth encodings evaluated graph grids imagefolder insdet kohya.safetensors left "
        "listed lora.safetensors made micro named own photos prompts.json right run run.toml "
        "shards sheet table thing thing.toml"
    ).split()
)


def in_copy(material: Path, copy: Path, names: Iterable[str] = NAMES) -> None:
    """The parts `names` of the material again, as if they had been made there. Large files, which
    every command replaces whole, are shared."""
    copy.mkdir(exist_ok=True)
    for name in sorted(names):
        whole = material / name
        if whole.is_file():
            copied(whole, copy / name, material, copy)
        for place, _, files in os.walk(whole):
            here = copy / os.path.relpath(place, material)
            here.mkdir()
            for file in files:
                copied(Path(place) / file, here / file, material, copy)


def copied(file: Path, to: Path, material: Path, copy: Path) -> None:
    if file.stat().st_size > LARGE:
        os.link(file, to)
    elif file.suffix in TEXTS:
        to.write_bytes(file.read_bytes().replace(os.fsencode(material), os.fsencode(copy)))
    else:
        shutil.copyfile(file, to)
