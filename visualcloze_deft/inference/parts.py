"""The parts of a pipeline: which there are, where they work, and how attention is computed."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor

from visualcloze_deft.backbones.attention import Choice, decide
from visualcloze_deft.backbones.attention import use as use_attention
from visualcloze_deft.backbones.attention_check import Shapes
from visualcloze_deft.backbones.embedding_cache import Recent
from visualcloze_deft.backbones.flux_fill.layers import MAX_TEXT_TOKENS
from visualcloze_deft.backbones.flux_fill.model import Models, text_length, upcast
from visualcloze_deft.errors import UserError
from visualcloze_deft.grids.cell_sizes import CELL_STEP
from visualcloze_deft.grids.prompt import Prompt
from visualcloze_deft.inference.arguments import PARTS, TEXT_PARTS

logger = logging.getLogger(__name__)


class PartsMethods:
    """What a pipeline knows of its parts, any of which may be None."""

    transformer: Any
    tokenizer_2: Any
    vae: Any
    config: Any
    encodings: Recent
    attention: Choice
    _execution_device: torch.device

    def need(self, *parts: str) -> None:
        """Raise `UserError` where this pipeline is without one of `parts`."""
        for part in parts:
            if getattr(self, part) is None:
                embeds = ", or give prompt_embeds and pooled_prompt_embeds"
                way = embeds if part in TEXT_PARTS else ""
                raise UserError(f"{part}: this pipeline has none; load it with one{way}")

    @property
    def models(self) -> Models:
        """The parts as one value, their results on the device where they work."""
        return Models(
            **{part: getattr(self, part) for part in PARTS},
            name=self.config.get("_name_or_path") or "",
            resolution=self.config.resolution,
            clip_text=self.config.clip_text,
            device=self.place,
            encodings=self.encodings,
        )

    @property
    def place(self) -> torch.device:
        """Where the parts work. diffusers' search for hooks takes ten milliseconds: only where
        weights may rest elsewhere."""
        if self.transformer is None:
            return self._execution_device
        device = next(self.transformer.parameters()).device
        moved = device.type == "meta" or (device.type == "cpu" and torch.cuda.is_available())
        return self._execution_device if moved else device

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """As diffusers, but that in float16 the VAE is float32, see `model.Encoders`."""
        super().to(*args, **kwargs)  # type: ignore[misc]
        upcast(self.vae)
        return self

    def set_attention(self, attention: str, *, device: str | None = None) -> None:
        """Compute attention with another kernel; `attention` then says which, and why.

        attention: "native", torch's own choice; one of torch's: "cudnn", "flash", "efficient",
        "math"; any other backend of diffusers, flash-attn as "flash_attn"; or "auto": on a GPU the
        fastest of torch's that agrees with plain attention in float32 (grids of 1x2 to 3x3 cells,
        the forward pass alone), on a CPU "native". device: where the transformer works, if its
        weights rest elsewhere; "auto" is decided for it and stays on another one.
        Raises `UserError` where this machine lacks the kernel.
        """
        self.need("transformer")
        config = self.transformer.config
        text = text_length(self.tokenizer_2) if self.tokenizer_2 else MAX_TEXT_TOKENS
        cell = (self.config.resolution // CELL_STEP) ** 2
        shapes = Shapes(
            lengths=(text + 2 * cell, text + 9 * cell),
            heads=config.num_attention_heads,
            width=config.attention_head_dim,
            dtype=self.transformer.dtype,
            device=torch.device(device) if device else self.place,
        )
        self.attention = decide(attention, shapes, passes="forward")
        use_attention(self.transformer, self.attention.backend)
        if self.attention.line:
            logger.info(self.attention.line)

    def encode_prompt(
        self, prompts: str | Prompt | Sequence[str | Prompt]
    ) -> tuple[Tensor, Tensor]:
        """T5's tokens (b, l, d) and CLIP's pooled vector (b, d) of whole prompts, as `__call__`
        takes them as `prompt_embeds` and `pooled_prompt_embeds`."""
        self.need(*TEXT_PARTS)
        several = [prompts] if isinstance(prompts, str | Prompt) else list(prompts)
        return self.models.encode_text(several)
