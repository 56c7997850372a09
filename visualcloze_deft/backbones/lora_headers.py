"""What the headers of LoRA files of FLUX say to the tools that list and load them.

`modelspec.*` is Stability AI's ModelSpec 1.0.1 (github.com/Stability-AI/ModelSpec), which SwarmUI
and others read. `ss_*` and `sshs_model_hash` are what kohya's sd-scripts write, and what Forge,
A1111 and Civitai read. A key is written where its value is known, and left out otherwise.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from visualcloze_deft.backbones.lora_names import FileFormat
from visualcloze_deft.backbones.model_files import FILL, TINY, public_name

VERSION = "1.0.1"
ARCHITECTURE = "flux-1-dev/lora"  # the id that sd-scripts writes for every LoRA of a FLUX.1 [dev]
IMPLEMENTATIONS: dict[FileFormat, str] = {  # whose names the tensors have
    "diffusers": "diffusers",
    "comfyui": "https://github.com/black-forest-labs/flux",
    "kohya": "https://github.com/black-forest-labs/flux",
}
BASE_VERSION = "flux1"  # sd-scripts' word for FLUX.1
NETWORK = "networks.lora_flux"  # its module that reads the names of the format "kohya"
HINT = (
    "For FLUX.1-Fill with grids of images, as in VisualCloze: example rows, and a last row to fill."
)
LICENCES = {TINY: "Apache-2.0", FILL: "FLUX.1 [dev] Non-Commercial License"}
HASHES = {"modelspec.hash_sha256": "0x", "sshs_model_hash": ""}  # key -> what stands before it


@dataclass(frozen=True, kw_only=True)
class Told:
    """What is known of an adapter. name: of its run or folder; base: a model's name; date: in ISO
    8601; ranks: of the file's layers; about: what the adapter's own file says."""

    name: str
    base: str
    date: str
    ranks: Collection[int]
    about: Mapping[str, str]


def header(told: Told, kind: FileFormat) -> dict[str, str]:
    """The texts for a file of `kind`, without the hashes of its tensors, see `HASHES`."""
    found = modelspec(told, kind) | kohya(told, kind)
    return {key: value for key, value in found.items() if value}


def modelspec(told: Told, kind: FileFormat) -> dict[str, str]:
    side = told.about.get("resolution", "")
    keys = {
        "sai_model_spec": VERSION,
        "architecture": ARCHITECTURE,
        "implementation": IMPLEMENTATIONS[kind],
        "title": told.name,
        "description": description(told),
        "date": told.date,
        "resolution": f"{side}x{side}" if side else "",
        "usage_hint": HINT,
        "trigger_phrase": told.about.get("trigger", ""),
        "license": LICENCES.get(public_name(told.base), ""),
    }
    return {f"modelspec.{key}": value for key, value in keys.items()}


def kohya(told: Told, kind: FileFormat) -> dict[str, str]:
    side = told.about.get("resolution", "")
    rank = str(next(iter(told.ranks))) if len({*told.ranks}) == 1 else "Dynamic"
    return {
        "ss_output_name": told.name,
        "ss_network_module": NETWORK if kind == "kohya" else "",
        "ss_network_dim": rank,
        "ss_network_alpha": rank,  # the scale is within the matrices
        "ss_base_model_version": BASE_VERSION,
        "ss_sd_model_name": public_name(told.base),
        "ss_steps": told.about.get("step", ""),
        "ss_resolution": f"({side}, {side})" if side else "",
        "ss_training_comment": description(told),
    }


def description(told: Told) -> str:
    """A sentence on the adapter.

    >>> about = {"method": "deft", "rank": "16", "tasks": "all", "step": "500"}
    >>> description(Told(name="a", base="tiny", date="", ranks=[16], about=about))
    'DEFT adapter of rank 16, as a LoRA. Trained on the tasks all for 500 steps.'
    """
    about = told.about
    text = f"{about['method'].upper()} adapter of rank {about['rank']}, as a LoRA."
    if about.get("tasks"):
        steps = f" for {about['step']} steps" if about.get("step") else ""
        text += f" Trained on the tasks {about['tasks']}{steps}."
    return text
