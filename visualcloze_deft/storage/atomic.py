"""Files that are whole or not there: written beside their place, then renamed."""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path

from PIL import Image

from visualcloze_deft.errors import UserError, writing


def output_folder(path: Path) -> None:
    """Create the folder `path`; raise `UserError` unless files can be written there."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(f"output {path}: not writable ({error.strerror})") from None


def atomic_write(path: Path, save: Callable[[Path], object]) -> None:
    """Have `save` write the file at `path`, which appears whole or not at all. What a killed
    process leaves is called .NAME.PROCESS.part. Raises `UserError` where it cannot be written."""
    # a process of another machine may write the same file, with the same number
    here = f"{os.getpid()}-{uuid.uuid4().hex[:8]}"
    staged = path.with_name(f".{path.name}.{here}.part")
    try:
        with writing(path):
            save(staged)
            staged.replace(path)
    finally:
        clear(staged)


def clear_parts(folder: Path, name: str) -> None:
    """Remove what killed processes have left of the file `name` (a pattern of `glob`)."""
    for part in folder.glob(f".{name}.*.part"):
        clear(part)


@contextmanager
def staged_at(path: Path) -> Iterator[Path]:
    """A place beside `path` for a file or a folder, which becomes `path` where nothing fails
    within; else nothing of it stays. Raises `UserError` where it cannot be put there."""
    staged = path.with_name(f".{path.stem}.part{path.suffix}")
    clear(staged)
    try:
        yield staged
        with writing(path):
            staged.rename(path)
    finally:
        clear(staged)  # also of a full disk, which needs the room


def clear(path: Path) -> None:
    """Remove a file or a folder, as far as the system lets it."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole. Of the names of files that are not UTF-8 it holds the escapes, which
    are those of JSON."""
    atomic_write(path, lambda s: s.write_text(text, encoding="utf-8", errors="backslashreplace"))


def write_png(path: Path, image: Image.Image) -> None:
    """`atomic_write` of a picture."""
    atomic_write(path, lambda staged: image.save(staged, format="PNG"))


def check_foreign(output: Path, ours: Iterable[str], *, what: str) -> None:
    """Raise `UserError` where the folder `output` holds anything but `ours`; nothing is written.

    ours: patterns of the names that vcdeft gives its own files there. what: whose files they are.
    """
    if os.path.lexists(output) and not output.is_dir():  # also a link that leads nowhere
        raise UserError(f"output {output}: not writable (is a file); choose a folder")
    for name in sorted(os.listdir(output)) if output.is_dir() else ():
        if not any(fnmatchcase(name, pattern) for pattern in ours):
            raise UserError(
                f"output {output}: holds {name[:100]!r} and no {what}; choose a new or an empty "
                "folder"
            )
