"""Paths that a file of a data set gives for its pictures: in its own folder, nowhere else."""

from __future__ import annotations

import os

from visualcloze_deft.errors import UserError


def located(where: str, folder: str, name: str) -> str:
    """The path in `folder` of the picture that a file there calls `name`.

    A path from the root of another machine, or of the place that the data was moved from, is the
    longest end of it that exists below `folder`. Raises `UserError`, which begins with `where`,
    where a path leads out of the folder. A link in the folder may lead anywhere, it is the user's.
    """
    if "\0" in name:  # also what would be taken for a member of an archive
        raise UserError(f"{where}: {name} is the name of no file")
    if not name.isascii():
        try:
            os.fsencode(name)
        except UnicodeEncodeError:
            raise UserError(f"{where}: {name} is the name of no file") from None
    if not name.startswith("/") and ".." not in name:
        return name  # told without the cost of making paths: tables have hundreds of thousands
    root = os.path.abspath(folder)
    if os.path.commonpath([root, os.path.normpath(os.path.join(root, name))]) == root:
        return name
    parts = os.path.normpath(name).split("/") if name.startswith("/") else []
    for start in range(1, len(parts)):
        end = "/".join(parts[start:])
        if os.path.isfile(os.path.join(folder, end)):
            return end
    also = ", and no end of it is a file in there" if parts else ""
    raise UserError(f"{where}: {name} leads out of {folder}{also}; move it there, or link to it")


def path_inside(folder: str, name: str) -> str:
    """The path of `name`, which `located` gave, in `folder`.

    Without "..": behind a link they would lead elsewhere than they are written.
    """
    return os.path.normpath(os.path.join(folder, name))
