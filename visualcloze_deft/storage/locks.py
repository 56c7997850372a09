"""Locks of folders and of work that several processes share: the system lets go of them however a
process ends. Windows has no such locks: there, nothing is locked."""

from __future__ import annotations

import os
import sys
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tqdm import tqdm

from visualcloze_deft.errors import UserError
from visualcloze_deft.storage.atomic import output_folder

if sys.platform == "win32":
    OPENING = os.O_RDWR | os.O_CREAT
else:
    import fcntl

    OPENING = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC

CLAIMS = ".claims"

LOCK = ".lock"  # of a folder, held by who started what writes there


class WorkLocks:
    """Locks on bytes of one file, a byte for each item's name: the system lets go of them when a
    process ends, however it ends."""

    def __init__(self, output: Path) -> None:
        # closing it anywhere would let all locks go
        self.file = os.fdopen(opened_lock(output / CLAIMS), "r+b", buffering=0)

    def take(self, name: str) -> bool:
        """Whether this process may work on the item."""
        if sys.platform == "win32":
            return True
        try:
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, zlib.crc32(os.fsencode(name)))
        except (BlockingIOError, PermissionError):
            return False
        except OSError:  # a file system without locks: whoever comes works on it
            return True
        return True

    def release(self, name: str) -> None:
        if sys.platform == "win32":
            return
        with suppress(OSError):
            fcntl.lockf(self.file, fcntl.LOCK_UN, 1, zlib.crc32(os.fsencode(name)))


@contextmanager
def only_writer(path: Path, *, name: str = LOCK, patience: float = 10.0) -> Iterator[None]:
    """Hold the lock `name` of the folder `path`: no other process writes beside this one.

    The system lets go of it when this process and its reading processes have ended, however they
    end: `patience` is how many seconds to wait for that. Raises `UserError` where another holds it.
    """
    until = time.monotonic() + patience
    while True:
        output_folder(path)
        descriptor = opened_lock(path / name)
        try:
            if locked(descriptor, path):
                if is_at(path / name, descriptor):  # not of a folder that was removed meanwhile
                    yield
                    return
            elif time.monotonic() > until:
                raise UserError(f"output {path}: another process is writing there; end it first")
            else:
                time.sleep(0.2)
        finally:
            os.close(descriptor)


@contextmanager
def folder_held(path: Path) -> Iterator[None]:
    """Hold a folder of the user's own, in which no file for a lock is left. Raises `UserError`
    where another process holds it."""
    if sys.platform == "win32":  # where no folder can be opened
        yield
        return
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if not locked(descriptor, path):
            raise UserError(f"{path}: another process is writing there; end it first")
        yield
    finally:
        os.close(descriptor)


def opened_lock(file: Path) -> int:
    """The descriptor of a lock file, which is made where there is none. Its content, if it is not
    ours, stays; a link is not followed."""
    try:
        descriptor = os.open(file, OPENING, 0o666)
    except OSError as error:
        raise UserError(
            f"{file}: cannot be opened as a lock ({error.strerror}); remove it, or choose another "
            "output"
        ) from None
    return descriptor


def locked(descriptor: int, path: Path) -> bool:
    """Whether this process has the lock now, or the file system has no locks."""
    if sys.platform == "win32":
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:  # some network file systems have no locks
        tqdm.write(f"output {path}: cannot be locked ({error.strerror}); going on without")
    return True


def is_at(file: Path, descriptor: int) -> bool:
    """Whether an open file is still the one that stands at its path."""
    try:
        return os.path.samestat(file.lstat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
