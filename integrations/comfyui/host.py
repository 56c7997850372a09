"""The services of ComfyUI that the nodes use: model folders, device, progress, previews."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import comfy.latent_formats
import comfy.model_management
import comfy.utils
import folder_paths
import latent_preview
from PIL import Image

CATEGORY = "visualcloze_deft"
MODELS = "diffusers"  # ComfyUI's name of the folder
ADAPTERS = "vcdeft_adapters"
LORAS = "loras"  # ComfyUI's name, too
TASKS = "vcdeft_tasks"

for _name in (ADAPTERS, TASKS):
    folder_paths.add_model_folder_path(_name, os.path.join(folder_paths.models_dir, _name))


def places(kind: str) -> list[Path]:
    """The existing model folders of one kind."""
    return [Path(one) for one in folder_paths.get_folder_paths(kind) if os.path.isdir(one)]


def folders_with(file: str, kind: str) -> dict[str, Path]:
    """The folders below the model folders of one kind that hold `file`, by their relative names."""
    found: dict[str, Path] = {}
    for place in places(kind):
        for root, _, files in os.walk(place, followlinks=True):
            if file in files:
                found.setdefault(Path(root).relative_to(place).as_posix(), Path(root))
    return dict(sorted(found.items()))


def lora_files() -> dict[str, Path]:
    """The LoRA files in models/loras, by the folder and their names."""
    names = folder_paths.get_filename_list(LORAS)
    found = {name: folder_paths.get_full_path(LORAS, name) for name in names}
    return {
        f"{LORAS}/{name}": Path(path)
        for name, path in found.items()
        if path and path.endswith(".safetensors")
    }


def stamp(place: Path) -> str:
    """A digest of the name, size and time of a file, or of those in a folder, three levels deep; of
    a name that is neither, always the same."""
    inside = [path for depth in ("*", "*/*", "*/*/*") for path in place.glob(depth)]
    found = [
        (path.relative_to(place).as_posix(), path.stat().st_size, path.stat().st_mtime_ns)
        for path in (place, *sorted(inside))
        if path.is_file()
    ]
    return hashlib.sha256(repr(found).encode()).hexdigest()


def device() -> str:
    """The device that ComfyUI computes on."""
    return str(comfy.model_management.get_torch_device())


def make_room() -> None:
    """Move the models of other nodes off the GPU."""
    comfy.model_management.unload_all_models()
    comfy.model_management.soft_empty_cache()


class Progress:
    """The progress bar of a node, which also ends the node when the user interrupts it."""

    def __init__(self, total: int) -> None:
        self.bar = comfy.utils.ProgressBar(total)
        self.done = 0

    def step(self, picture: Image.Image | None) -> None:
        """One step is done. picture: the preview, if any."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        self.done += 1
        shown = (
            None if picture is None else ("JPEG", picture, latent_preview.MAX_PREVIEW_RESOLUTION)
        )
        self.bar.update_absolute(self.done, preview=shown)


def flux_previewer() -> Any:
    """ComfyUI's previewer of FLUX latents; None where the user has switched previews off."""
    place = comfy.model_management.get_torch_device()
    return latent_preview.get_previewer(place, comfy.latent_formats.Flux())
