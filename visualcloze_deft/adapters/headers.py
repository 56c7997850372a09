"""What an exported file says of itself: the adapter, the export, and when it was trained."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from peft import DeftConfig, PeftConfig

from visualcloze_deft.adapters.contexts import BASE, KNOWN
from visualcloze_deft.adapters.method_table import method_of
from visualcloze_deft.errors import UserError

Format = Literal["peft", "diffusers", "comfyui", "kohya", "merged"]
EPOCH = "SOURCE_DATE_EPOCH"  # of reproducible-builds.org: seconds since 1970 that stand for "now"


def notes_on(told: dict[str, str], kind: Format) -> tuple[str, ...]:
    """What the file cannot say to the tool that reads it."""
    notes = []
    if kind != "merged" and (lora := told.get("base_lora")):
        notes.append(f"trained on a base with the LoRA {lora} merged: load that one, too")
    if kind != "peft" and "full" not in KNOWN.get(told.get("context", "full"), BASE):
        notes.append(
            f"trained with context={told['context']}: other tools compute a full one, in which "
            "images of this adapter are worse; train with --set context=mixed for them"
        )
    if (bits := told.get("quantise", "none")) != "none":
        notes.append(f"trained on a base in {bits}, written for the one in full precision")
    return tuple(notes)


def header(
    config: PeftConfig, kind: Format, scale: float, *, model: str, lora: str | None
) -> dict[str, str]:
    """What an exported file says of itself, beside what the adapter's own file says."""
    alpha = config.alpha if isinstance(config, DeftConfig) else config.lora_alpha
    return {
        "method": method_of(config.to_dict()),
        "rank": str(config.r),
        "alpha": str(alpha or ""),
        "base_model": model,
        "base_lora": lora or "",
        "exported_as": kind,
        "exported_by": f"visualcloze-deft {version('visualcloze-deft')}",
        "scale": str(scale),
    }


def date_of(weights: Path) -> str:
    """When an adapter's file was written, in UTC, so that each of its exports says the same. The
    environment's `SOURCE_DATE_EPOCH` stands in its place.

    Raises `UserError` where that is no number of seconds.
    """
    told = os.environ.get(EPOCH)
    try:
        seconds = int(told) if told else int(weights.stat().st_mtime)
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    except (ValueError, OverflowError):
        raise UserError(f"{EPOCH} {told!r}: give seconds since 1970, e.g. 1767225600") from None
