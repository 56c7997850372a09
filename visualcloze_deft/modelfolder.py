"""What can be known of a model from its name and folder, before any weight is read."""

from __future__ import annotations

import json
import re
from pathlib import Path

from visualcloze_deft.errors import UserError
from visualcloze_deft.folders import BASE

TINY = "tiny"
FLUX_RESOLUTION = 384  # VisualCloze's first stage, for models that name none
PARTS = "transformer vae text_encoder text_encoder_2 tokenizer tokenizer_2 scheduler".split()


def check_folder(name: str) -> None:
    """Raise `UserError` if `name` can be no model: before any weight is read."""
    path = BASE if name == TINY else Path(name)
    if path.is_dir():
        lacking = [part for part in PARTS if not (path / part).is_dir()]
        if lacking:
            raise UserError(
                f"model folder {path}: no {', '.join(lacking)}; expected a diffusers folder of "
                f"FLUX.1-Fill with {', '.join(PARTS)}"
            )
    elif name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UserError(
            f"unknown model {name!r}; give 'tiny', a diffusers folder or a hub id such as "
            "black-forest-labs/FLUX.1-Fill-dev"
        )


def resolution_of(name: str) -> int:
    """The cell side the model's `model_index.json` names, or a hub id's end, else FLUX's."""
    path = (BASE if name == TINY else Path(name)) / "model_index.json"
    if not path.is_file():
        named = re.search(r"-(384|512)$", name)  # VisualCloze's two releases
        return int(named[1]) if named else FLUX_RESOLUTION
    try:
        return int(json.loads(path.read_text(encoding="utf-8")).get("resolution", FLUX_RESOLUTION))
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: no index of a model: {error}") from None


def check_lora(name: str) -> None:
    """Raise `UserError` if `name` is neither a file, a folder nor possibly a hub id."""
    if not Path(name).exists() and (name.count("/") != 1 or name.startswith((".", "/", "~"))):
        raise UserError(f"LoRA {name!r}: no such file or folder, and no hub id")
