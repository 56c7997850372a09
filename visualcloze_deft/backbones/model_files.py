"""What can be known of a model from its name and folder, before any weight is read."""

from __future__ import annotations

import glob
import re
from collections.abc import Collection
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, list_repo_files, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
)

from visualcloze_deft.backbones.model_settings import KINDS, IndexFile, ShardsFile, TransformerFile
from visualcloze_deft.backbones.peft_files import CONFIG, WEIGHTS
from visualcloze_deft.config.run_settings import Bits
from visualcloze_deft.errors import UserError
from visualcloze_deft.paths import BASE
from visualcloze_deft.storage.hub import HUB_ID, UNREACHED, hub_errors, hub_id
from visualcloze_deft.storage.settings_files import checked

TINY = "tiny"
FLUX_RESOLUTION = 384  # VisualCloze's first stage, for models that name none
CHANNELS = (384, 64)  # in and out of FLUX.1-Fill's transformer
PARTS = "transformer vae text_encoder text_encoder_2 tokenizer tokenizer_2 scheduler".split()


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
DOWNLOADED = [  # no pickles, and nothing that runs
    "model_index.json",
    *(f"{part}/{kind}" for part in PARTS for kind in ("*.json", "*.safetensors", "*.txt")),
    "tokenizer_2/spiece.model",
]


def on_hub(name: str) -> bool:
    return name != TINY and not Path(name).exists()


def folder_of(name: str, *, token: str | None = None) -> Path:
    """Where a model lies: "tiny", a folder, or the hub's snapshot in the cache, which is completed.

    A process stays with the snapshot that it saw first, also when the hub has a newer one.
    """
    if name == TINY:
        return BASE
    return snapshot(name, token) if on_hub(name) else Path(name)


@cache
def snapshot(name: str, token: str | None = None) -> Path:
    repo, revision = hub_id(name)
    with hub_errors(f"model {name!r}"):
        return Path(
            snapshot_download(repo, revision=revision, allow_patterns=DOWNLOADED, token=token)
        )


def folder_here(name: str) -> Path | None:
    """`folder_of` without a download; None for a hub id that is not in the cache."""
    if not on_hub(name):
        return folder_of(name)
    repo, revision = hub_id(name)
    try:
        return Path(snapshot_download(repo, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


@cache
def hub_files(name: str, token: str | None = None) -> frozenset[str]:
    """The files of a repository on the hub or, where that is not reached, in the cache."""
    repo, revision = hub_id(name)
    with hub_errors(f"hub id {name!r}"):
        try:
            return frozenset(list_repo_files(repo, revision=revision, token=token))
        except HfHubHTTPError:
            raise
        except UNREACHED:
            here = Path(snapshot_download(repo, revision=revision, local_files_only=True))
            return frozenset(files_in(here))


def files_in(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def file_of(name: str, file: str) -> Path:
    """A small file of a model, by its path in there; downloaded where it is on the hub."""
    if not on_hub(name):
        return folder_of(name) / file
    repo, revision = hub_id(name)
    with hub_errors(f"model {name!r}: {file}"):
        return Path(hf_hub_download(repo, file, revision=revision))


def check_folder(
    name: str, *, token: str | None = None, parts: Collection[str] = tuple(PARTS)
) -> None:
    """Raise `UserError` if `name` is no whole model: before any weight is read or downloaded.

    parts: those that are needed. Which tensors are in the weight files, `loading.check_weights`
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


def shards_in(index: Path) -> list[str]:
    """The weight files that an index of them names."""
    fields = checked(index, ShardsFile, "no index of weight files")
    return sorted(set(fields["weight_map"].values()))


def weight_files(part: Path, variant: str | None = None) -> list[Path]:
    """The .safetensors files that a network in a folder is loaded from. variant: see diffusers."""
    ending = f".{variant}" if variant else ""
    for index in sorted(part.glob(f"*.safetensors.index{ending}.json")):
        return [part / shard for shard in shards_in(index)]
    found = sorted(part.glob("*.safetensors"))
    own = [path for path in found if variant and path.stem.endswith(ending)]
    return own or [path for path in found if "." not in path.stem]


def has_variant(part: Path, variant: str | None) -> bool:
    """Whether a network's folder has weight files of a variant: diffusers loads others without."""
    return variant is not None and any(part.glob(f"*.{glob.escape(variant)}[.-]*"))


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


def pinned(model: str | None, revision: str | None) -> str | None:
    """The name of a model at a revision of its repository on the hub, None: the newest.

    >>> pinned("black-forest-labs/FLUX.1-Fill-dev", "a1b2c3")
    'black-forest-labs/FLUX.1-Fill-dev@a1b2c3'
    """
    if revision is None:
        return model
    if model is None or not on_hub(model) or hub_id(model)[1]:
        raise UserError(f"--revision {revision}: goes with --model and an id on the hub")
    hub_id(f"{model}@{revision}")
    return f"{model}@{revision}"


def check_quantise(kind: Bits, *, zero3: bool = False) -> None:
    """Raise `UserError` where weights cannot be kept in `kind`. zero3: under ZeRO-3."""
    if kind in ("int8", "nf4") and find_spec("bitsandbytes") is None:
        raise UserError(f"quantise {kind!r} needs bitsandbytes: pip install bitsandbytes")
    if kind != "none" and zero3:
        raise UserError(
            f"quantise {kind!r} with --zero 3: a quantised weight cannot be split over processes; "
            "give --zero 2"
        )


def index_of(name: str) -> dict[str, Any]:
    """What a model's `model_index.json` says; {} where it has none here."""
    file = "model_index.json"
    if on_hub(name) and file not in hub_files(name):
        return {}
    path = file_of(name, file)
    if not path.is_file():
        return {}
    return checked(path, IndexFile, "no index of a model")


def resolution_of(name: str) -> int:
    """The cell side the model's `model_index.json` names, or a hub id's end, else FLUX's."""
    named = re.search(r"-(384|512)(?:@|$)", name)  # VisualCloze's two releases
    told = index_of(name).get("resolution")
    return int(told or (named[1] if named else FLUX_RESOLUTION))


def check_lora(name: str) -> None:
    """Raise `UserError` if `name` is no LoRA that `lora_file` finds; none is downloaded for it."""
    if not Path(name).is_file():
        file_in(name)


def lora_file(name: str) -> Path:
    """The .safetensors file of a LoRA: a file, the one in a folder, or the one of a hub id.

    On the hub it is downloaded where the cache lacks it, with an adapter's settings beside it.
    """
    path = Path(name)
    if path.is_file():
        return path
    file = file_in(name)
    if path.is_dir():
        return path / file
    if CONFIG in hub_files(name):
        file_of(name, CONFIG)
    return file_of(name, file)


def file_in(name: str) -> str:
    """The LoRA file in a folder or repository: the only one, or the one with a usual name."""
    path = Path(name)
    if not path.is_dir() and not HUB_ID.fullmatch(name):
        raise UserError(f"LoRA {name!r}: no such file or folder, and no hub id")
    files = {p.name for p in path.iterdir()} if path.is_dir() else hub_files(name)
    found = sorted(file for file in files if file.endswith(".safetensors") and "/" not in file)
    usual = [file for file in ("pytorch_lora_weights.safetensors", WEIGHTS) if file in found]
    if not found:
        raise UserError(f"LoRA {name!r}: no .safetensors file in it")
    chosen, *others = usual or found
    if others:
        raise UserError(
            f"LoRA {name!r}: {len(found)} .safetensors files, {chosen} and {others[0]} among them; "
            "name the file itself"
        )
    return chosen
