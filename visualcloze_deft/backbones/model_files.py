"""What can be known of a model from its name and folder, before any weight is read."""

from __future__ import annotations

import glob
import os
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from visualcloze_deft.backbones.model_settings import IndexFile, ShardsFile
from visualcloze_deft.config.run_settings import Bits
from visualcloze_deft.errors import UserError
from visualcloze_deft.paths import BASE
from visualcloze_deft.storage.hub import HUB_ID, UNREACHED, hub_errors, hub_id
from visualcloze_deft.storage.settings_files import checked

TINY = "tiny"
PATIENCE = 10  # seconds for the hub to answer; asked once, where listing files asks six times
FILL = "black-forest-labs/FLUX.1-Fill-dev"
FOLDERS = (  # of parts, in diffusers' layout, of all families
    "transformer unet vae text_encoder text_encoder_2 tokenizer tokenizer_2 scheduler".split()
)
DOWNLOADED = [  # of a part's folder: no pickles, and nothing that runs
    "model_index.json",
    *(f"{part}/{kind}" for part in FOLDERS for kind in ("*.json", "*.safetensors", "*.txt")),
    "tokenizer_2/spiece.model",
]


def on_hub(name: str) -> bool:
    return name != TINY and not Path(name).exists()


def public_name(place: str) -> str:
    """What is said of a model or a LoRA: its id on the hub, or the last part of its path.

    >>> public_name("me/model@v1"), public_name("/data/flux-fill"), public_name("tiny")
    ('me/model', 'flux-fill', 'tiny')
    """
    if not place or place == TINY:
        return place
    if HUB_ID.fullmatch(place) and not os.path.exists(place):
        return hub_id(place)[0]
    return os.path.basename(os.path.abspath(place))


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
            told = HfApi().model_info(repo, revision=revision, token=token, timeout=PATIENCE)
            return frozenset(file.rfilename for file in told.siblings or ())
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
