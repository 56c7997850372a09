"""A run folder that describes itself, and the checks that come before anything expensive."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import Field

from visualcloze_deft.adapters.metadata import LORA_DIGEST
from visualcloze_deft.backbones.lora_places import lora_file
from visualcloze_deft.backbones.table import fingerprint
from visualcloze_deft.config.run_settings import Run, write_run
from visualcloze_deft.data.base import Part
from visualcloze_deft.data.mixture import Mixture
from visualcloze_deft.errors import UserError
from visualcloze_deft.storage.adapter_places import TASKS
from visualcloze_deft.storage.atomic import check_foreign, write_text
from visualcloze_deft.storage.hashing import digest_of
from visualcloze_deft.storage.locks import LOCK, only_writer
from visualcloze_deft.storage.settings_files import SettingsFile, Share, checked
from visualcloze_deft.storage.toml_files import read_toml
from visualcloze_deft.training.checkpoint import disk_errors
from visualcloze_deft.training.run_data import resolution_of

SETTINGS, VERSIONS = "settings.toml", "versions.json"
INDEX = "index"  # folder of the sources' indexes
ENCODINGS = "encodings"  # folder of what strips and texts were encoded to
METRICS, SKIPPED = "metrics.jsonl", "skipped.jsonl"  # a line a step; a line an unreadable item
SHEETS = "sheets"  # folder of what a run's model makes of the same grids at several steps
EVALUATION = "evaluation.jsonl"  # a line each time held-out grids are looked at
WRITING = ".writing"  # the lock of the process that trains, within its launcher's
BEFORE_A_RUN = (LOCK, WRITING, INDEX, ENCODINGS, f".{VERSIONS}.*.part")
"""What a run folder may hold that has no `VERSIONS` yet, which is written before all the rest."""
MISSING = "not installed"
PACKAGES = [
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "peft",
    "deepspeed",
    "visualcloze-deft",
]


def encodings_folder(run: Run) -> Path | None:
    """Where the run keeps encodings, if it does. Raises `UserError` where that is no folder."""
    if not run.data.embedding_cache:
        return None
    own = run.data.embedding_cache == "run"
    folder = Path(run.output) / ENCODINGS if own else Path(run.data.embedding_cache)
    if os.path.lexists(folder) and not folder.is_dir():
        raise UserError(f"data.embedding_cache {folder}: no folder; give one, or a path yet free")
    return folder


@contextmanager
def run_lock(output: Path) -> Iterator[None]:
    """Within, the run folder `output` is this process's alone: from the first look at what it holds
    to the end of the run, so that no other can prepare it, or train in it, between.

    Raises `UserError` where it holds anything but a run, before anything is written, or is
    another's. A run that is refused within leaves no folder where there was none.
    """
    check_output(output)
    fresh = not output.exists()
    with only_writer(output), undone_on_failure(output, fresh=fresh):
        with only_writer(output, name=WRITING):  # processes of a launcher that was killed are gone
            check_output(output)
        yield


def check_output(output: Path) -> None:
    """Raise `UserError` where the folder `output` holds anything but a run of vcdeft."""
    if not is_run(output):
        check_foreign(output, BEFORE_A_RUN, what="run of vcdeft")


def is_run(output: Path) -> bool:
    """Whether `describe` has written into the folder `output`, or a run has saved something there
    and lost its versions since."""
    try:
        if saved_anything(output):
            return {"output", "model", "adapter"} <= {*read_toml(output / SETTINGS)}
        return "visualcloze-deft" in recorded(output)
    except (OSError, ValueError, TypeError):
        return False


@contextmanager
def undone_on_failure(output: Path, *, fresh: bool) -> Iterator[None]:
    """What is refused before it has written anything leaves no folder behind where there was none.

    fresh: whether there was none. What another process wrote there meanwhile stays.
    """
    try:
        yield
    except UserError:
        if fresh and output.is_dir() and {*os.listdir(output)} <= {LOCK, WRITING, INDEX}:
            shutil.rmtree(output, ignore_errors=True)
        raise


def saved_anything(output: Path) -> bool:
    """Whether a run in `output` came as far as a checkpoint or an adapter."""
    return (output / "adapter").exists() or any((output / "checkpoints").glob("step-*"))


def describe(run: Run, mixture: Mixture, output: Path) -> None:
    """Write settings, tasks, the mixture's proportions and versions into the run folder.

    Each task becomes a file of its own, whatever family declares it. The versions come first: they
    tell that the folder is a run's, in which the rest may be replaced.
    """
    proportions = dict(zip(mixture.tasks, mixture.proportions.tolist(), strict=True))
    facts = {
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "task_proportions": proportions,
        "items": items_of(mixture),
        **({"class_share": mixture.prior.share} if mixture.prior else {}),
    }
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / VERSIONS, json.dumps(facts, indent=1))
    tasks = output / TASKS
    shutil.rmtree(tasks, ignore_errors=True)
    tasks.mkdir()
    for name, task in mixture.tasks.items():
        write_text(tasks / f"{name}.toml", tomli_w.dumps(task.as_file()))
    write_run(run, output / SETTINGS)


def items_of(mixture: Mixture) -> list[int]:
    """How many items each source has, with those held out; sources of a subject's class last."""
    sources = [source for one in mixture.whole for source in one.sources]
    return [len(one.source if isinstance(one, Part) else one) for one in sources]


class VersionsFile(SettingsFile):
    """What is read again of `VERSIONS`."""

    attention: str = ""
    attention_check: str = ""
    not_finite: Mapping[str, str] = Field(default_factory=dict)
    norms: str = ""
    task_proportions: dict[str, Share] = Field(default_factory=dict)
    items: list[int] = Field(default_factory=list)


def record(output: Path, facts: Mapping[str, object]) -> None:
    """Put `facts`, known only once the run has started, beside the versions in its folder."""
    path = output / VERSIONS
    with disk_errors(path):
        write_text(path, json.dumps(recorded(output) | dict(facts), indent=1))


def recorded(output: Path) -> dict[str, Any]:
    """Versions of packages, and what `record` put beside them; {} where there is no such file."""
    path = output / VERSIONS
    return checked(path, VersionsFile, "no versions of a run") if path.is_file() else {}


def base_of(run: Run) -> dict[str, str]:
    """What an adapter says of the base that it was trained on: to be asked when that is loaded, as
    its files may be replaced later."""
    return {
        "base_model": run.model,
        "base_fingerprint": fingerprint(run.model),
        "base_lora": run.model_lora or "",
        LORA_DIGEST: digest_of(lora_file(run.model_lora)) if run.model_lora else "",
    }


def adapter_metadata(
    run: Run, step: int, *, attention: str, base: Mapping[str, str]
) -> dict[str, str]:
    """What the adapter file says of itself (safetensors metadata: text values only). An adapter
    that training started from keeps its own scale and layers, which its settings file tells.
    attention: the backend that it was trained with last. base: see `base_of`."""
    alpha, layers = run.adapter.alpha, run.adapter.target_modules
    if run.adapter.init_from is not None:
        alpha, layers = None, f"those of {run.adapter.init_from}"
    return {
        "visualcloze_deft": _version("visualcloze-deft"),
        "method": run.adapter.method,
        "rank": str(run.adapter.rank),
        "alpha": str(alpha or ""),
        "layers": layers,
        "dropout": str(run.adapter.dropout),
        "context": run.context,
        "quantise": run.quantise,
        "attention": attention,
        "clip_text": run.clip_text,
        "cells": run.data.cells,
        "resolution": str(resolution_of(run)),
        **base,
        "step": str(step),
        "tasks": run.data.tasks,
        **({"trigger": run.subject.trigger} if run.subject.trigger else {}),
    }


def append_line(path: Path, fields: Mapping[str, object]) -> None:
    """One more line of JSON, in which a number that is not finite is null."""
    text = json.dumps(finite(fields), ensure_ascii=False, allow_nan=False)
    with disk_errors(path), path.open("a", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text + "\n")


def finite(value: object) -> object:
    """`value` with None for what JSON has no number for.

    >>> finite({"a": [1.5, float("nan")]})
    {'a': [1.5, None]}
    """
    if isinstance(value, Mapping):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return MISSING
