"""FLUX.1-Fill's functions on torch modules, see `base.Networks`."""

from __future__ import annotations

from pathlib import Path

from diffusers import FluxTransformer2DModel
from diffusers.loaders import FluxLoraLoaderMixin

from visualcloze_deft.backbones.base import Networks
from visualcloze_deft.backbones.flux_fill.context import ContextCache
from visualcloze_deft.backbones.flux_fill.loading import (
    load_encoders,
    load_models,
    load_transformer,
)
from visualcloze_deft.backbones.flux_fill.model import predict, probe


def load_lora(path: Path, transformer: FluxTransformer2DModel) -> None:
    """Read a LoRA file of diffusers' or, at FLUX's width, kohya's names into a transformer."""
    tensors, alphas = FluxLoraLoaderMixin.lora_state_dict(str(path), return_alphas=True)
    FluxLoraLoaderMixin.load_lora_into_transformer(tensors, alphas, transformer)


NETWORKS = Networks(
    load=load_models,
    load_encoders=load_encoders,
    load_denoiser=load_transformer,
    predict=predict,
    probe=probe,
    load_lora=load_lora,
    context_cache=ContextCache,
)
