"""The settings files of FLUX.1-Fill's parts, field by field."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from visualcloze_deft.storage.settings_files import (
    WIDEST,
    Above,
    Blocks,
    Number,
    SettingsFile,
    Side,
    Tokens,
)


class TransformerFile(SettingsFile):
    """diffusers' `FluxTransformer2DModel`, whose defaults stand where a file says nothing."""

    patch_size: Annotated[int, Field(ge=1, le=16)] = 1
    in_channels: Side = 64
    out_channels: Side | None = None
    num_layers: Blocks = 19
    num_single_layers: Blocks = 38
    attention_head_dim: Side = 128
    num_attention_heads: Side = 24
    joint_attention_dim: Side = 4096
    pooled_projection_dim: Side = 768
    guidance_embeds: bool = False
    axes_dims_rope: list[Side] = Field(default=[16, 56, 56])

    @model_validator(mode="after")
    def _of_one_width(self) -> Self:
        if self.num_attention_heads * self.attention_head_dim > WIDEST:
            raise ValueError(f"its heads together have more than {WIDEST} features")
        if len(self.axes_dims_rope) != 3 or sum(self.axes_dims_rope) != self.attention_head_dim:
            raise ValueError("axes_dims_rope are three numbers that add up to attention_head_dim")
        return self


class VaeFile(SettingsFile):
    """diffusers' `AutoencoderKL`."""

    in_channels: Side = 3
    out_channels: Side = 3
    latent_channels: Side = 4
    block_out_channels: Annotated[list[Side], Field(default=[64], min_length=1, max_length=16)]
    layers_per_block: Annotated[int, Field(ge=1, le=100)] = 1
    norm_num_groups: Side = 32
    scaling_factor: Above = 0.18215
    shift_factor: Number | None = None
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True


class ClipFile(SettingsFile):
    """transformers' `CLIPTextConfig`."""

    model_type: Literal["clip_text_model", "clip"] = "clip_text_model"
    vocab_size: Tokens = 49408
    hidden_size: Side = 512
    intermediate_size: Side = 2048
    num_hidden_layers: Blocks = 12
    num_attention_heads: Side = 8
    max_position_embeddings: Tokens = 77


class T5File(SettingsFile):
    """transformers' `T5Config`."""

    model_type: Literal["t5", "mt5"] = "t5"
    vocab_size: Tokens = 32128
    d_model: Side = 512
    d_kv: Side = 64
    d_ff: Side = 2048
    num_layers: Blocks = 6
    num_heads: Side = 8
    relative_attention_num_buckets: Side = 32
    relative_attention_max_distance: Side = 128
    feed_forward_proj: str = "relu"


class SchedulerFile(SettingsFile):
    """diffusers' `FlowMatchEulerDiscreteScheduler`."""

    num_train_timesteps: Side = 1000
    shift: Above = 1.0
    base_shift: Number = 0.5
    max_shift: Number = 1.15
    base_image_seq_len: Tokens = 256
    max_image_seq_len: Tokens = 4096

    @model_validator(mode="after")
    def _of_two_lengths(self) -> Self:
        if self.base_image_seq_len >= self.max_image_seq_len:
            raise ValueError("base_image_seq_len must be below max_image_seq_len")
        return self


class TokenizerFile(SettingsFile):
    """transformers' tokenizers, which write a huge number for a length that is not known."""

    model_max_length: Annotated[int, Field(ge=1)] | Annotated[float, Field(ge=1e9)] = 512


KINDS: dict[str, type[SettingsFile]] = {  # part of a model -> its settings
    "transformer": TransformerFile,
    "vae": VaeFile,
    "text_encoder": ClipFile,
    "text_encoder_2": T5File,
    "scheduler": SchedulerFile,
    "tokenizer": TokenizerFile,
    "tokenizer_2": TokenizerFile,
}
