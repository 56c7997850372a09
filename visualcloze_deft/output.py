"""Folders that results go into."""

from __future__ import annotations

import tempfile
from pathlib import Path

from visualcloze_deft.errors import UserError


def output_folder(path: Path) -> None:
    """Create the folder `path`; raise `UserError` unless files can be written there."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(f"output {path}: not writable ({error.strerror})") from None
