"""The seven components of FLUX.1-Fill as one value: text, latents, velocity.

Axes: b batch, n tokens, l text tokens, d text width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from visualcloze_deft.backbones.base import Networks
from visualcloze_deft.backbones.embedding_cache import Encodings
from visualcloze_deft.backbones.flux_fill import packing
from visualcloze_deft.backbones.flux_fill.clip_text import clip_text, fits, unread
from visualcloze_deft.backbones.flux_fill.files import CHANNELS
from visualcloze_deft.backbones.flux_fill.layers import MAX_TEXT_TOKENS
from visualcloze_deft.backbones.flux_fill.packing import FluxText
from visualcloze_deft.diffusion import timesteps
from visualcloze_deft.diffusion.flow import FLOW
from visualcloze_deft.diffusion.process import Process
from visualcloze_deft.grids.grid import Grid
from visualcloze_deft.grids.prompt import ClipText, Prompt

CPU = torch.device("cpu")
LATENTS = CHANNELS[1] // 4  # channels of the VAE's, of which a token holds 2 x 2
CLIP_TOKENS = 77  # CLIP's default
GUIDANCE = 30.0  # VisualCloze's sampling setting
SPARE = 128  # embeddings that T5 may have beyond its tokens: a round number on accelerators
NONE: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, kw_only=True)
class Encoders:
    """VAE and text encoders, named as in diffusers, which may rest elsewhere than they work.

    device: where they work and give their results. encodings: where results are kept and looked up.
    A VAE in float16 is turned to float32, in place and for good: its activations leave the range of
    float16, and pictures come out as NaN. That is diffusers' `force_upcast`.
    """

    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    text_encoder_2: T5EncoderModel
    tokenizer: CLIPTokenizer
    tokenizer_2: T5TokenizerFast
    clip_text: ClipText = "fit"
    device: torch.device = CPU
    encodings: Encodings | None = None

    def __post_init__(self) -> None:
        upcast(self.vae)

    @property
    def text_length(self) -> int:
        """T5 tokens of a prompt; longer ones are cut, shorter ones padded."""
        return text_length(self.tokenizer_2)

    def read_by_clip(self, prompt: Prompt | str) -> str:
        """What CLIP is given of `prompt`, see `clip_text.clip_text`."""
        if isinstance(prompt, str):
            return prompt
        return clip_text(prompt, fits(self.tokenizer), self.clip_text)

    def unread(self, prompt: Prompt | str) -> dict[str, str]:
        """The words that do not fit: by encoder, "T5" and "CLIP", where there are any."""
        found = {
            "T5": unread(self.tokenizer_2, str(prompt), self.text_length),
            "CLIP": unread(
                self.tokenizer, self.read_by_clip(prompt), self.tokenizer.model_max_length
            ),
        }
        return {encoder: words for encoder, words in found.items() if words}

    @property
    def frozen(self) -> tuple[nn.Module, ...]:
        return self.text_encoder, self.text_encoder_2, self.vae

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[Prompt | str]) -> FluxText:
        """T5's tokens and CLIP's pooled vector, without attention masks, as FLUX."""
        t5 = self.tokenizer_2(
            [str(prompt) for prompt in prompts],
            padding="max_length",
            max_length=self.text_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        clip = self.tokenizer(
            [self.read_by_clip(prompt) for prompt in prompts],
            padding="max_length",
            truncation=True,
            return_tensors="pt",
        ).input_ids
        text, pooled = self.text_encoder_2, self.text_encoder
        return FluxText(
            self.encoded(text, t5, lambda ids: text(ids, return_dict=True).last_hidden_state),
            self.encoded(pooled, clip, lambda ids: pooled(ids, return_dict=True).pooler_output),
        )

    @torch.no_grad()
    def encode_pixels(
        self, strips: Tensor, draws: Sequence[torch.Generator] | None = None
    ) -> Tensor:
        """(b, 3, H, W) in -1..1 to (b, c, h, w), shifted and scaled as FLUX's latents: the mode, or
        drawn with one of `draws` for each strip."""
        config, strips = self.vae.config, strips.to(precision(self.vae))

        def scaled(latents: Tensor) -> Tensor:
            return (latents - config.shift_factor) * config.scaling_factor

        if draws is None:
            return self.encoded(
                self.vae, strips, lambda x: scaled(self.vae.encode(x).latent_dist.mode())
            )
        with at_work(self.vae, self.device):
            drawn = [
                self.vae.encode(one.to(self.device)).latent_dist.sample(draw)
                for one, draw in zip(strips.split(1), draws, strict=True)
            ]
        return scaled(torch.cat(drawn))

    def encode_grids(
        self,
        grids: Sequence[Grid],
        *,
        clean: bool,
        draws: Sequence[torch.Generator] | None = None,
    ) -> packing.Latents:
        """Grids of one shape to tokens. Without `clean`, the complete strips are not encoded: where
        they are not known (inference), `Latents.clean` is what is seen. draws: one for each grid,
        to draw what is seen from the encoder's distribution; its mode by default."""
        shape = grids[0].shape
        seen, complete, mask = [], [], []
        for row in range(len(shape)):
            shown = torch.stack([g.seen[row] for g in grids])
            hidden = torch.stack([g.hidden[row] for g in grids])
            seen.append(packing.pack(self.encode_pixels(shown, draws)))
            mask.append(packing.pack_mask(hidden.to(seen[-1])))
            if clean and hidden.any():
                strips = torch.stack([g.strips[row] for g in grids])
                complete.append(packing.pack(self.encode_pixels(strips)))
            else:
                complete.append(seen[-1])
        return packing.Latents(
            clean=torch.cat(complete, dim=1),
            seen=torch.cat(seen, dim=1),
            mask=torch.cat(mask, dim=1),
            ids=packing.position_ids(shape).to(seen[0].device),
        )

    def decode_query(self, tokens: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Clean tokens (b, n, 64) to the pixels (b, 3, h, w) of the last row alone."""
        return self.decode_latents(packing.unpack(tokens, grids[0].shape)[-1])

    def encoded(
        self, network: nn.Module, inputs: Tensor, encode: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """`inputs` (b, ...) through `network` with `encode`, but for what `encodings` has.

        What goes there is encoded one by one: convolutions and products of matrices may round
        otherwise in a batch of another size, and an entry is not to depend on what came with it.
        """

        def together(several: Tensor) -> Tensor:
            with at_work(network, self.device):
                return encode(several.to(self.device))

        def one_by_one(several: Tensor) -> Tensor:
            with at_work(network, self.device):
                return torch.cat([encode(one.to(self.device)) for one in several.split(1)])

        if self.encodings is None:
            return together(inputs)
        return self.encodings.through(network, inputs, one_by_one).to(self.device)

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """The inverse of `encode_pixels`, in float32."""
        config = self.vae.config
        latents = latents.to(precision(self.vae)) / config.scaling_factor + config.shift_factor
        with at_work(self.vae, self.device):
            return self.vae.decode(latents).sample.float()


@dataclass(frozen=True, kw_only=True)
class Models(Encoders):
    """All components. `resolution`: the side of a square cell in pixels."""

    name: str
    transformer: FluxTransformer2DModel
    scheduler: FlowMatchEulerDiscreteScheduler
    resolution: int

    @property
    def denoiser(self) -> FluxTransformer2DModel:
        return self.transformer

    @property
    def networks(self) -> Networks:
        from visualcloze_deft.backbones.flux_fill.networks import NETWORKS  # which loads `Models`

        return NETWORKS

    @property
    def process(self) -> Process:
        return FLOW

    @property
    def guidance(self) -> float:
        return GUIDANCE

    def times(self, steps: int, tokens: int) -> Tensor:
        """The (steps + 1,) sampling times for a grid of `tokens` tokens."""
        config = self.scheduler.config
        mu = timesteps.shift_of(
            tokens,
            base=config.base_shift,
            maximum=config.max_shift,
            base_tokens=config.base_image_seq_len,
            max_tokens=config.max_image_seq_len,
        )
        return timesteps.schedule(steps, mu)


def precision(network: nn.Module) -> torch.dtype:
    """Of its weights. diffusers' `dtype` takes a millisecond: it asks every module for hooks."""
    return next(network.parameters()).dtype


def vae_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision of the VAE in a model of `dtype`, see `Encoders`."""
    return torch.float32 if dtype == torch.float16 else dtype


def upcast(vae: AutoencoderKL | None) -> None:
    """Turn float16 weights to `vae_dtype`; others stay."""
    if vae is not None and precision(vae) == torch.float16:
        vae.to(vae_dtype(torch.float16))


@contextmanager
def at_work(network: nn.Module, device: torch.device) -> Iterator[None]:
    """`network` on `device`, and back where it rests; hooks that offload it do so themselves."""
    rest = next(network.parameters()).device
    there = rest.type == device.type and device.index in (None, rest.index)
    if there or any(
        hasattr(m, "_hf_hook") or hasattr(m, "_diffusers_hook") for m in network.modules()
    ):
        yield
        return
    network.to(device)
    try:
        yield
    finally:
        network.to(rest)


def text_length(tokenizer: T5TokenizerFast) -> int:
    """How many of T5's tokens the transformer reads; a small model may have fewer than FLUX."""
    return min(int(tokenizer.model_max_length), MAX_TEXT_TOKENS)


def predict(
    transformer: nn.Module,
    latents: packing.Latents,
    noisy: Tensor,
    t: Tensor,
    *,
    text: FluxText,
    guidance: float,
) -> Tensor:
    """The transformer's velocity (b, n, 64) for `noisy` tokens at times t (b,) in 0..1."""
    return predict_velocity(
        transformer, latents.inputs(noisy), t, ids=latents.ids, **text._asdict(), guidance=guidance
    )


def predict_velocity(
    transformer: nn.Module,
    inputs: Tensor,
    t: Tensor,
    *,
    ids: Tensor,
    text: Tensor,
    pooled: Tensor,
    guidance: float,
    context: Any = None,
) -> Tensor:
    """The transformer's velocity (b, n, 64) for inputs (b, n, 384) at times t (b,) in 0..1. text is
    in the transformer's precision. context: see `context.CallContext`."""
    predicted: Tensor = transformer(
        hidden_states=inputs.to(text.dtype),
        timestep=t.to(text.dtype),
        guidance=torch.full_like(t, guidance),
        pooled_projections=pooled,
        encoder_hidden_states=text,
        txt_ids=torch.zeros(text.shape[1], 3, device=inputs.device),
        img_ids=ids,
        joint_attention_kwargs=None if context is None else {"context": context},
        return_dict=False,
    )[0]
    return predicted


def probe(transformer: FluxTransformer2DModel, random: torch.Generator) -> dict[str, Any]:
    """Random inputs of one sample: 4 x 8 image tokens and 8 of text."""
    config, dtype = transformer.config, transformer.dtype

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random).to(dtype)

    positions = torch.cartesian_prod(torch.arange(1, 2), torch.arange(4), torch.arange(8))
    return {
        "hidden_states": draw(1, 32, config.in_channels),
        "timestep": torch.full((1,), 0.7, dtype=dtype),
        "guidance": torch.full((1,), 30.0, dtype=dtype),
        "pooled_projections": draw(1, config.pooled_projection_dim),
        "encoder_hidden_states": draw(1, 8, config.joint_attention_dim),
        "txt_ids": torch.zeros(8, 3),
        "img_ids": positions.float(),
    }
