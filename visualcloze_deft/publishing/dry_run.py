"""The folder of a dry run: a new or an empty one, or that of a dry run before, left as it was."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from visualcloze_deft.errors import UserError, writing
from visualcloze_deft.storage.atomic import check_foreign, clear, output_folder, staged_at
from visualcloze_deft.storage.text_files import read_text

SIGNATURE = re.compile(r"<!-- vcdeft publish ([0-9a-f]{64}) -->\n\Z")
OURS = ("README.md", "adapter", "comfyui", "images", "kohya", "pytorch_lora_weights.safetensors")


def signed(card: str) -> str:
    """A card with a last line that tells whether it has been edited."""
    return f"{card}<!-- vcdeft publish {digest(card)} -->\n"


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def check_output(folder: Path) -> None:
    """Raise `UserError` where `folder` holds anything but what a dry run has written there."""
    if not os.path.lexists(folder / "README.md"):
        check_foreign(folder, (), what="dry run of vcdeft publish")
        return
    check_foreign(folder, OURS, what="dry run of vcdeft publish")
    text = read_text(folder / "README.md")
    found = SIGNATURE.search(text)
    if found is None or digest(text[: found.start()]) != found[1]:
        raise UserError(
            f"{folder / 'README.md'}: not written by vcdeft publish, or edited since; choose "
            "another folder, or upload this one with 'hf upload'"
        )


@contextmanager
def replaced(folder: Path) -> Iterator[Path]:
    """An empty folder to fill, which takes the place of `folder` where nothing fails within."""
    place = Path(os.path.abspath(folder))
    output_folder(place.parent)
    with staged_at(place) as staged:
        with writing(folder):
            staged.mkdir()
        yield staged
        clear(place)
