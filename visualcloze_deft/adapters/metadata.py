"""What an adapter says of the base that it was trained on, held to the base at hand."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from peft import PeftConfig

from visualcloze_deft.adapters.method_table import method_of
from visualcloze_deft.backbones.lora_places import lora_file
from visualcloze_deft.backbones.model_files import folder_here, folder_of, on_hub
from visualcloze_deft.backbones.peft_files import adapter_settings, read_metadata
from visualcloze_deft.backbones.table import fingerprint
from visualcloze_deft.errors import UserError
from visualcloze_deft.storage.hashing import digest_of

LORA_DIGEST = "base_lora_sha256"  # what an adapter calls the hash of the LoRA in its base


def check_base(adapter: Path, name: str, *, lora: str | None) -> None:
    """Raise `UserError` if the adapter in a folder says that it was trained on another base, or on
    one with another file merged than `lora` is. None there is said, see `lora_mismatch`.

    A base on the hub is downloaded for it where the cache lacks it.
    """
    told = read_metadata(adapter)
    before = told.get("base_fingerprint")
    if before:
        folder_of(name)
    if before and before != fingerprint(name):
        raise UserError(
            f"adapter {adapter}: made for another base than {name!r} is here (it names "
            f"{told.get('base_model', 'none')!r}, whose weight files were others); name that base "
            "with --model, or train the adapter again"
        )
    if lora and told.get(LORA_DIGEST) and not has_same_lora(told, lora):
        raise UserError(
            f"adapter {adapter}: made for a base with another LoRA merged than {lora} is here (it "
            f"names {told.get('base_lora')!r}, a file with another hash); give that file, or train "
            "the adapter again"
        )


def has_same_lora(told: Mapping[str, str], lora: str | None) -> bool:
    """Whether the base of an adapter, by what it says, had `lora` merged: the same file or, where
    it does not say its hash, one of the same name."""
    if lora and told.get(LORA_DIGEST):
        return digest_of(lora_file(lora)) == told[LORA_DIGEST]
    return told.get("base_lora", "") == (lora or "")


def lora_mismatch(adapter: Path, lora: str | None) -> str | None:
    """What to say where an adapter was trained on a base with another LoRA merged than `lora`."""
    told = read_metadata(adapter)
    if has_same_lora(told, lora):
        return None
    return (
        f"the adapter {adapter} was trained on a base with the LoRA "
        f"{told.get('base_lora') or 'none'} merged, here it is {lora or 'none'}"
    )


def check_start(folder: Path, method: str, rank: int, lora: str | None) -> None:
    """Raise `UserError` unless the adapter in a folder is of this method and rank, and was trained
    on a base with the same LoRA merged into it."""
    try:
        fields = adapter_settings(folder)
    except UserError as error:
        raise UserError(f"adapter.init_from: {error}") from None
    try:
        kind, found = method_of(fields), fields.get("r")
    except ValueError as error:
        raise UserError(f"adapter.init_from {folder}: {error}; DEFT and LORA are known") from None
    if (kind, found) != (method, rank):
        raise UserError(
            f"adapter.init_from {folder}: it is {kind} of rank {found}, this run trains {method} "
            f"of rank {rank}; give --method {kind} --rank {found}"
        )
    told = read_metadata(folder)
    if not has_same_lora(told, lora):
        raise UserError(
            f"adapter.init_from {folder}: made for a base with the LoRA "
            f"{told.get('base_lora') or 'none'} merged, this run's has {lora or 'none'} (their "
            "hashes count where names are the same); set model_lora"
        )


def named(
    folder: Path, option: str, told: str | None, config: PeftConfig | None = None
) -> str | None:
    """What an adapter names as its base. Nothing is downloaded for it: raises `UserError` where
    that is not on this machine."""
    name = told or (config.base_model_name_or_path if config else None)
    if name and on_hub(name) and folder_here(name) is None:
        raise UserError(
            f"adapter {folder}: trained on {name!r}, which is not on this machine; give {option} "
            f"{name} to have it downloaded, or name where it lies"
        )
    return name
