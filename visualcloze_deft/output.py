"""Folders that results go into, files that appear whole, and the lock on what a run writes."""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from visualcloze_deft.errors import UserError, writing

LOCK = ".lock"  # of a folder, held by who started what writes there


def output_folder(path: Path) -> None:
    """Create the folder `path`; raise `UserError` unless files can be written there."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(f"output {path}: not writable ({error.strerror})") from None


def whole(path: Path, save: Callable[[Path], object]) -> None:
    """Have `save` write the file at `path`, which appears whole or not at all. What a killed
    process leaves is called .NAME.PROCESS.part. Raises `UserError` where it cannot be written."""
    staged = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with writing(path):
            save(staged)
            staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)


def whole_text(path: Path, text: str) -> None:
    """`whole` of a text file. Of the names of files that are not UTF-8 it holds the escapes, which
    are those of JSON."""
    whole(path, lambda s: s.write_text(text, encoding="utf-8", errors="backslashreplace"))


def whole_png(path: Path, image: Image.Image) -> None:
    """`whole` of a picture."""
    whole(path, lambda staged: image.save(staged, format="PNG"))


def check_foreign(output: Path, ours: Iterable[str], *, what: str) -> None:
    """Raise `UserError` where the folder `output` holds anything but `ours`; nothing is written.

    ours: patterns of the names that vcdeft gives its own files there. what: whose files they are.
    """
    if output.exists() and not output.is_dir():
        raise UserError(f"output {output}: not writable (is a file); choose a folder")
    for name in sorted(os.listdir(output)) if output.is_dir() else ():
        if not any(fnmatchcase(name, pattern) for pattern in ours):
            raise UserError(
                f"output {output}: holds {name[:100]!r} and no {what}; choose a new or an empty "
                "folder"
            )


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


def opened_lock(file: Path) -> int:
    """The descriptor of a lock file, which is made where there is none. Its content, if it is not
    ours, stays; a link is not followed."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(file, flags, 0o666)
    except OSError as error:
        raise UserError(
            f"{file}: cannot be opened as a lock ({error.strerror}); remove it, or choose another "
            "output"
        ) from None
    return descriptor


def locked(descriptor: int, path: Path) -> bool:
    """Whether this process has the lock now, or the file system has no locks."""
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
