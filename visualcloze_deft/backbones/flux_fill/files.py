"""A folder of FLUX.1-Fill: its parts, and whether they are all there."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from visualcloze_deft.backbones.flux_fill.settings_files import KINDS, TransformerFile
from visualcloze_deft.backbones.model_files import (
    file_of,
    files_in,
    folder_of,
    hub_files,
    index_of,
    on_hub,
    shards_in,
)
from visualcloze_deft.errors import UserError
from visualcloze_deft.storage.settings_files import checked

FLUX_RESOLUTION = 384  # VisualCloze's first stage, for models that name none
CHANNELS = (384, 64)  # in and out of FLUX.1-Fill's transformer
PARTS = "transformer vae text_encoder text_encoder_2 tokenizer tokenizer_2 scheduler".split()
PUBLISHED = Path(__file__).parent / "published"
"""Settings of its networks as their config.json on the hub say, which tell their sizes."""
TOKENIZERS = {  # each is read from one of these sets of files
    "tokenizer": ({"tokenizer.json"}, {"vocab.json", "merges.txt"}),
    "tokenizer_2": ({"tokenizer.json"}, {"spiece.model"}),
}
NETWORKS = "transformer vae text_encoder text_encoder_2".split()
SETTINGS_OF = {
    **dict.fromkeys(NETWORKS, "config.json"),
    **dict.fromkeys(TOKENIZERS, "tokenizer_config.json"),
    "scheduler": "scheduler_config.json",
}


def check_folder(
    name: str, *, token: str | None = None, parts: Collection[str] = tuple(PARTS)
) -> None:
    """Raise `UserError` if `name` is no whole model: before any weight is read or downloaded.

    parts: those that are needed. Which tensors are in the weight files, `checks.check_weights`
    compares.
    """
    where = f"model {name!r}" if on_hub(name) else f"model folder {folder_of(name)}"
    files = hub_files(name, token) if on_hub(name) else frozenset(files_in(folder_of(name)))
    lacking = [part for part in parts if not any(file.startswith(f"{part}/") for file in files)]
    if lacking:
        raise UserError(
            f"{where}: no {', '.join(lacking)}; expected a diffusers folder of "
            f"FLUX.1-Fill with {', '.join(PARTS)}"
        )
    for part, kinds in TOKENIZERS.items():
        if part in parts and not any(
            {f"{part}/{file}" for file in kind} <= files for kind in kinds
        ):
            wanted = " or ".join(" and ".join(sorted(kind)) for kind in kinds)
            raise UserError(f"{where}: {part}/ has no {wanted}; copy or download it again")
    for part, file in SETTINGS_OF.items():
        if part in parts and f"{part}/{file}" not in files:
            raise UserError(f"{where}: {part}/ has no {file}; copy or download it again")
    for part in NETWORKS:
        if part in parts:
            check_files(name, where, part, files)
    for part in SETTINGS_OF:
        if part in parts:
            component_config(name, part)
    if "transformer" in parts:
        check_channels(name)


def check_files(name: str, where: str, part: str, files: Collection[str]) -> None:
    """Raise `UserError` unless the weight files of a network are all there."""
    if not any(re.fullmatch(rf"{part}/[^/]+\.safetensors", file) for file in files):
        raise UserError(f"{where}: {part}/ has no .safetensors file; pickles are not read")
    for index in (file for file in files if re.fullmatch(rf"{part}/[^/]*\.index[^/]*\.json", file)):
        for shard in shards_in(file_of(name, index)):
            if f"{part}/{shard}" not in files:
                raise UserError(f"{where}: {part}/ has no {shard}; copy or download it again")


def check_channels(name: str) -> None:
    """Raise `UserError` unless the transformer of a model completes grids."""
    fields = component_config(name, "transformer")
    inputs = fields.get("in_channels", TransformerFile.model_fields["in_channels"].default)
    # out_channels came with Fill; before it, a transformer had as many out as in
    found = inputs, fields.get("out_channels") or inputs
    if found != CHANNELS:
        raise UserError(
            f"model {name}: its transformer has {found[0]} input and {found[1]} output "
            f"channels; FLUX.1-Fill has {CHANNELS[0]} and {CHANNELS[1]} (FLUX.1-dev cannot "
            "complete grids)"
        )


def component_config(name: str, part: str) -> dict[str, Any]:
    """What the settings file of a part of a model says, see `settings_files.checked`."""
    what = f"no settings of a {part.rpartition('_2')[0] or part}"
    return checked(file_of(name, f"{part}/{SETTINGS_OF[part]}"), KINDS[part], what)


def resolution_of(name: str) -> int:
    """The cell side the model's `model_index.json` names, or a hub id's end, else FLUX's."""
    named = re.search(r"-(384|512)(?:@|$)", name)  # VisualCloze's two releases
    told = index_of(name).get("resolution")
    return int(told or (named[1] if named else FLUX_RESOLUTION))
