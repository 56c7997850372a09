"""The files of what a comparison measured.

OUTPUT/evaluations/NAME/TASK.json   figures of every grid, and what they were measured with; "base"
                                    is the model without adapter
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field

from visualcloze_deft.backbones.lora_places import lora_file
from visualcloze_deft.backbones.peft_files import WEIGHTS
from visualcloze_deft.backbones.precision import dtype_of
from visualcloze_deft.backbones.table import fingerprint
from visualcloze_deft.config.comparison import Comparison
from visualcloze_deft.config.run_settings import Run
from visualcloze_deft.data.annotation.models import fastest
from visualcloze_deft.data.mixture import Mixture
from visualcloze_deft.errors import UserError
from visualcloze_deft.sampling.denoising import GUIDANCE
from visualcloze_deft.storage.atomic import write_text
from visualcloze_deft.storage.hashing import digest_of
from visualcloze_deft.storage.settings_files import SettingsFile, checked
from visualcloze_deft.task_registry.task import Task

BASE = "base"  # the name of the model without adapter


@dataclass(frozen=True, kw_only=True)
class QuerySet:
    """One task as it is asked of every adapter, in so many grids. group: "new" or "old"."""

    group: str
    grids: int
    task: Task
    mixture: Mixture


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Figures of one task's grids, in order. errors: velocity error of what is generated, mean over
    five times. psnr: in dB, of what is generated. seconds: what measuring took."""

    errors: tuple[float, ...]
    psnr: tuple[float, ...]
    seconds: float


def folder_of(comparison: Comparison, name: str) -> Path:
    return Path(comparison.output) / "evaluations" / name


def file_of(comparison: Comparison, name: str, one: QuerySet) -> Path:
    return folder_of(comparison, name) / f"{one.group}-{one.task.name}.json"


def asked_with(
    comparison: Comparison, run: Run, one: QuerySet, adapter: Path | None
) -> dict[str, Any]:
    """All that decides what is measured: figures of other settings are not taken for these."""
    return {
        "adapter_sha256": digest_of(adapter / WEIGHTS) if adapter else None,
        "model": fingerprint(run.model) or run.model,
        "model_lora": run.model_lora,
        "model_lora_sha256": run.model_lora and digest_of(lora_file(run.model_lora)),
        "quantise": run.quantise,
        "computed": [fastest(), str(dtype_of(run.precision, fastest())), *versions()],
        "clip_text": run.clip_text,
        "cells": run.data.cells,
        "resolution": one.mixture.resolution,
        "times": [run.timestep_sampling, run.timestep_shift],
        "guidance": [run.guidance, GUIDANCE],
        "task": one.task.as_file(),
        "sources": comparison.groups[one.group].sources or run.data.sources,
        "annotate": run.data.annotate,
        "validation_every": run.data.validation_every,
        "grids": one.grids,
        "steps": comparison.evaluate.steps,
        "psnr": "mean of pictures",
    }


@cache
def versions() -> tuple[str, ...]:
    return tuple(f"{name} {version(name)}" for name in ("visualcloze-deft", "torch"))


class MeasuredFile(SettingsFile):
    """What `write_measured` wrote; figures of a training that went astray may be no numbers."""

    model_config = ConfigDict(allow_inf_nan=True)

    asked: dict[str, Any]
    errors: list[float]
    psnr: list[float]
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)]


def read_measured(path: Path, wanted: Mapping[str, Any]) -> Measured | None:
    """What was measured with these settings before; None where nothing was."""
    if not path.exists():
        return None
    try:
        fields = checked(path, MeasuredFile, "no figures of a comparison")
    except UserError as error:
        raise UserError(f"{error}; remove it") from None
    if fields["asked"] != json.loads(json.dumps(wanted)):
        return None
    errors, psnr = tuple(fields["errors"]), tuple(fields["psnr"])
    if not len(errors) == len(psnr) == wanted["grids"]:
        raise UserError(
            f"{path}: figures of {len(errors)} grids, not of {wanted['grids']}; remove it"
        )
    return Measured(errors=errors, psnr=psnr, seconds=fields["seconds"])


def write_measured(path: Path, measured: Measured, wanted: Mapping[str, Any]) -> None:
    """The file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps({**vars(measured), "asked": wanted}, indent=1))
