"""Keys and values of context: what examples, known cells and text are to FLUX's attention.

A step of sampling changes the target's tokens; those of text and known cells hardly change. A full
call of the transformer keeps their keys and values in all layers. A call of the target's tokens
alone then attends to them. The transformer is diffusers' own: one attention processor for each
layer writes and reads, and each call hands it what to do.

Axes: b batch, n tokens, m tokens of targets, l text tokens, h heads, d features of a head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxAttnProcessor
from torch import Tensor

from visualcloze_deft.backbones.flux_fill.model import predict_velocity
from visualcloze_deft.backbones.flux_fill.packing import FluxText, Latents
from visualcloze_deft.errors import UserError

RESTING_GUIDANCE = 1.0  # that a context without noise is told, as in training without guidance
KeysValues = tuple[Tensor, Tensor]  # (b, n, h, d) each
Kept = Mapping[object, KeysValues]  # by layer, which is known by its processor


class Context(Protocol):
    """What one call of the transformer does with the keys and values of its layers."""

    def through(self, layer: object, keys: Tensor, values: Tensor) -> KeysValues:
        """Told a layer's keys and values, returns those that its queries attend to.

        It is left out of compiled blocks: they would be compiled anew for each layer.
        """


@dataclass(frozen=True, kw_only=True)
class Keep:
    """Keeps the keys and values at `places`, of all layers in `kept`.

    A layer that is computed again, as gradient checkpointing does, keeps its first ones.
    """

    places: Tensor | slice
    kept: dict[object, KeysValues] = field(default_factory=dict)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def through(self, layer: object, keys: Tensor, values: Tensor) -> KeysValues:
        if layer not in self.kept:
            self.kept[layer] = keys[:, self.places], values[:, self.places]
        return keys, values


@dataclass(frozen=True, kw_only=True)
class Attend:
    """Attends to what was kept, and to the call's own tokens."""

    kept: Kept

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def through(self, layer: object, keys: Tensor, values: Tensor) -> KeysValues:
        of_context = self.kept[layer]
        return torch.cat([of_context[0], keys], dim=1), torch.cat([of_context[1], values], dim=1)


class ContextAttention(FluxAttnProcessor):  # type: ignore[misc]
    """FLUX's attention in one layer, with a context where a call has one; else diffusers' own."""

    def __call__(
        self,
        attn: FluxAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        context: Context | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """hidden_states: (b, n, c) of images, in single blocks after those of text.
        encoder_hidden_states: (b, l, c) of text in double blocks."""
        if context is None:
            made: Tensor | tuple[Tensor, Tensor] = super().__call__(
                attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb
            )
            return made
        parts = [projected(attn, hidden_states)]
        if encoder_hidden_states is not None:
            parts.insert(0, projected_text(attn, encoder_hidden_states))
        queries, keys, values = (torch.cat(each, dim=1) for each in zip(*parts, strict=True))
        if image_rotary_emb is not None:
            queries = apply_rotary_emb(queries, image_rotary_emb, sequence_dim=1)
            keys = apply_rotary_emb(keys, image_rotary_emb, sequence_dim=1)
        keys, values = context.through(self, keys, values)
        mixed = dispatch_attention_fn(
            queries,
            keys,
            values,
            attn_mask=attention_mask,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        mixed = mixed.flatten(2, 3).to(queries.dtype)
        if encoder_hidden_states is None:
            return mixed
        text, images = mixed.tensor_split([encoder_hidden_states.shape[1]], dim=1)
        out, dropout = attn.to_out
        return dropout(out(images.contiguous())), attn.to_add_out(text.contiguous())


def projected(attn: FluxAttention, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(b, n, c) to queries, keys and values (b, n, h, d) of images."""
    if attn.fused_projections:
        made = attn.to_qkv(hidden).chunk(3, dim=-1)
    else:
        made = attn.to_q(hidden), attn.to_k(hidden), attn.to_v(hidden)
    query, key, value = (one.unflatten(-1, (-1, attn.head_dim)) for one in made)
    return attn.norm_q(query), attn.norm_k(key), value


def projected_text(attn: FluxAttention, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same for text, which has layers of its own in double blocks."""
    if attn.fused_projections:
        made = attn.to_added_qkv(hidden).chunk(3, dim=-1)
    else:
        made = attn.add_q_proj(hidden), attn.add_k_proj(hidden), attn.add_v_proj(hidden)
    query, key, value = (one.unflatten(-1, (-1, attn.head_dim)) for one in made)
    return attn.norm_added_q(query), attn.norm_added_k(key), value


def read_contexts(transformer: FluxTransformer2DModel) -> None:
    """Give each layer of `transformer` a processor that knows contexts; they stay, and change
    nothing where a call has none.

    Raises `UserError` where a layer has another processor than FLUX's own.
    """
    old = transformer.attn_processors
    if all(isinstance(one, ContextAttention) for one in old.values()):
        return
    for name, processor in old.items():
        if type(processor) not in (FluxAttnProcessor, ContextAttention):
            raise UserError(
                f"context: {name} is {type(processor).__name__}, which computes attention in a way "
                "of its own; unload what set it, or use a full context"
            )
    new = {name: ContextAttention() for name in old}
    for name, own in new.items():
        own._attention_backend = old[name]._attention_backend
        own._parallel_config = old[name]._parallel_config
    transformer.set_attn_processor(new)


class ContextCache:
    """The transformer for samples of one shape whose targets are at the same places, see
    `base.ContextCache`."""

    def __init__(
        self,
        transformer: FluxTransformer2DModel,
        latents: Latents,
        *,
        text: FluxText,
        guidance: float,
        kept: Kept | None = None,
    ) -> None:
        """kept: what a call before kept of the same samples."""
        hidden = latents.is_target[0] > 0
        if not torch.equal(latents.is_target > 0, hidden.expand(len(latents.clean), -1)):
            raise ValueError("samples with targets at different places")
        read_contexts(transformer)
        self.transformer = transformer
        self.latents = latents
        self.text = text
        self.guidance = guidance
        self.targets = hidden.nonzero().flatten()
        self.known = (~hidden).nonzero().flatten()
        self.kept = kept or {}

    def some(self, places: Sequence[int]) -> ContextCache:
        chosen = list(places)
        return ContextCache(
            self.transformer,
            self.latents.some(chosen),
            text=self.text.some(chosen),
            guidance=self.guidance,
            kept={layer: (pick(k, chosen), pick(v, chosen)) for layer, (k, v) in self.kept.items()},
        )

    def full(self, noisy: Tensor, t: Tensor) -> Tensor:
        length = self.text.text.shape[1]
        of_text = torch.arange(length, device=self.known.device)
        context = Keep(places=torch.cat([of_text, self.known + length]))
        everything = torch.arange(noisy.shape[1], device=noisy.device)
        made = self._call(noisy, everything, t, self.text.text, context)
        self.kept = context.kept
        return made

    def prefill(self) -> None:
        seen = self.latents.seen
        context = Keep(places=slice(None))
        at_rest = seen.new_zeros(len(seen), dtype=torch.float32)
        self._call(seen, self.known, at_rest, self.text.text, context, guidance=RESTING_GUIDANCE)
        self.kept = context.kept

    def active(self, noisy: Tensor, t: Tensor) -> Tensor:
        nothing = self.text.text[:, :0]
        return self._call(noisy, self.targets, t, nothing, Attend(kept=self.kept))

    def _call(
        self,
        noisy: Tensor,
        places: Tensor,
        t: Tensor,
        text: Tensor,
        context: Context,
        *,
        guidance: float | None = None,
    ) -> Tensor:
        """The velocity of the image tokens at `places`."""
        return predict_velocity(
            self.transformer,
            self.latents.inputs(noisy)[:, places],
            t,
            ids=self.latents.ids[places],
            text=text,
            pooled=self.text.pooled,
            guidance=self.guidance if guidance is None else guidance,
            context=context,
        )


def pick(kept: Tensor, places: Sequence[int]) -> Tensor:
    """Of (b, n, h, d) the samples at `places`; the only one several times takes no more memory."""
    return kept.expand(len(places), -1, -1, -1) if len(kept) == 1 else kept[list(places)]
