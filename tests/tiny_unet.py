"""A second family of models, for tests: one image from one text, a UNet of diffusers.

Nothing in the package knows it. It shows what a family consists of: a value of `base.Backbone`, a
value of `base.Networks` and a class with the methods of `base.Models`. Weights are random.
Axes: b samples, n tokens, c channels, h w latents.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from einops import rearrange
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from visualcloze_deft.backbones.base import Activations, Backbone, Load, Networks
from visualcloze_deft.backbones.structure import Structure, structure_of, without_values
from visualcloze_deft.config.run_settings import Adapter
from visualcloze_deft.diffusion.process import Process
from visualcloze_deft.errors import UserError
from visualcloze_deft.grids.grid import Grid
from visualcloze_deft.grids.prompt import Prompt
from visualcloze_deft.paths import BASE

NAME = "tiny-unet"
TIMES = 1000
PARTS = ("unet", "vae", "text_encoder", "tokenizer")
WORDS = 77


def write_tiny_unet(folder: Path) -> Path:
    """A model of this family with random weights, in diffusers' format."""
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(BASE, subfolder="tokenizer")
    settings = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=WORDS,
    )
    unet = UNet2DConditionModel(
        sample_size=4,
        layers_per_block=1,
        block_out_channels=(16,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        cross_attention_dim=16,
        attention_head_dim=8,
        norm_num_groups=4,
    )
    vae = AutoencoderKL(
        block_out_channels=(8,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
    )
    for name, part in zip(PARTS, (unet, vae, CLIPTextModel(settings), tokenizer), strict=True):
        part.save_pretrained(folder / name)
    return folder


# The process: noise is predicted (Ho et al. 2020, arXiv 2006.11239), steps are DDIM's (Song et al.
# 2021, arXiv 2010.02502, equation 12, without new noise)

BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, TIMES) ** 2
SIGNAL = torch.cat([torch.ones(1), (1 - BETAS).cumprod(0)])


def signal(t: Tensor) -> Tensor:
    """What of the clean latents is left at times t (b,) in 0..1: alpha bar (b, 1, 1)."""
    return SIGNAL.to(t.device)[(t * TIMES).round().long()].view(-1, 1, 1)


def corrupt(clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    left = signal(t)
    return left.sqrt() * clean + (1 - left).sqrt() * noise


def step(x: Tensor, noise: Tensor, now: Tensor, then: Tensor) -> Tensor:
    before, after = signal(now), signal(then)
    clean = (x - (1 - before).sqrt() * noise) / before.sqrt()
    return after.sqrt() * clean + (1 - after).sqrt() * noise


DDIM = Process(corrupt=corrupt, target=lambda clean, noise, t: noise, step=step)


# The model


@dataclass(frozen=True, kw_only=True)
class Words:
    """States of the text encoder (b, l, d)."""

    states: Tensor

    def some(self, places: Sequence[int]) -> Words:
        return Words(states=self.states[list(places)])


@dataclass(frozen=True, kw_only=True)
class Picture:
    """Latents of whole pictures (b, n, 4), all to be generated. side: of a picture, in latents."""

    clean: Tensor
    side: int

    @property
    def is_target(self) -> Tensor:
        return torch.ones_like(self.clean[..., 0])

    def some(self, places: Sequence[int]) -> Picture:
        return replace(self, clean=self.clean[list(places)])


@dataclass(frozen=True, kw_only=True)
class Models:
    name: str
    resolution: int
    device: torch.device
    denoiser: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    encodings: None = None

    @property
    def networks(self) -> Networks:
        return NETWORKS

    @property
    def process(self) -> Process:
        return DDIM

    @property
    def guidance(self) -> float:
        return 1.0

    @property
    def frozen(self) -> tuple[nn.Module, ...]:
        return self.vae, self.text_encoder

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[Prompt | str]) -> Words:
        """What a picture shows: this family has no grid to speak of."""
        said = [one if isinstance(one, str) else one.content for one in prompts]
        ids = self.tokenizer(
            said, padding="max_length", max_length=WORDS, truncation=True, return_tensors="pt"
        ).input_ids
        return Words(states=self.text_encoder(ids.to(self.device)).last_hidden_state)

    @torch.no_grad()
    def encode_grids(
        self,
        grids: Sequence[Grid],
        *,
        clean: bool,
        draws: Sequence[torch.Generator] | None = None,
    ) -> Picture:
        pixels = torch.stack([grid.strips[0] if clean else grid.seen[0] for grid in grids])
        latents = self.vae.encode(pixels.to(self.device)).latent_dist.mode()
        latents = latents * self.vae.config.scaling_factor
        return Picture(clean=rearrange(latents, "b c h w -> b (h w) c"), side=latents.shape[-1])

    @torch.no_grad()
    def decode_query(self, tokens: Tensor, grids: Sequence[Grid]) -> Tensor:
        side = grids[0].shape[0][1] // 8
        latents = rearrange(tokens, "b (h w) c -> b c h w", w=side)
        pixels: Tensor = self.vae.decode(latents / self.vae.config.scaling_factor).sample
        return pixels

    def times(self, steps: int, tokens: int) -> Tensor:
        return torch.linspace(1, 0, steps + 1)


def predict(
    unet: UNet2DConditionModel,
    latents: Picture,
    noisy: Tensor,
    t: Tensor,
    /,
    *,
    text: Words,
    guidance: float,
) -> Tensor:
    """The noise (b, n, 4) in noisy latents; guidance is not for so small a model."""
    maps = rearrange(noisy, "b (h w) c -> b c h w", w=latents.side)
    found = unet(
        maps, (t * TIMES).round().long(), encoder_hidden_states=text.states, return_dict=False
    )
    return rearrange(found[0], "b c h w -> b (h w) c")


def probe(unet: UNet2DConditionModel, random: torch.Generator) -> Mapping[str, Any]:
    width = unet.config.cross_attention_dim
    return {
        "sample": torch.randn(1, 4, 4, 4, generator=random),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 8, width, generator=random),
    }


def load_unet(name: str, *, dtype: torch.dtype, **_: object) -> UNet2DConditionModel:
    unet = UNet2DConditionModel.from_pretrained(name, subfolder="unet", torch_dtype=dtype)
    found: UNet2DConditionModel = unet.eval()
    return found


def load(
    name: str, *, dtype: torch.dtype = torch.float32, device: str = "cpu", **_: object
) -> Models:
    return Models(
        name=name,
        resolution=32,
        device=torch.device(device),
        denoiser=load_unet(name, dtype=dtype).to(device),
        vae=AutoencoderKL.from_pretrained(name, subfolder="vae").to(device).eval(),
        text_encoder=CLIPTextModel.from_pretrained(name, subfolder="text_encoder").to(device),
        tokenizer=CLIPTokenizer.from_pretrained(name, subfolder="tokenizer"),
    )


NETWORKS = Networks(
    load=load,
    load_encoders=load,
    load_denoiser=load_unet,
    predict=predict,
    probe=probe,
)


# What files tell


@dataclass(frozen=True, kw_only=True)
class Sizes(Structure):
    width: int = 16
    heads: int = 2
    head: int = 8


INNER = r"attentions\.\d+\.transformer_blocks\.\d+"
BLOCKS = (  # the first of the middle is never recomputed
    rf"(down|up)_blocks\.\d+\.(resnets\.\d+|{INNER})|mid_block\.(resnets\.[1-9]\d*|{INNER})"
)


@cache
def sizes(name: str) -> Sizes:
    settings = UNet2DConditionModel.load_config(name, subfolder="unet")
    unet = without_values(lambda: UNet2DConditionModel.from_config(settings))
    return Sizes(**vars(structure_of(unet, BLOCKS)))


def check(name: str, **_: object) -> None:
    for part in PARTS:
        if not (Path(name) / part).is_dir():
            raise UserError(f"model {name!r}: no {part}/")


def activations(
    model: Sizes, _: Adapter, adapted: Collection[str], load: Load, size: int
) -> Activations:
    values = load.tokens * model.width * size
    return Activations(
        blocks=(8 * values * len(adapted),) * len(model.blocks),
        factors=(0,) * len(model.blocks),
        entry=values,
        outside=values,
        positions=0,
        batch=values,
        work=8 * values,
    )


def encoders(name: str) -> Mapping[str, int]:
    files = {part: Path(name, part, "config.json").read_text("utf-8") for part in PARTS[1:3]}
    return {part: 1000 * len(json.loads(text)) for part, text in files.items()}


TINY_UNET = Backbone(
    name=NAME,
    denoiser="unet",
    recognises=lambda kind, _: kind == "UNet2DConditionModel",
    check=check,
    refuses=lambda rows, columns, targets: (
        None if rows == columns == targets == 1 else "it makes one picture from one text"
    ),
    blocks=BLOCKS,
    target_modules=r".*attn[12]\.(to_q|to_k|to_v|to_out\.0)",
    resolution=lambda name: 32,
    sizes=sizes,
    text_tokens=lambda name: WORDS,
    encoders=encoders,
    vae=lambda name: AutoencoderKL.load_config(name, subfolder="vae"),
    activations=activations,
    features=frozenset(),
    networks=lambda: NETWORKS,
)
