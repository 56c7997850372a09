"""What a user did that cannot work, said in one line."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from difflib import get_close_matches

MOST = 390  # characters of a message, which the command line puts its name before
_HEAD = 250  # characters that stay at the beginning of one that is longer
_UNSEEN = frozenset({"Cc", "Cs", "Zl", "Zp"})  # control characters, surrogates, line separators


class UserError(ValueError):
    """A mistake the user can mend. The command line prints it without traceback, exit code 2.

    The message is one line of `MOST` characters at most that any terminal shows as it is.
    """

    def __init__(self, message: str) -> None:
        super().__init__(shortened(printable(" ".join(message.split()))))


def printable(text: str) -> str:
    r"""`text` with escapes for what a terminal would obey, or could not encode.

    >>> printable("caf\udce9\x1b[1m.png")
    'caf\\udce9\\x1b[1m.png'
    """
    if text.isprintable():
        return text
    return "".join(
        c.encode("unicode_escape").decode() if unicodedata.category(c) in _UNSEEN else c
        for c in text
    )


def shortened(line: str) -> str:
    """`line`, its middle left out where it is longer than `MOST` characters."""
    if len(line) <= MOST:
        return line
    return f"{line[:_HEAD]} ... {line[-(MOST - _HEAD - 5) :]}"


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
