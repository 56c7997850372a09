"""How large FLUX.1-Fill's four networks are: counted from their settings, without weights or torch.

The tests hold each count against the real network.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from visualcloze_deft.backbones.model_files import TINY, component_config
from visualcloze_deft.backbones.model_settings import TokenizerFile
from visualcloze_deft.errors import UserError
from visualcloze_deft.paths import BASE
from visualcloze_deft.storage.settings_files import checked

# Attention and feed-forward layers of both block kinds; modulation and embedders stay as they are.
FLUX_LAYERS = (
    r".*transformer_blocks\.\d+\."
    r"(attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
    r"|ff\.net\.(0\.proj|2)|ff_context\.net\.(0\.proj|2)|proj_mlp|proj_out)"
)
BLOCK = re.compile(r"((?:single_)?transformer_blocks\.\d+)\.(.*)")

MAX_TEXT_TOKENS = 512  # FLUX's T5 length

Other = Literal["text_encoder", "text_encoder_2", "vae"]
Network = Literal["transformer"] | Other
Sides = tuple[int, int]  # inputs and outputs of a linear layer


def settings_of(name: str, network: Network) -> dict[str, Any]:
    """The `config.json` of one network of a model: "tiny", a folder or a hub id.

    Raises `UserError` where there is none.
    """
    return component_config(name, network)


@dataclass(frozen=True, kw_only=True)
class Flux:
    """The sides of a FLUX transformer, in features, heads and blocks."""

    inputs: int
    outputs: int
    double: int
    single: int
    heads: int
    head: int
    text: int
    pooled: int
    guided: bool

    @property
    def width(self) -> int:
        return self.heads * self.head

    @property
    def blocks(self) -> tuple[str, ...]:
        """Names in the order of the forward pass."""
        double = (f"transformer_blocks.{k}" for k in range(self.double))
        single = (f"single_transformer_blocks.{k}" for k in range(self.single))
        return (*double, *single)

    @cached_property
    def linear(self) -> dict[str, Sides]:
        """All linear layers by name, each with a bias."""
        w = self.width
        embedders = {"timestep_embedder": 256, "text_embedder": self.pooled}
        if self.guided:
            embedders["guidance_embedder"] = 256
        found = {"x_embedder": (self.inputs, w), "context_embedder": (self.text, w)}
        for name, size in embedders.items():
            found[f"time_text_embed.{name}.linear_1"] = (size, w)
            found[f"time_text_embed.{name}.linear_2"] = (w, w)
        for block in self.blocks:
            inside = single_block(w) if block.startswith("single") else double_block(w)
            found |= {f"{block}.{name}": sides for name, sides in inside.items()}
        return found | {"norm_out.linear": (w, 2 * w), "proj_out": (w, self.outputs)}

    @property
    def norms(self) -> int:
        """Parameters of the norms of queries and keys."""
        return self.head * (4 * self.double + 2 * self.single)

    @property
    def parameters(self) -> int:
        return self.norms + sum((i + 1) * o for i, o in self.linear.values())


def flux(settings: Mapping[str, Any]) -> Flux:
    """From a transformer's `config.json`; what it does not say is diffusers' default."""
    inputs = int(settings.get("in_channels", 64))
    return Flux(
        inputs=inputs,
        outputs=int(settings.get("patch_size", 1)) ** 2
        * int(settings.get("out_channels") or inputs),
        double=int(settings.get("num_layers", 19)),
        single=int(settings.get("num_single_layers", 38)),
        heads=int(settings.get("num_attention_heads", 24)),
        head=int(settings.get("attention_head_dim", 128)),
        text=int(settings.get("joint_attention_dim", 4096)),
        pooled=int(settings.get("pooled_projection_dim", 768)),
        guided=bool(settings.get("guidance_embeds", False)),
    )


def double_block(w: int) -> dict[str, Sides]:
    attention = "to_q to_k to_v add_q_proj add_k_proj add_v_proj to_out.0 to_add_out".split()
    return {
        "norm1.linear": (w, 6 * w),
        "norm1_context.linear": (w, 6 * w),
        **{f"attn.{name}": (w, w) for name in attention},
        **{f"{ff}.net.0.proj": (w, 4 * w) for ff in ("ff", "ff_context")},
        **{f"{ff}.net.2": (4 * w, w) for ff in ("ff", "ff_context")},
    }


def single_block(w: int) -> dict[str, Sides]:
    return {
        "norm.linear": (w, 3 * w),
        **{f"attn.{name}": (w, w) for name in ("to_q", "to_k", "to_v")},
        "proj_mlp": (w, 4 * w),
        "proj_out": (5 * w, w),
    }


def t5_parameters(settings: Mapping[str, Any]) -> int:
    """Of T5's encoder, whose token embeddings are counted once."""
    w, inner = settings["d_model"], settings["num_heads"] * settings["d_kv"]
    gated = str(settings["feed_forward_proj"]).startswith("gated")
    layer = 4 * w * inner + (3 if gated else 2) * w * settings["d_ff"] + 2 * w
    biases = settings["relative_attention_num_buckets"] * settings["num_heads"]
    return int(settings["vocab_size"] * w + settings["num_layers"] * layer + biases + w)


def clip_parameters(settings: Mapping[str, Any]) -> int:
    """Of CLIP's text encoder, without the projection that FLUX does not read."""
    w, inner = settings["hidden_size"], settings["intermediate_size"]
    layer = 4 * (w + 1) * w + (w + 1) * inner + (inner + 1) * w + 4 * w
    tokens = settings["vocab_size"] + settings["max_position_embeddings"]
    return int(tokens * w + settings["num_hidden_layers"] * layer + 2 * w)


def vae_parameters(settings: Mapping[str, Any]) -> int:
    """Of an `AutoencoderKL` of plain down and up blocks."""
    widths, latent = settings["block_out_channels"], settings["latent_channels"]
    depth, colours = settings.get("layers_per_block", 1), settings.get("in_channels", 3)
    found = 0
    for ends, layers, outer, codes in (
        (widths, depth, colours, 2 * latent),  # the encoder, mean and variance
        (widths[::-1], depth + 1, latent, settings.get("out_channels", 3)),
    ):
        found += _conv(outer, ends[0]) + 2 * ends[-1] + _conv(ends[-1], codes)
        for before, after in zip((ends[0], *ends), ends, strict=False):
            found += _resnet(before, after) + (layers - 1) * _resnet(after, after)
        found += sum(_conv(width, width) for width in ends[:-1])
        middle = widths[-1]
        found += 2 * _resnet(middle, middle)
        if settings.get("mid_block_add_attention", True):
            found += 2 * middle + 4 * (middle + 1) * middle
    if settings.get("use_quant_conv", True):
        found += (2 * latent + 1) * 2 * latent
    if settings.get("use_post_quant_conv", True):
        found += (latent + 1) * latent
    return int(found)


def _conv(inputs: int, outputs: int, side: int = 3) -> int:
    return (side * side * inputs + 1) * outputs


def _resnet(inputs: int, outputs: int) -> int:
    """Two norms and convolutions, and a shortcut where the width changes."""
    shortcut = _conv(inputs, outputs, 1) if inputs != outputs else 0
    return 2 * (inputs + outputs) + _conv(inputs, outputs) + _conv(outputs, outputs) + shortcut


PARAMETERS: dict[Other, Callable[[Mapping[str, Any]], int]] = {
    "text_encoder": clip_parameters,
    "text_encoder_2": t5_parameters,
    "vae": vae_parameters,
}


def parameters_of(name: str, network: Other) -> int:
    """Parameters of one of the other networks of a model, see `settings_of`."""
    try:
        return PARAMETERS[network](settings_of(name, network))
    except (KeyError, TypeError) as error:
        raise UserError(
            f"model {name!r}: {network}/config.json does not tell its size: {error}"
        ) from None


def text_tokens_of(name: str) -> int:
    """T5 tokens of a prompt: the folder's tokenizer's, at most FLUX's."""
    path = (BASE if name == TINY else Path(name)) / "tokenizer_2" / "tokenizer_config.json"
    if not path.is_file():
        return MAX_TEXT_TOKENS
    longest = checked(path, TokenizerFile, "no settings of a tokenizer").get("model_max_length")
    return min(int(longest or MAX_TEXT_TOKENS), MAX_TEXT_TOKENS)
