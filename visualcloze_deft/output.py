"""Folders that results go into, files that appear whole, and the lock on what a run writes."""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from visualcloze_deft.errors import UserError


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
        save(staged)
        staged.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None
    finally:
        staged.unlink(missing_ok=True)


def whole_text(path: Path, text: str) -> None:
    """`whole` of a text file. Of the names of files that are not UTF-8 it holds the escapes, which
    are those of JSON."""
    whole(path, lambda s: s.write_text(text, encoding="utf-8", errors="backslashreplace"))


@contextmanager
def only_writer(path: Path, *, patience: float = 10.0) -> Iterator[None]:
    """Hold the lock of the folder `path`: no process of a killed run writes beside this one.

    The system lets go of it when this process and its reading processes have ended, however they
    end: `patience` is how many seconds to wait for that. Raises `UserError` where another holds it.
    """
    output_folder(path)
    with (path / ".lock").open("w") as file:
        until = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise UserError(
                        f"output {path}: another process is writing there; end it first"
                    ) from None
                time.sleep(0.2)
            except OSError as error:  # some network file systems have no locks
                tqdm.write(f"output {path}: cannot be locked ({error.strerror}); going on without")
                break
        yield
