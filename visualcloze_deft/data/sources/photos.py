"""The source `photos`: a plain folder of a few photos of one thing, with captions beside them.

dog/IMG_0412.jpg    any names
dog/IMG_0412.txt    a caption, where there is one
"""

from __future__ import annotations

from functools import cached_property, partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from visualcloze_deft.data.base import Item
from visualcloze_deft.errors import UserError
from visualcloze_deft.images.reading import images_in, listing, picture_size, read_image
from visualcloze_deft.storage.text_files import read_text, sound

MOST = 1000  # photos: there are as many pairs as its square, and one thing has hardly more


class Photos:
    """The source `photos`: every ordered pair of different photos in the folder `root`.

    files: the photos, sorted by name. The pairs of one target follow each other. Raises `UserError`
    where there are fewer than two photos or more than `MOST`, or a header cannot be read.
    """

    name = "photos"
    roles = frozenset({"reference", "target"})

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            raise UserError(f"{root}: no such folder")
        self.folder = root
        self.files = list(images_in(root).values())
        if len(self.files) < 2:
            raise UserError(
                f"{root}: expected two or more photos of one thing; found {listing(root)}"
            )
        if len(self.files) > MOST:
            raise UserError(
                f"{root}: {len(self.files)} photos; expected at most {MOST} of one thing. Pictures "
                "of many things are folder=PATH"
            )
        for path in self.files:
            picture_size(path)
        self.captions = [_caption(path.with_suffix(".txt")) for path in self.files]

    def __len__(self) -> int:
        return len(self.files) * (len(self.files) - 1)

    @cached_property
    def kinds(self) -> dict[frozenset[str], range]:
        return {self.roles: range(len(self))}

    @cached_property
    def photos(self) -> NDArray[np.intp]:
        """(n, 2) the photos of each item: reference, target."""
        targets, others = np.divmod(np.arange(len(self)), len(self.files) - 1)
        return np.stack([others + (others >= targets), targets], axis=1)

    def item(self, index: int) -> Item:
        reference, target = (int(photo) for photo in self.photos[index])
        caption = self.captions[target]
        return Item(
            key=f"{self.files[reference].stem}-{self.files[target].stem}",
            images={
                "reference": partial(read_image, self.files[reference]),
                "target": partial(read_image, self.files[target]),
            },
            texts={"caption": caption} if caption else {},
        )


def _caption(path: Path) -> str:
    """The text in `path` as one line; "" where there is no such file."""
    return " ".join(sound(read_text(path)).split()) if path.exists() else ""
