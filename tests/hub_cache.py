"""A hub cache in a folder of its own, as huggingface_hub would have filled it."""

from __future__ import annotations

import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def in_hub_cache(folder: Path, repo: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put the files of `folder` into `cache` as the newest snapshot of `repo`; returns it."""
    place = cache / f"models--{repo.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(COMMIT, encoding="utf-8")
    snapshot = place / "snapshots" / COMMIT
    shutil.copytree(folder, snapshot)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    return snapshot
