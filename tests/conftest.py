"""Shared by the tests: no hub, a CPU accelerator where there is no GPU, a random micro model."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")


@pytest.fixture(scope="session")
def micro_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from micro_model import write_micro_model

    return write_micro_model(tmp_path_factory.mktemp("models") / "micro")
