"""Pictures in sub-folders, which are roles: `before/0001.jpg`, `after/0001.jpg`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from visualcloze_deft.data.index import Row
from visualcloze_deft.data.sources.layouts.reading import Reading, as_role, check_role, paired
from visualcloze_deft.errors import UserError
from visualcloze_deft.images.reading import any_images_in, folders_in, images_in


def fits(path: Path) -> bool:
    return path.is_dir() and any(any_images_in(folder) for folder in folders_in(path))


def read(path: Path, reading: Reading) -> Iterator[Row]:
    """The items whose pictures have one name in several sub-folders."""
    items: dict[str, dict[str, str]] = defaultdict(dict)
    roles = [folder for folder in folders_in(path) if any_images_in(folder)]
    of_role: dict[str, str] = {}
    for folder in roles:
        check_role(str(folder), folder.name)
        role = as_role(folder.name)
        if (same := of_role.setdefault(role, folder.name)) != folder.name:
            raise UserError(f"{folder}: {same} is the role {role} too; keep one of them")
        for stem, picture in images_in(folder, on_fault=reading.on_fault).items():
            items[stem][role] = f"{folder.name}/{picture.name}"
    reading.note(f"sub-folders are roles: {', '.join(folder.name for folder in roles)}")
    return paired(path, items, reading)
