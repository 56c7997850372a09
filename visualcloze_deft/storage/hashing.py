"""Hashes of files, which tell one from another of the same name."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

from visualcloze_deft.storage.text_files import check_file


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal. Raises `UserError` where it is none."""
    check_file(path)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of(path: Path) -> str:
    """`digest` of a file that may be large: it is read again only where it has changed."""
    found = path.stat()
    return _digest(path, found.st_mtime_ns, found.st_size)


@cache
def _digest(path: Path, changed: int, size: int) -> str:
    return digest(path)
