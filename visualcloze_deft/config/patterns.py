"""Regular expressions that a user or a file brings, matched within a time: some take longer than
anybody lives, and nothing in their form tells which."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Collection, Sequence
from functools import cache

from visualcloze_deft.errors import UserError
from visualcloze_deft.storage.text_files import brief

PATIENCE = 10.0  # seconds; the patterns that people write take milliseconds
REPEATS = re.compile(r"(?<!\\)[*+?{(]")  # without these a pattern is matched at once
MATCH = """
import json, re, sys
patterns, names = json.load(sys.stdin)
compiled = [re.compile(pattern) for pattern in patterns]
json.dump([[bool(one.fullmatch(name)) for name in names] for one in compiled], sys.stdout)
"""


def sound_pattern(pattern: str) -> str:
    """`pattern`, a regular expression. Raises `ValueError` where it is none."""
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"no regular expression: {error}") from None
    return pattern


def matching(where: str, pattern: str, names: Collection[str]) -> list[str]:
    """Those of `names` that `pattern` matches as a whole. Raises `UserError`, which begins with
    `where`, where it is no regular expression, or takes more than `PATIENCE` seconds."""
    (found,) = matches(where, [pattern], names)
    return [name for name, fits in zip(names, found, strict=True) if fits]


def matches(where: str, patterns: Sequence[str], names: Collection[str]) -> list[list[bool]]:
    """Whether each pattern matches each name as a whole. See `matching`."""
    for pattern in patterns:
        try:
            sound_pattern(pattern)
        except ValueError as error:
            raise UserError(f"{where}: {brief(pattern)}: {error}") from None
    if not any(REPEATS.search(pattern) for pattern in patterns):
        return [[bool(re.fullmatch(p, name)) for name in names] for p in patterns]
    return _elsewhere(where, tuple(patterns), tuple(names))


@cache
def _elsewhere(where: str, patterns: tuple[str, ...], names: tuple[str, ...]) -> list[list[bool]]:
    """Another process matches: in this one nothing could end it."""
    try:
        told = subprocess.run(
            [sys.executable, "-I", "-S", "-c", MATCH],
            input=json.dumps([patterns, names]),
            capture_output=True,
            text=True,
            check=True,
            timeout=PATIENCE,
        ).stdout
    except subprocess.TimeoutExpired:
        shown = max(patterns, key=lambda pattern: len(REPEATS.findall(pattern)))
        raise UserError(
            f"{where}: {brief(shown)}: takes more than {PATIENCE:.0f} s to match; write it without "
            "a repeat within a repeat"
        ) from None
    found: list[list[bool]] = json.loads(told)
    return found
