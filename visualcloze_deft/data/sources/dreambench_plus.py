"""The source `dreambench-plus`: DreamBench++, subjects and the prompts to show them in.

data/images/animal/00.jpg and data/captions/animal/00.txt, in folders of any depth or in none. The
first line of a caption names the subject, every other one is a prompt (arXiv 2406.16855).
Nobody has a picture of the answer: the source asks, and no task is trained on it.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from visualcloze_deft.data.base import Item, Listed
from visualcloze_deft.errors import UserError
from visualcloze_deft.images.reading import folders_in, images_in, listing, read_image
from visualcloze_deft.storage.text_files import read_text


class DreamBenchPlus(Listed):
    """The source `dreambench-plus`: every picture with each of its prompts.

    root: the folder that holds `data`, or `data` itself.
    """

    name = "dreambench-plus"
    roles = frozenset({"reference"})

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            raise UserError(f"{root}: no such folder")
        data = root / "data" if (root / "data").is_dir() else root
        for name in ("images", "captions"):
            if not (data / name).is_dir():
                raise UserError(
                    f"{data}: expected the folders images and captions; found {listing(data)}"
                )
        self.images = data / "images"
        self.pictures = pictures = pictures_below(self.images)
        if not pictures:
            raise UserError(f"{data / 'images'}: no picture in it or in its folders")
        for path in sorted((data / "captions").rglob("[!.]*.txt")):
            stem = path.relative_to(data / "captions").with_suffix("").as_posix()
            if stem not in pictures:
                raise UserError(f"{path}: its picture images/{stem}.jpg is missing")
        super().__init__(
            [
                item
                for stem, picture in pictures.items()
                for item in asked_of(stem, picture, data / "captions" / f"{stem}.txt")
            ]
        )


def pictures_below(folder: Path, inside: str = "") -> dict[str, Path]:
    """The pictures in `folder` and in its folders, by their path there without its suffix."""
    found = {inside + stem: path for stem, path in images_in(folder).items()}
    for deeper in folders_in(folder):
        if deeper.resolve() not in folder.resolve().parents:  # a link that leads back
            found |= pictures_below(deeper, f"{inside}{deeper.name}/")
    return found


def asked_of(stem: str, picture: Path, caption: Path) -> list[Item]:
    """One item for each prompt in `caption`."""
    if not caption.exists():
        raise UserError(f"{picture}: its prompts {caption} are missing")
    subject, *prompts = (line.strip() for line in read_text(caption).split("\n"))
    prompts = [prompt for prompt in prompts if prompt]
    if not subject or not prompts:
        raise UserError(f"{caption}: expected the subject in line 1, a prompt in each line below")
    return [
        Item(
            key=f"{stem} {number}",
            images={"reference": partial(read_image, picture)},
            texts={"caption": prompt, "subject": subject},
        )
        for number, prompt in enumerate(prompts, 1)
    ]
