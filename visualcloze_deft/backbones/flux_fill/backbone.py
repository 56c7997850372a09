"""FLUX.1-Fill as a backbone: what its files tell, see `base.Backbone`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from visualcloze_deft.backbones.base import Backbone, Networks
from visualcloze_deft.backbones.flops import training_flops
from visualcloze_deft.backbones.flux_fill.activations import activations_of
from visualcloze_deft.backbones.flux_fill.files import check_folder, component_config, resolution_of
from visualcloze_deft.backbones.flux_fill.layers import BLOCKS, FLUX_LAYERS
from visualcloze_deft.backbones.flux_fill.sizes import (
    ENCODERS,
    Flux,
    encoder_parameters,
    flux_of,
    text_tokens_of,
)


def is_flux(kind: str, _: Mapping[str, Any]) -> bool:
    """Whether a denoiser is FLUX's; `files.check_channels` tells Fill from others."""
    return kind == "FluxTransformer2DModel"


def refuses(rows: int, columns: int, targets: int) -> str | None:
    """Why a grid has no place; FLUX.1-Fill fills holes in what it is shown."""
    return "every column is a target; leave one condition at least" if targets == columns else None


def sizes(name: str) -> Flux:
    return flux_of(name)


def encoders(name: str) -> Mapping[str, int]:
    return {part: encoder_parameters(name, part) for part in ENCODERS}


def networks() -> Networks:
    from visualcloze_deft.backbones.flux_fill.networks import NETWORKS

    return NETWORKS


FLUX_FILL = Backbone(
    name="flux-fill",
    denoiser="transformer",
    recognises=is_flux,
    check=check_folder,
    refuses=refuses,
    blocks=BLOCKS,
    target_modules=FLUX_LAYERS,
    resolution=resolution_of,
    sizes=sizes,
    text_tokens=text_tokens_of,
    encoders=encoders,
    vae=lambda name: component_config(name, "vae"),
    activations=activations_of,
    features=frozenset(
        {"context-cache", "lora-files", "pipeline", "quantised", "scheduled-sampling"}
    ),
    networks=networks,
    flops=training_flops,
)
