"""What a run saves: the adapter, the optimiser's moments and how far it came; never the base.

A checkpoint is a folder `step-000200` that appears whole or not at all: written under another
name, flushed to disk, renamed. All tensors are safetensors.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from visualcloze_deft.errors import UserError

MOMENTS, PROGRESS = "optimiser.safetensors", "progress.json"
AVERAGE = "ema.safetensors"  # only where a run keeps one
KEEP = 2


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run stands: steps taken, examples seen, and what a resumed run must share."""

    step: int
    examples: int
    seed: int
    global_batch: int


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    folder: Path
    progress: Progress

    def moments(self) -> dict[str, Tensor]:
        return load_file(self.folder / MOMENTS)

    def average(self) -> dict[str, Tensor]:
        """The running average of what is trained; empty where the run keeps none."""
        path = self.folder / AVERAGE
        return load_file(path) if path.exists() else {}


def save(
    folder: Path,
    progress: Progress,
    moments: dict[str, Tensor],
    write_adapter: Callable[[Path], None],
    *,
    average: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write `folder`/step-N atomically and drop all but the newest `KEEP` checkpoints.

    `write_adapter` puts the adapter's files into the folder it is given. average: see
    `Checkpoint.average`.
    """
    final = folder / f"step-{progress.step:06d}"
    staging = folder / f".{final.name}.part"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    write_adapter(staging)
    save_file(moments, staging / MOMENTS)
    if average:
        save_file(dict(average), staging / AVERAGE)
    sums = {path.name: digest(path) for path in sorted(staging.iterdir())}
    (staging / PROGRESS).write_text(json.dumps({**asdict(progress), "sha256": sums}, indent=1))
    publish(staging, final)
    for old in _by_step(folder)[:-KEEP]:
        if old != final:  # damaged ones of a higher number may stand beside it
            shutil.rmtree(old)
    return final


def publish(staging: Path, final: Path) -> None:
    """Flush every file of `staging` and rename it to `final`, replacing what stood there."""
    for path in staging.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    aside = final.with_name(f".{final.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    if final.exists():
        final.rename(aside)
    staging.rename(final)
    shutil.rmtree(aside, ignore_errors=True)


def newest(folder: Path) -> tuple[Checkpoint, list[str]]:
    """The newest undamaged checkpoint, and a line about each newer one that is damaged."""
    warnings: list[str] = []
    for path in reversed(_by_step(folder)):
        try:
            return Checkpoint(folder=path, progress=_check(path)), warnings
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            warnings.append(f"checkpoint {path} is damaged ({error}); using an older one")
    if not warnings:
        raise UserError(f"--resume: no checkpoint in {folder} yet; start again without --resume")
    raise UserError(
        f"--resume: no good checkpoint in {folder} ({len(warnings)} damaged); start again without "
        "--resume and with another --output"
    )


def _by_step(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"), key=lambda path: (len(path.name), path.name))


def _check(path: Path) -> Progress:
    fields = json.loads((path / PROGRESS).read_text())
    for name, expected in fields.pop("sha256").items():
        if digest(path / name) != expected:
            raise ValueError(f"{name} does not match its checksum")
    return Progress(**fields)


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
