"""What a run names by the step after which it was made: `step-000200`, `step-000200.png`."""

from __future__ import annotations

from pathlib import Path

PREFIX = "step-"


def step_name(step: int) -> str:
    """Six digits, more where a step has more.

    >>> step_name(200), step_name(1_000_000)
    ('step-000200', 'step-1000000')
    """
    return f"{PREFIX}{step:06d}"


def step_of(path: Path) -> int:
    """The step that a name of `step_name` says.

    >>> step_of(Path("sheets/step-000200.png"))
    200
    """
    return int(path.stem.removeprefix(PREFIX))


def by_step(folder: Path, suffix: str = "") -> list[Path]:
    """The entries of a folder that are named so, the newest last; files of any other name are left
    out. suffix: with its dot."""
    named = folder.glob(f"{PREFIX}*{suffix}")
    ours = [path for path in named if path.name == f"{step_text(path)}{suffix}"]
    return sorted(ours, key=step_of)


def step_text(path: Path) -> str:
    """`step_name` of the step in a name; empty where the name says none."""
    digits = path.stem.removeprefix(PREFIX)
    return step_name(int(digits)) if digits.isdecimal() else ""
