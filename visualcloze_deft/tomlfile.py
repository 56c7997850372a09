"""Reading a TOML file that a user wrote."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from visualcloze_deft.errors import UserError
from visualcloze_deft.textfile import read_text


def read_toml(path: Path) -> dict[str, Any]:
    """What is in `path`; raises `UserError` where it is not TOML or cannot be read."""
    text = read_text(path)
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise UserError(f"{path}: not valid TOML: nested too deeply") from None
    except ValueError as error:  # also a number of thousands of digits
        raise UserError(f"{path}: not valid TOML: {error}") from None
