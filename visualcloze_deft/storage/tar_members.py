"""Files inside a .tar, read where they lie: the archive is never unpacked."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from visualcloze_deft.errors import UserError, reading, why
from visualcloze_deft.storage.text_files import check_file

_BETWEEN = "\0"  # of the parts of a place: the name of no file has one


@dataclass(frozen=True, kw_only=True)
class Member:
    """A file inside an archive. archive: its path. offset, size: of its bytes in there."""

    archive: str
    name: str
    offset: int
    size: int

    @property
    def place(self) -> str:
        """The member as one text, which no path is, and which `member_at` takes apart."""
        return _BETWEEN.join([self.archive, str(self.offset), str(self.size), self.name])

    def read(self, folder: str) -> bytes:
        """The bytes of the member; the path of its archive starts from `folder`."""
        path = os.path.join(folder, self.archive)
        with reading(f"{path}, {self.name}"), open(path, "rb") as file:
            file.seek(self.offset)
            found = file.read(self.size)
        if len(found) < self.size:
            raise UserError(f"{path}, {self.name}: ends early; the archive has changed or is cut")
        return found


def member_at(place: str) -> Member | None:
    """The member whose `Member.place` this is; None for the path of a file."""
    if _BETWEEN not in place:
        return None
    archive, offset, size, name = place.split(_BETWEEN, 3)
    return Member(archive=archive, offset=int(offset), size=int(size), name=name)


def members_of(path: Path) -> Iterator[Member]:
    """The files in an uncompressed .tar in turn, of which only the headers are read.

    Links and devices are passed over. Raises `UserError` where the archive is damaged, cut short or
    compressed, or where a name leads out of it.
    """
    check_file(path)
    try:
        with tarfile.open(path, "r:") as archive:
            for found in archive:
                if found.isreg() and not found.issparse():
                    name = _safe(path, found.name)
                    yield Member(
                        archive=path.name, name=name, offset=found.offset_data, size=found.size
                    )
            _check_end(path, archive.offset)
    except (tarfile.TarError, EOFError) as error:
        raise UserError(f"{path}: not an uncompressed .tar, or damaged ({why(error)})") from None


def _safe(path: Path, name: str) -> str:
    """The name of a member without "./" before it."""
    plain = os.path.normpath(name)
    if plain.startswith("/") or plain.split("/")[0] == ".." or _BETWEEN in name:
        raise UserError(f"{path}: its member {name!r} leads out of it; pack it anew")
    return plain


def _check_end(path: Path, offset: int) -> None:
    """Raise `UserError` where a header that is none ends an archive, which `tarfile` takes for its
    end."""
    with path.open("rb") as file:
        file.seek(offset)
        if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
            raise UserError(f"{path}: damaged at byte {offset}; what follows cannot be read")
