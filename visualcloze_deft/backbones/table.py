"""The families of models that are known, and which of them a model or a network is of."""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING

from visualcloze_deft.backbones.base import Backbone
from visualcloze_deft.backbones.flux_fill.backbone import FLUX_FILL
from visualcloze_deft.backbones.model_files import file_of, folder_here, hub_files, on_hub
from visualcloze_deft.errors import UserError
from visualcloze_deft.storage.text_files import read_object

if TYPE_CHECKING:
    from torch import nn

BACKBONES: dict[str, Backbone] = {FLUX_FILL.name: FLUX_FILL}
SAMPLE = 1 << 20  # bytes of a weight file that its fingerprint reads at either end


def backbone_of(name: str) -> Backbone:
    """The family of a model: "tiny", a folder or a hub id, by the settings of its denoiser.

    FLUX.1-Fill's where none recognises it: that family's check says what the model lacks.
    """
    for backbone in BACKBONES.values():
        config = f"{backbone.denoiser}/config.json"
        if on_hub(name) and config not in hub_files(name):
            continue
        path = file_of(name, config)
        if not path.exists():
            continue
        try:
            fields = read_object(path, "no settings of a network")
        except UserError:
            if backbone is FLUX_FILL:
                continue
            raise
        kind = fields.get("_class_name")
        if isinstance(kind, str) and backbone.recognises(kind, fields):
            return backbone
    return FLUX_FILL


def backbone_of_network(network: nn.Module) -> Backbone:
    """The family of a denoiser. Raises `UserError` where none has networks of its class."""
    kind, settings = type(network).__name__, getattr(network, "config", {})
    for backbone in BACKBONES.values():
        if backbone.recognises(kind, settings):
            return backbone
    raise UserError(f"a network of the class {kind}: {', '.join(BACKBONES)} have none")


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """The blocks of a denoiser, in the order of its modules: FLUX's forward pass has the same."""
    pattern = re.compile(backbone_of_network(network).blocks)
    return [module for name, module in network.named_modules() if pattern.fullmatch(name)]


def fingerprint(name: str) -> str:
    """What tells a denoiser's weights from others; "" for a hub id that is not in the cache.

    SHA-256 over names, sizes and both ends of the weight files: 24 GB are not read for it. It is
    the same for a folder and for the snapshot of a hub id that hold the same files.
    """
    folder = folder_here(name)
    told = hashlib.sha256()
    place = folder / backbone_of(str(folder)).denoiser if folder else None
    files = sorted(place.glob("*.safetensors")) if place else []
    for path in files:
        size = path.stat().st_size
        told.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            told.update(file.read(SAMPLE))
            file.seek(max(size - SAMPLE, 0))
            told.update(file.read())
    return told.hexdigest() if files else ""
