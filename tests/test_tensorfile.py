"""Safetensors files that say the same are the same, and are as readable as others."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from visualcloze_deft import InContextPipeline
from visualcloze_deft.backbones import tensor_files


def test_equal_content_gives_equal_bytes(tmp_path: Path) -> None:
    """However its texts are ordered; safetensors itself writes them in another order each time."""
    tensors = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.ones(3, dtype=torch.bfloat16)}
    about = {f"key {k}": f'value "{k}" \\ é\n' for k in range(12)}
    files = [tmp_path / f"{k}.safetensors" for k in range(4)]
    for k, file in enumerate(files):
        turned = dict(sorted(about.items(), reverse=bool(k % 2)))
        tensor_files.save(tensors, file, turned)
    assert len({file.read_bytes() for file in files}) == 1
    read = load_file(files[0])
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
    with safe_open(files[0], "pt") as file:
        assert file.metadata() == {"format": "pt", **about}


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_the_umask_says_who_may_read(tmp_path: Path, mask: int, mode: int) -> None:
    before = os.umask(mask)
    try:
        tensor_files.save({"a": torch.ones(1)}, tmp_path / "a.safetensors")
    finally:
        os.umask(before)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == mode


def test_a_saved_pipeline_is_as_readable_as_its_other_files(
    micro_model: Path, tmp_path: Path
) -> None:
    before = os.umask(0o022)
    try:
        InContextPipeline.from_pretrained(micro_model).save_pretrained(tmp_path / "model")
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "model").rglob("*") if path.is_file()]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o644}
