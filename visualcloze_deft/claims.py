"""Which process works on which item of a list, where any number of processes share it."""

from __future__ import annotations

import fcntl
import os
import zlib
from contextlib import suppress
from pathlib import Path

from visualcloze_deft.output import opened_lock

CLAIMS = ".claims"


class Claims:
    """Locks on bytes of one file, a byte for each item's name: the system lets go of them when a
    process ends, however it ends."""

    def __init__(self, output: Path) -> None:
        # closing it anywhere would let all locks go
        self.file = os.fdopen(opened_lock(output / CLAIMS), "r+b", buffering=0)

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
