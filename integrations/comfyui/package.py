"""The package visualcloze_deft, which each node imports only when it runs."""

from __future__ import annotations

import sys
from importlib.util import find_spec


def missing() -> str:
    """What to say where ComfyUI's Python lacks the package; "" where it is installed."""
    if find_spec("visualcloze_deft"):
        return ""
    install = f"{sys.executable} -m pip install visualcloze-deft"
    return f"visualcloze_deft is not installed in the Python of ComfyUI; run: {install}"


def require() -> None:
    """Raise an error of one line where the package is not installed."""
    if line := missing():
        raise ModuleNotFoundError(line)
