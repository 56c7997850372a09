"""The memory of this machine, and sizes in words."""

from __future__ import annotations

import re
from pathlib import Path

import psutil

from visualcloze_deft.errors import UserError
from visualcloze_deft.runtime.gpus import gpus_here

RESERVE = 0.1  # of a GPU, left to CUDA's context, libraries and fragmentation: not measured
CONTAINER = Path("/sys/fs/cgroup/memory.max")


def usable(memory: int) -> int:
    """What of a GPU's memory a plan may fill."""
    return int(memory * (1 - RESERVE))


def memory_here(processes: int) -> int:
    """Bytes a process can use: of the smallest GPU, or its share of the machine's memory."""
    if gpus := gpus_here()[:processes]:
        return min(gpu.memory for gpu in gpus)
    return main_memory() // processes


def main_memory() -> int:
    """Bytes of the machine's memory, or of what a container is given of it (cgroup v2)."""
    whole = psutil.virtual_memory().total
    try:
        return min(whole, int(CONTAINER.read_text()))
    except (OSError, ValueError):  # there is none, or it is "max"
        return whole


def gigabytes(size: int) -> str:
    """
    >>> gigabytes(23_804_782_720)
    '23.8 GB'
    """
    return f"{size / 1e9:.1f} GB" if size >= 5e7 else f"{size / 1e9:.3f} GB"


UNITS = {"MB": 10**6, "GB": 10**9, "MIB": 2**20, "GIB": 2**30}


def parse_memory(text: str) -> int:
    """
    >>> parse_memory("80GB"), parse_memory("23.5 GiB")
    (80000000000, 25232932864)
    """
    found = re.fullmatch(r"\s*(\d{1,9}(?:\.\d{1,9})?)\s*([A-Za-z]+)\s*", text)
    if not found or found[2].upper() not in UNITS or not float(found[1]):
        raise UserError(f"--memory {text!r}: expected a size such as 80GB, 24GiB or 500MB")
    return int(float(found[1]) * UNITS[found[2].upper()])
