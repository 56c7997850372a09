"""How large FLUX.1-Fill's four networks are: their real classes, built without values."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from visualcloze_deft.backbones.base import Sides
from visualcloze_deft.backbones.flux_fill.files import component_config
from visualcloze_deft.backbones.flux_fill.layers import BLOCKS, MAX_TEXT_TOKENS
from visualcloze_deft.backbones.flux_fill.settings_files import TokenizerFile
from visualcloze_deft.backbones.model_files import file_of, on_hub
from visualcloze_deft.errors import UserError, why
from visualcloze_deft.storage.settings_files import checked

Encoder = Literal["text_encoder", "text_encoder_2", "vae"]
ENCODERS: tuple[Encoder, ...] = ("text_encoder", "text_encoder_2", "vae")


@dataclass(frozen=True, kw_only=True)
class Flux:
    """The sides of a FLUX transformer, in features, heads and blocks. text: width of T5's states.
    The others: see `base.Sizes`."""

    inputs: int
    outputs: int
    heads: int
    head: int
    text: int
    linear: Mapping[str, Sides]
    blocks: tuple[str, ...]
    parameters: int

    @property
    def width(self) -> int:
        return self.heads * self.head


def flux_of(name: str) -> Flux:
    """Of a model's transformer. Raises `UserError` where none can be made of its settings."""
    settings = component_config(name, "transformer")
    with made(name, "transformer"):
        return flux(settings)


def flux(settings: Mapping[str, Any]) -> Flux:
    """From a transformer's `config.json`; what it does not say is diffusers' default."""
    own = {name: value for name, value in settings.items() if not name.startswith("_")}
    return built(json.dumps(own, sort_keys=True))


@contextmanager
def made(name: str, part: str) -> Iterator[None]:
    """Whatever a library raises on settings that it cannot build a network of, as one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # each class has checks of its own, and some have none
        raise UserError(
            f"model {name!r}: no network can be made of {part}/config.json: {why(error)}; copy or "
            "download it again"
        ) from None


@cache
def built(settings: str) -> Flux:
    from diffusers import FluxTransformer2DModel  # which takes seconds to import

    from visualcloze_deft.backbones.structure import structure_of, without_values

    network = without_values(lambda: FluxTransformer2DModel.from_config(json.loads(settings)))
    config: Any = network.config
    return Flux(
        inputs=config.in_channels,
        outputs=config.patch_size**2 * (config.out_channels or config.in_channels),
        heads=config.num_attention_heads,
        head=config.attention_head_dim,
        text=config.joint_attention_dim,
        **vars(structure_of(network, BLOCKS)),
    )


def encoder_parameters(name: str, part: Encoder) -> int:
    """Parameters of one of the other networks of a model."""
    settings = json.dumps(component_config(name, part), sort_keys=True)
    with made(name, part):
        return parameters_in(part, settings)


@cache
def parameters_in(part: Encoder, settings: str) -> int:
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    from visualcloze_deft.backbones.structure import parameters_of, without_values

    fields = json.loads(settings)
    makers = {
        "text_encoder": lambda: CLIPTextModel(CLIPTextConfig(**fields)),
        "text_encoder_2": lambda: T5EncoderModel(T5Config(**fields)),
        "vae": lambda: AutoencoderKL.from_config(fields),
    }
    return parameters_of(without_values(makers[part]))


def text_tokens_of(name: str) -> int:
    """T5 tokens of a prompt: the folder's tokenizer's, at most FLUX's."""
    if on_hub(name):
        return MAX_TEXT_TOKENS
    path = file_of(name, "tokenizer_2/tokenizer_config.json")
    if not path.is_file():
        return MAX_TEXT_TOKENS
    longest = checked(path, TokenizerFile, "no settings of a tokenizer").get("model_max_length")
    return min(int(longest or MAX_TEXT_TOKENS), MAX_TEXT_TOKENS)
