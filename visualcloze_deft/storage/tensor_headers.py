"""The texts in the headers of safetensors files, read and replaced; the tensors are not read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open

from visualcloze_deft.errors import UserError
from visualcloze_deft.storage.text_files import check_file

ALIGNED = 8  # bytes: tensors begin at a multiple of it, as safetensors' own writer has it


def read_texts(path: Path) -> dict[str, str]:
    """The texts in a file's header. Raises `UserError` where it is damaged or truncated."""
    check_file(path)
    try:
        with safe_open(path, "np") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: missing, damaged or truncated ({error})") from None


def copy_with_texts(source: Path, target: Path, texts: Mapping[str, str]) -> None:
    """Copy a file with other texts in its header; its tensors stay as they are."""
    with source.open("rb") as old, target.open("wb") as new:
        header = json.loads(old.read(int.from_bytes(old.read(8), "little")))
        header["__metadata__"] = dict(sorted(texts.items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        text = text.ljust(-(-len(text) // ALIGNED) * ALIGNED)
        new.write(len(text).to_bytes(8, "little") + text)
        shutil.copyfileobj(old, new)
