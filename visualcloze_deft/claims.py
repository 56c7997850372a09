"""Which process works on which item of a list, where any number of processes share it."""

from __future__ import annotations

import fcntl
import zlib
from contextlib import suppress
from pathlib import Path

CLAIMS = ".claims"


class Claims:
    """Locks on bytes of one file, a byte for each item's name: the system lets go of them when a
    process ends, however it ends."""

    def __init__(self, output: Path) -> None:
        self.file = (output / CLAIMS).open("ab")  # closing it anywhere would let all locks go

    def take(self, name: str) -> bool:
        """Whether this process may work on the item."""
        try:
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, zlib.crc32(name.encode()))
        except (BlockingIOError, PermissionError):
            return False
        except OSError:  # a file system without locks: whoever comes works on it
            return True
        return True

    def release(self, name: str) -> None:
        with suppress(OSError):
            fcntl.lockf(self.file, fcntl.LOCK_UN, 1, zlib.crc32(name.encode()))
