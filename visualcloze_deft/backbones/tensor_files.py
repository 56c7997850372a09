"""Safetensors files: equal content gives equal bytes, and the umask says who may read them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def save(
    tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write contiguous tensors on the CPU, and texts about them, to the file at `path`."""
    path.touch()
    mode = path.stat().st_mode  # safetensors' writer puts a file in its place that is ours alone
    save_file(dict(tensors), path, {"format": "pt", **(metadata or {})})
    sort_header(path)
    path.chmod(mode)


def sort_header(path: Path) -> None:
    """Put the texts in a file's header in order: safetensors writes them in another each time."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        assert len(text) <= length, "the same texts in another order"
        file.seek(8)
        file.write(text.ljust(length))


def open_to(folder: Path) -> None:
    """Give the safetensors files that a library wrote into `folder` the mode of a new file."""
    for path in folder.rglob("*.safetensors"):
        fresh = path.with_name(f".{path.name}.mode")
        fresh.touch()
        path.chmod(fresh.stat().st_mode)
        fresh.unlink()
