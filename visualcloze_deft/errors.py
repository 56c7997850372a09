"""What a user did that cannot work, and what systems and parsers of files refuse, in one line."""

from __future__ import annotations

import logging
import os
import struct
import tomllib
import unicodedata
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from json import JSONDecodeError

from safetensors import SafetensorError

MOST = 390  # characters of a message, which the command line puts its name before
_LOGGER = 30  # characters of a logger's name, which stands before what it says
_HEAD = 250  # characters that stay at the beginning of one that is longer
PARSED: tuple[type[Exception], ...] = (
    OSError,
    ValueError,  # also of JSON, TOML, pydantic, Arrow and text that is no UTF-8
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
    MemoryError,
    SyntaxError,  # also of XML, and of Pillow
    EOFError,
    struct.error,
    zlib.error,
    SafetensorError,
)  # of a file that is damaged, or holds something else than is looked for
REFUSED: tuple[type[Exception], ...] = (
    OSError,
    MemoryError,
    UnicodeError,
    JSONDecodeError,
    tomllib.TOMLDecodeError,
    SafetensorError,
)  # wherever it is raised, it is no mistake in a program
QUOTED = "Traceback (most recent call last):"  # in what transformers says
_UNSEEN = frozenset({"Cc", "Cs", "Zl", "Zp"})  # control characters, surrogates, line separators


class UserError(ValueError):
    """A mistake the user can mend. The command line prints it without traceback, exit code 2.

    The message is one line of `MOST` characters at most that any terminal shows as it is.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(" ".join(message.split())))


OnFault = Callable[[UserError], None]
"""Gets what is wrong with one of many things, which is then passed over."""


def stop(fault: UserError) -> None:
    """End at the first fault."""
    raise fault


@contextmanager
def reading(where: object, fault: str = "cannot be read") -> Iterator[None]:
    """What a parser raises within, of a file that is something else than it should be, is a
    `UserError`: `where`, which names the file, then the fault and why."""
    try:
        yield
    except UserError:
        raise
    except PARSED as error:
        raise UserError(f"{where}: {fault} ({why(error)})") from None


@contextmanager
def writing(path: object) -> Iterator[None]:
    """What the system says within on writing `path`, as one line that names it."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be written ({why(error)})") from None


def why(error: BaseException) -> str:
    """What an error says, in one line without the name of a file.

    >>> why(OSError(28, "No space left on device", "a.png")), why(KeyError("r"))
    ('No space left on device', "'r' is missing")
    """
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, MemoryError):
        return "larger than the memory here"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    said = lines[-1 if QUOTED in lines else 0]
    if isinstance(error, KeyError):
        return f"{said} is missing"
    return said or type(error).__name__


def refusal(error: BaseException) -> str:
    """What to say of one of `REFUSED` that nothing on its way has named a file for."""
    if isinstance(error, MemoryError):
        return f"out of memory: {error}" if str(error) else "out of memory"
    if isinstance(error, OSError) and error.filename is not None:
        names = (error.filename, error.filename2)
        return f"{' -> '.join(os.fsdecode(n) for n in names if n is not None)}: {why(error)}"
    return why(error)


def one_line(text: str) -> str:
    """`text` in one line of `MOST` characters at most that any terminal shows as it is."""
    return shortened(printable(text))


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


def shortened(line: str, most: int = MOST) -> str:
    """`line`, its middle left out where it is longer than `most` characters.

    >>> len(shortened("a" * 500)), len(shortened("a" * 500, 370))
    (390, 370)
    """
    if len(line) <= most:
        return line
    return f"{line[:_HEAD]} ... {line[-(most - _HEAD - 5) :]}"


class Logged(logging.LogRecord):
    """What a library logs, as short as our own messages: some print a whole settings file."""

    def getMessage(self) -> str:
        text = " ".join(super().getMessage().split())
        return shortened(printable(text), MOST - _LOGGER)


def suggestion(name: str, known: Iterable[str]) -> str:
    """The end of a message on an unknown name: the nearest known one, or all of them.

    >>> suggestion("dept-to-image", ["depth-to-image", "canny-to-image"])
    'did you mean depth-to-image?'
    >>> suggestion("x", ["b", "a"])
    'known: a, b'
    """
    known = sorted(known)
    close = get_close_matches(name, known, n=1)
    return f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"
