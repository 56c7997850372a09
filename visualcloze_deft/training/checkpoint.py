"""What a run saves: the adapter, the optimiser's moments and how far it came; never the base.

A checkpoint is a folder `step-000200` that appears whole or not at all: written under another
name, flushed to disk, renamed. All tensors are safetensors.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from visualcloze_deft.backbones import tensor_files
from visualcloze_deft.errors import PARSED, UserError, why
from visualcloze_deft.storage.hashing import digest
from visualcloze_deft.storage.step_names import by_step, step_name
from visualcloze_deft.storage.text_files import read_object

MOMENTS, PROGRESS = "optimiser.safetensors", "progress.json"
AVERAGE = "ema.safetensors"  # only where a run keeps one
CHECKSUM = "checksum"  # a key of `PROGRESS`, of its other keys


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run stands: steps taken, examples seen, and what a resumed run must share.

    not_finite: steps that changed nothing because their gradient was not finite; in_a_row: how
    many of those were the last ones. attention: the backend in use, "" in older checkpoints, and
    attention_setting what the run's setting was; norms: see `kernels.Norms`. explained: kernels
    and whether the loss was finite -> where the first such gradient that was not came from.
    """

    step: int
    examples: int
    seed: int
    global_batch: int
    not_finite: int = 0
    in_a_row: int = 0
    attention: str = ""
    attention_setting: str = "auto"
    norms: Literal["fused", "composed"] = "fused"
    explained: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    folder: Path
    progress: Progress

    def moments(self) -> dict[str, Tensor]:
        return load_file(self.folder / MOMENTS)

    def average(self) -> dict[str, Tensor]:
        """The running average of what is trained; empty where the run keeps none."""
        path = self.folder / AVERAGE
        return load_file(path) if os.path.lexists(path) else {}


def save(
    folder: Path,
    progress: Progress,
    moments: dict[str, Tensor],
    write_adapter: Callable[[Path], None],
    *,
    keep: int,
    average: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write `folder`/step-N atomically and drop all but the newest `keep` checkpoints.

    `write_adapter` puts the adapter's files into the folder it is given. average: see
    `Checkpoint.average`. The parent of `folder` must exist: a run folder that vanished is not made
    anew. Raises `UserError` where the disk is full, the folder read-only or gone; what was saved
    before is then still there.
    """
    final = folder / step_name(progress.step)

    def fill(at: Path) -> None:
        write_adapter(at)
        tensor_files.save(moments, at / MOMENTS)
        if average:
            tensor_files.save(average, at / AVERAGE)
        sums = {path.name: digest(path) for path in sorted(at.iterdir())}
        fields = {**asdict(progress), "sha256": sums}
        text = json.dumps({**fields, CHECKSUM: checksum(fields)}, indent=1)
        (at / PROGRESS).write_text(text, encoding="utf-8")

    with disk_errors(folder):
        folder.mkdir(exist_ok=True)
        replace(final, fill)
        for old in by_step(folder)[:-keep]:
            if old != final:  # damaged ones of a higher number may stand beside it
                shutil.rmtree(old)
    return final


def replace(final: Path, fill: Callable[[Path], None]) -> None:
    """Have `fill` write into a new folder beside `final`, then put that in its place."""
    staging = final.with_name(f".{final.name}.part")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        fill(staging)
        publish(staging, final)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)  # a full disk needs the room
        raise


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """What the system says on writing into `folder`, as one line for the user."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{folder}: could not be written ({why(error)}); what was saved before is still there. "
            "Make room or give the folder back, then go on with --resume"
        ) from error


def publish(staging: Path, final: Path) -> None:
    """Flush every file of `staging` and rename it to `final`, replacing what stood there."""
    for path in [*staging.iterdir(), staging]:
        flush(path)
    aside = final.with_name(f".{final.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    if final.exists():
        final.rename(aside)
    try:
        staging.rename(final)
    except OSError:
        if aside.exists():
            aside.rename(final)
        raise
    flush(final.parent)
    shutil.rmtree(aside, ignore_errors=True)


def flush(path: Path) -> None:
    """Have the system write a file, or a folder's list of names, to the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def size(folder: Path) -> int:
    """Bytes of the files in a folder."""
    return sum(path.stat().st_size for path in folder.iterdir())


def short_of_room(folder: Path, needed: int) -> str | None:
    """A warning where the disk of `folder` has no `needed` bytes left for the next checkpoint."""
    free = shutil.disk_usage(folder).free
    if free >= needed:
        return None
    return (
        f"{folder}: {free / 1e6:,.0f} MB free, the next checkpoint takes {needed / 1e6:,.0f} MB: "
        "make room, or the run ends there"
    )


def newest(folder: Path) -> tuple[Checkpoint, list[str]]:
    """The newest undamaged checkpoint, and a line about each newer one that is damaged."""
    warnings: list[str] = []
    for path in reversed(by_step(folder)):
        try:
            return Checkpoint(folder=path, progress=_check(path)), warnings
        except PARSED as error:
            warnings.append(f"checkpoint {path} is damaged ({why(error)}); using an older one")
    if not warnings:
        raise UserError(f"--resume: no checkpoint in {folder} yet; start again without --resume")
    raise UserError(
        f"--resume: no good checkpoint in {folder} ({len(warnings)} damaged); start again without "
        "--resume and with another --output"
    )


def _check(path: Path) -> Progress:
    fields = read_object(path / PROGRESS, "no progress")
    told = fields.pop(CHECKSUM, None)  # none in older checkpoints
    if told is not None and told != checksum(fields):
        raise ValueError(f"{PROGRESS} does not match its checksum")
    for name, expected in fields.pop("sha256").items():
        if digest(path / name) != expected:
            raise ValueError(f"{name} does not match its checksum")
    return TypeAdapter(Progress).validate_json(json.dumps(fields), strict=True, extra="forbid")


def checksum(fields: Mapping[str, Any]) -> str:
    """SHA-256 of what a file of progress says, whatever its spaces and order."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
