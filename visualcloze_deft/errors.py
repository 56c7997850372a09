"""What a user did that cannot work, said in one line."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """A mistake the user can mend. The command line prints it without traceback, exit code 2."""


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a message on an unknown name: the nearest known one, or all of them.

    >>> nearest("dept-to-image", ["depth-to-image", "canny-to-image"])
    'did you mean depth-to-image?'
    >>> nearest("x", ["b", "a"])
    'known: a, b'
    """
    known = sorted(known)
    close = get_close_matches(name, known, n=1)
    return f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"
