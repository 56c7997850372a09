"""Text that a user wrote, read from a file: UTF-8, with or without the mark of Windows' editors."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from visualcloze_deft.errors import UserError, reading

DEEPEST = 64  # lists and objects within one another; no file that anybody means has as many
BRIEF = 63  # characters
MARK = "\ufeff"  # byte order mark, which is no part of any text
REPLACED = "\ufffd"


def read_text(path: Path) -> str:
    """The text in `path`. Raises `UserError` where it is no file, or not UTF-8."""
    return as_text(str(path), read_bytes(path))


def as_text(where: str, data: bytes) -> str:
    """The text that `data`, read from `where`, holds. Raises `UserError` where it is not UTF-8."""
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: cannot be read as UTF-8 text: {error}") from None


def check_file(path: Path) -> None:
    """Raise `UserError` where `path` is no file: a pipe would be waited for without end."""
    if os.path.exists(path) and not os.path.isfile(path):
        kind = "a folder" if os.path.isdir(path) else "a pipe or a device"
        raise UserError(f"{path}: cannot be read: {kind}, not a file")


def read_bytes(path: Path) -> bytes:
    """What is in `path`. Raises `UserError` where it is no file."""
    check_file(path)
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def parse_json(where: str, text: str | bytes) -> Any:
    """The value of a JSON text. Raises `UserError`, which begins with `where`, where it is none, or
    nested more than `DEEPEST` deep."""
    with reading(where, "not valid JSON"):  # also of numbers of thousands of digits
        value = json.loads(text)
    check_depth(where, value)
    return value


def read_json(path: Path) -> Any:
    """The value in the JSON file `path`."""
    return parse_json(str(path), read_text(path))


def read_object(path: Path, what: str) -> dict[str, Any]:
    """The object in the JSON file `path`. what: it is, in words, for messages."""
    found = read_json(path)
    if not isinstance(found, dict):
        raise UserError(f"{path}: {what}: expected an object, found {brief(found)}")
    return found


def check_depth(where: str, value: object) -> None:
    """Raise `UserError` where lists and tables are nested more than `DEEPEST` deep: whatever looks
    at them or prints them would run out of stack."""
    level = [value]
    for _ in range(DEEPEST):
        level = [
            inner
            for one in level
            if isinstance(one, dict | list)
            for inner in (one.values() if isinstance(one, dict) else one)
        ]
        if not level:
            return
    raise UserError(f"{where}: nested too deeply, more than {DEEPEST} times")


def brief(value: object) -> str:
    """A value in a message, its end left out where it is long.

    >>> brief("a"), brief([1] * 100)
    ("'a'", '[1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1 ...')
    """
    text = repr(value)
    return text if len(text) <= BRIEF else f"{text[: BRIEF - 4]} ..."


def sound(text: str) -> str:
    """`text` as every encoder can take it: half of a pair of surrogates, which JSON may hold where
    an emoji was cut, becomes U+FFFD, a byte order mark nothing.

    >>> sound("caf\\u00e9 \\ud83c"), sound("\\ufeffday"), sound("\\ud83c\\udf89")
    ('café \ufffd', 'day', '🎉')
    """
    whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return whole.replace(MARK, "")
