"""What can be known of a model from its name and folder, before any weight is read."""

from __future__ import annotations

import glob
import hashlib
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import hf_hub_download, list_repo_files, snapshot_download
from huggingface_hub.errors import (  # type: ignore[attr-defined]
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    StrictDataclassError,
)
from safetensors import SafetensorError, safe_open

from visualcloze_deft.digests import digest_of
from visualcloze_deft.errors import PARSED, UserError, why
from visualcloze_deft.folders import BASE
from visualcloze_deft.modelsettings import (
    KINDS,
    AdapterFile,
    IndexFile,
    ShardsFile,
    TransformerFile,
    checked,
)
from visualcloze_deft.textfile import check_file

UNLOADABLE = (*PARSED, RuntimeError, AssertionError, ImportError, StrictDataclassError)
"""What transformers and diffusers raise of files that hold something else than they build. What the
library `tokenizers` raises is an Exception and nothing more."""

Bits = Literal["none", "int8", "nf4", "fp8"]  # what frozen blocks are kept in
Precision = Literal["auto", "float32", "bfloat16"]  # of a frozen base

TINY = "tiny"
FLUX_RESOLUTION = 384  # VisualCloze's first stage, for models that name none
CONFIG = "adapter_config.json"  # peft's names for an adapter's settings and tensors
WEIGHTS = "adapter_model.safetensors"
CHANNELS = (384, 64)  # in and out of FLUX.1-Fill's transformer
LORA_DIGEST = "base_lora_sha256"  # what an adapter calls the hash of the LoRA in its base
SAMPLE = 1 << 20  # bytes of a weight file that its fingerprint reads at either end
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
HUB_ID = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")
UNREACHED = (OfflineModeIsEnabled, LocalEntryNotFoundError, HTTPError)  # HTTPError: the client's
DOWNLOADED = [  # no pickles, and nothing that runs
    "model_index.json",
    *(f"{part}/{kind}" for part in PARTS for kind in ("*.json", "*.safetensors", "*.txt")),
    "tokenizer_2/spiece.model",
]


def hub_id(name: str) -> tuple[str, str | None]:
    """The repository, and the revision behind an @, of a model or LoRA on the hub.

    >>> hub_id("black-forest-labs/FLUX.1-Fill-dev@main")
    ('black-forest-labs/FLUX.1-Fill-dev', 'main')

    Raises `UserError` where `name` can be no id.
    """
    found = HUB_ID.fullmatch(name)
    if found is None:
        raise UserError(
            f"unknown model {name!r}; give 'tiny', a diffusers folder or a hub id such as "
            "black-forest-labs/FLUX.1-Fill-dev, with @REVISION if not the newest"
        )
    return found["repo"], found["revision"]


def at_revision(place: str) -> dict[str, Any]:
    """A folder, or a hub id of any kind of model, as `from_pretrained` takes it.

    >>> at_revision("facebook/dinov2-small@main")
    {'pretrained_model_name_or_path': 'facebook/dinov2-small', 'revision': 'main'}
    """
    repo, revision = (place, None) if Path(place).is_dir() else hub_id(place)
    told = {"pretrained_model_name_or_path": repo, "revision": revision}
    return {name: value for name, value in told.items() if value is not None}


def on_hub(name: str) -> bool:
    return name != TINY and not Path(name).exists()


@contextmanager
def hub_errors(what: str) -> Iterator[None]:
    """What the hub's client raises, as one line."""
    try:
        yield
    except (HfHubHTTPError, HFValidationError) as error:
        why = next(line for line in [*str(error).splitlines(), "no reason given"] if line.strip())
        raise UserError(f"{what}: cannot be had from the hub: {why[:200]}") from None
    except UNREACHED as error:
        raise UserError(
            f"{what}: not in the hub's cache on this machine, and the hub cannot be reached "
            f"({str(error).splitlines()[0][:120]})"
        ) from None


@contextmanager
def loading(where: str, way_out: str) -> Iterator[None]:
    """What libraries raise within, on the files of a model, as one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of which only those that files are the reason of
        if not isinstance(error, UNLOADABLE) and type(error) is not Exception:
            raise
        raise UserError(f"{where} cannot be loaded: {why(error)}; {way_out}") from None


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

    parts: those that are needed. Which tensors are in the weight files, `models.check_weights`
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
            part_settings(name, part)
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
    fields = part_settings(name, "transformer")
    inputs = fields.get("in_channels", TransformerFile.model_fields["in_channels"].default)
    # out_channels came with Fill; before it, a transformer had as many out as in
    found = inputs, fields.get("out_channels") or inputs
    if found != CHANNELS:
        raise UserError(
            f"model {name}: its transformer has {found[0]} input and {found[1]} output "
            f"channels; FLUX.1-Fill has {CHANNELS[0]} and {CHANNELS[1]} (FLUX.1-dev cannot "
            "complete grids)"
        )


def part_settings(name: str, part: str) -> dict[str, Any]:
    """What the settings file of a part of a model says, see `modelsettings.checked`."""
    what = f"no settings of a {part.rpartition('_2')[0] or part}"
    return checked(file_of(name, f"{part}/{SETTINGS_OF[part]}"), KINDS[part], what)


def fingerprint(name: str) -> str:
    """What tells the transformer's weights from others; "" for a hub id that is not in the cache.

    SHA-256 over names, sizes and both ends of the weight files: 24 GB are not read for it. It is
    the same for a folder and for the snapshot of a hub id that hold the same files.
    """
    folder = folder_here(name)
    told = hashlib.sha256()
    files = sorted((folder / "transformer").glob("*.safetensors")) if folder else []
    for path in files:
        size = path.stat().st_size
        told.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            told.update(file.read(SAMPLE))
            file.seek(max(size - SAMPLE, 0))
            told.update(file.read())
    return told.hexdigest() if files else ""


def adapter_settings(folder: Path) -> dict[str, Any]:
    """What the settings file of the adapter in a folder says, see `modelsettings.checked`."""
    path = folder / CONFIG
    if not path.is_file():
        raise UserError(f"adapter {folder}: no {CONFIG} there; name the folder that holds it")
    return checked(path, AdapterFile, "no settings of an adapter")


def told_by(adapter: Path) -> dict[str, str]:
    """What the adapter in a folder says of itself."""
    check_file(adapter / WEIGHTS)
    try:
        with safe_open(adapter / WEIGHTS, "np") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{adapter / WEIGHTS}: missing, damaged or truncated ({error})") from None


def check_base(adapter: Path, name: str, *, lora: str | None) -> None:
    """Raise `UserError` if the adapter in a folder says that it was trained on another base, or on
    one with another file merged than `lora` is. None there is said, see `other_lora`.

    A base on the hub is downloaded for it where the cache lacks it.
    """
    told = told_by(adapter)
    before = told.get("base_fingerprint")
    if before:
        folder_of(name)
    if before and before != fingerprint(name):
        raise UserError(
            f"adapter {adapter}: made for another base than {name!r} is here (it names "
            f"{told.get('base_model', 'none')!r}, whose weight files were others); name that base "
            "with --model, or train the adapter again"
        )
    if lora and told.get(LORA_DIGEST) and not has_lora(told, lora):
        raise UserError(
            f"adapter {adapter}: made for a base with another LoRA merged than {lora} is here (it "
            f"names {told.get('base_lora')!r}, a file with another hash); give that file, or train "
            "the adapter again"
        )


def has_lora(told: Mapping[str, str], lora: str | None) -> bool:
    """Whether the base of an adapter, by what it says, had `lora` merged: the same file or, where
    it does not say its hash, one of the same name."""
    if lora and told.get(LORA_DIGEST):
        return digest_of(lora_file(lora)) == told[LORA_DIGEST]
    return told.get("base_lora", "") == (lora or "")


def other_lora(adapter: Path, lora: str | None) -> str | None:
    """What to say where an adapter was trained on a base with another LoRA merged than `lora`."""
    told = told_by(adapter)
    if has_lora(told, lora):
        return None
    return (
        f"the adapter {adapter} was trained on a base with the LoRA "
        f"{told.get('base_lora') or 'none'} merged, here it is {lora or 'none'}"
    )


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


def check_start(folder: Path, method: str, rank: int, lora: str | None) -> None:
    """Raise `UserError` unless the adapter in a folder is of this method and rank, and was trained
    on a base with the same LoRA merged into it."""
    try:
        fields = adapter_settings(folder)
    except UserError as error:
        raise UserError(f"adapter.start: {error}") from None
    kind, found = str(fields.get("peft_type")), fields.get("r")
    if kind == "DEFT":
        relaxed = "deft-relaxed" if fields.get("decomposition_method") == "relu" else "deft"
        kind = "para" if fields.get("para") else relaxed
    if (kind.lower(), found) != (method, rank):
        raise UserError(
            f"adapter.start {folder}: it is {kind.lower()} of rank {found}, this run trains "
            f"{method} of rank {rank}; give --method {kind.lower()} --rank {found}"
        )
    told = told_by(folder)
    if not has_lora(told, lora):
        raise UserError(
            f"adapter.start {folder}: made for a base with the LoRA "
            f"{told.get('base_lora') or 'none'} merged, this run's has {lora or 'none'} (their "
            "hashes count where names are the same); set model_lora"
        )


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
