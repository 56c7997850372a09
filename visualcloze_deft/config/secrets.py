"""Keys, tokens and passwords stay out of files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

FOREIGN = ("tracker_options", "deepspeed")  # sections handed on to other packages
SECRET = re.compile(
    r"(.*_)?((api|access|auth|private|secret)_?key|token|secret|pass(word|wd|phrase)|credentials?"
    r"|auth)",
    re.IGNORECASE,
)
WITH_PASSWORD = re.compile(r"://[^/\s]*:[^/\s]*@")


def without_secrets(fields: Mapping[str, Any], *, foreign: bool = False) -> dict[str, Any]:
    """`fields` without the keys, tokens and passwords of the sections `FOREIGN`, at any depth.

    >>> without_secrets({"deepspeed": {"comet": {"api_key": "x", "project": "p"}}, "seed": 1})
    {'deepspeed': {'comet': {'project': 'p'}}, 'seed': 1}
    """
    found = {}
    for name, value in fields.items():
        inside = foreign or name in FOREIGN
        if isinstance(value, Mapping):
            found[name] = without_secrets(value, foreign=inside)
        elif not (foreign and (SECRET.fullmatch(name) or WITH_PASSWORD.search(str(value)))):
            found[name] = value
    return found
