"""Where the shipped data lies: beside the package in a checkout, inside it in a wheel."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).parent


def _shipped(name: str) -> Path:
    inside = _PACKAGE / name
    return inside if inside.is_dir() else _PACKAGE.parent / name


TASKS = _shipped("tasks")
CONFIGS = _shipped("configs")
BASE = _PACKAGE / "base"  # the embedded base, a diffusers folder
