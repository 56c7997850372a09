"""Reading a TOML file that a user wrote."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from visualcloze_deft.errors import reading
from visualcloze_deft.storage.text_files import check_depth, read_text


def read_toml(path: Path) -> dict[str, Any]:
    """What is in `path`; raises `UserError` where it is not TOML or cannot be read."""
    return parse_toml(str(path), read_text(path))


def parse_toml(where: str, text: str) -> dict[str, Any]:
    """What a TOML text says. Raises `UserError`, which begins with `where`, where it is none."""
    with reading(where, "not valid TOML"):  # also of numbers of thousands of digits
        found = tomllib.loads(text)
        check_depth(where, found)
        repr(found)  # no message could name a hexadecimal number of as many
    return found
