"""Safetensors files: equal content gives equal bytes, and the umask says who may read them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from safetensors.torch import save_file
from torch import Tensor

NO_HASH = "0" * 64


def save(
    tensors: Mapping[str, Tensor],
    path: Path,
    metadata: Mapping[str, str] | None = None,
    *,
    hashes: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Write contiguous tensors on the CPU, and texts about them, to the file at `path`.

    hashes: names of texts that hold the SHA-256 of the bytes of all tensors, each with what stands
    before it.
    """
    path.touch()
    mode = path.stat().st_mode  # safetensors' writer puts a file in its place that is ours alone
    blank = {name: before + NO_HASH for name, before in hashes.items()}
    save_file(dict(tensors), path, {"format": "pt", **(metadata or {}), **blank})
    found = content_hash(path) if hashes else ""
    sort_header(path, {name: before + found for name, before in hashes.items()})
    path.chmod(mode)


def content_hash(path: Path) -> str:
    """The SHA-256 of a file's bytes behind its header."""
    with path.open("rb") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        return hashlib.file_digest(file, "sha256").hexdigest()


def sort_header(path: Path, texts: Mapping[str, str] = MappingProxyType({})) -> None:
    """Put the texts in a file's header in order: safetensors writes them in another each time.

    texts: replace those of the same names and lengths.
    """
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted({**header.get("__metadata__", {}), **texts}.items()))
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
