"""Settings as nested tables: files by name, one merged over another, `a.b=value` on top."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from visualcloze_deft.errors import UserError, suggestion
from visualcloze_deft.paths import CONFIGS
from visualcloze_deft.storage.toml_files import parse_toml


def deep_merge(settings: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """`settings` with those of `more` on top, section by section.

    >>> deep_merge({"a": {"b": 1, "c": 2}}, {"a": {"c": 3}, "d": 4})
    {'a': {'b': 1, 'c': 3}, 'd': 4}
    """
    found = {**settings, **more}
    for name, section in settings.items():
        if isinstance(section, Mapping) and isinstance(more.get(name), Mapping):
            found[name] = deep_merge(section, more[name])
    return found


def find_config(name: str, what: Literal["run", "comparison"] = "run") -> Path:
    """A file of this name, or the shipped one: comparisons are those called compare-...."""
    path = Path(name)
    with suppress(OSError):  # a name too long for the file system is no file
        if path.is_file():
            return path
    comparisons = {file.stem: file for file in CONFIGS.glob("compare-*.toml")}
    every = {file.stem: file for file in CONFIGS.glob("*.toml")}
    runs = {stem: file for stem, file in every.items() if stem not in comparisons}
    shipped = runs if what == "run" else comparisons
    if name in shipped:
        return shipped[name]
    raise UserError(
        f"{what} file {name!r}: no such file, and no shipped one; {suggestion(name, shipped)}"
    )


def apply_override(fields: dict[str, Any], override: str) -> None:
    """Set one `a.b=value`; the value is read as TOML, and as plain text where it is none."""
    name, equals, text = override.partition("=")
    if not equals:
        raise UserError(f"--set {override!r}: expected NAME=VALUE, e.g. optimiser.lr=1e-4")
    try:
        found = parse_toml(f"--set {name}", f"x = {text}")
    except UserError:  # no TOML, or a number of thousands of digits
        found = {"x": text}
    if len(found) > 1 or (found["x"] == text and "\n" in text):
        raise UserError(f"--set {override!r}: more than one line; give each setting its own --set")
    value = found["x"]
    *sections, last = name.strip().split(".")
    for section in sections:
        fields = fields.setdefault(section, {})
        if not isinstance(fields, dict):
            raise UserError(f"--set {override!r}: {section} is no section")
    fields[last] = value


def flat(fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted name.

    >>> flat({"a": 1, "b": {"c": 2}})
    {'a': 1, 'b.c': 2}
    """
    found: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found
