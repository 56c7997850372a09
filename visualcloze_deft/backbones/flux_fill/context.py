"""Keys and values of context: what examples, known cells and text are to FLUX's attention.

A step of sampling changes the target's tokens; those of text and known cells hardly change. A full
call of the transformer keeps their keys and values in all layers. A call of the target's tokens
alone then attends to them. The transformer is diffusers' own: one attention processor for each
layer writes and reads, and each call hands it what to do.

Axes: b batch, n tokens, m tokens of targets, l text tokens, h heads, d features of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field

import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxAttnProcessor
from torch import Tensor

from visualcloze_deft.backbones.base import Part
from visualcloze_deft.backbones.flux_fill.model import predict_velocity
from visualcloze_deft.backbones.flux_fill.packing import FluxText, Latents
from visualcloze_deft.errors import UserError


@dataclass(frozen=True, kw_only=True)
class CallContext:
    """What one call of the transformer does with the keys and values of its layers: its queries
    also attend to those of the parts `before`; its own, at `places`, are put into `kept`.

    A layer that is computed again, as gradient checkpointing does, keeps its first ones; it must
    do the same operations then.
    """

    before: tuple[Part, ...] = ()
    places: Tensor | slice | None = None
    kept: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    # Left out of compiled blocks: they would be compiled anew for each layer.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def through(
        self, layer: ContextAttention, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Told a layer's keys and values, returns those that its queries attend to."""
        if self.places is not None:
            self.kept.setdefault(layer.name, (keys[:, self.places], values[:, self.places]))
        parts = [part[layer.name] for part in self.before]
        return joined([k for k, _ in parts], keys), joined([v for _, v in parts], values)


def joined(before: Sequence[Tensor], own: Tensor) -> Tensor:
    """(b, n, h, d) one after the other; those of one sample serve all."""
    if not before:
        return own
    return torch.cat([*(one.expand(len(own), -1, -1, -1) for one in before), own], dim=1)


class ContextAttention(FluxAttnProcessor):  # type: ignore[misc]
    """FLUX's attention in one layer, with a context where a call has one; else diffusers' own."""

    def __init__(self, name: str) -> None:
        """name: of the layer."""
        super().__init__()
        self.name = name

    def __call__(
        self,
        attn: FluxAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        context: CallContext | None = None,
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
    new = {name: ContextAttention(name) for name in old}
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
    ) -> None:
        every = (latents.is_target > 0).cpu()  # asked once: a GPU would be waited for each time
        hidden, rows = every[0], latents.ids[:, 0].cpu()
        if not torch.equal(every, hidden.expand_as(every)):
            raise ValueError("samples with targets at different places")
        read_contexts(transformer)
        self.transformer = transformer
        self.latents = latents
        self.text = text
        self.guidance = guidance
        self.hidden = hidden
        self.rows = rows
        self.targets = places_of(hidden, latents.seen.device)
        self.known = places_of(~hidden, latents.seen.device)
        self.examples: Part | None = None
        self.rest: Part | None = None

    def some(self, places: Sequence[int]) -> ContextCache:
        chosen = list(places)
        found = copy(self)
        found.latents, found.text = self.latents.some(chosen), self.text.some(chosen)
        found.examples, found.rest = picked(self.examples, chosen), picked(self.rest, chosen)
        return found

    def full(self, noisy: Tensor, t: Tensor) -> Tensor:
        length = self.text.text.shape[1]
        of_text = torch.arange(length, device=self.known.device)
        context = CallContext(places=torch.cat([of_text, self.known + length]))
        everything = torch.arange(noisy.shape[1], device=noisy.device)
        made = self._call(noisy, everything, t, self.text, context)
        self.examples, self.rest = None, context.kept
        return made

    def prefill_examples(self, task: FluxText) -> None:
        context = CallContext(places=slice(task.text.shape[1], None))
        self._prefill(self.rows < self.rows[-1], task, context)
        self.examples = context.kept

    def prefill(self) -> None:
        whole = self.examples is None
        read = torch.ones_like(self.hidden) if whole else self.rows == self.rows[-1]
        of_text = read.new_ones(self.text.text.shape[1])
        context = CallContext(
            before=self._kept(self.examples),
            places=self._at(torch.cat([of_text, ~self.hidden[read]])),
        )
        self._prefill(read, self.text, context)
        self.rest = context.kept

    def active(self, noisy: Tensor, t: Tensor) -> Tensor:
        nothing = FluxText(self.text.text[:, :0], self.text.pooled)
        context = CallContext(before=self._kept(self.examples, self.rest))
        return self._call(noisy, self.targets, t, nothing, context)

    @staticmethod
    def _kept(*parts: Part | None) -> tuple[Part, ...]:
        return tuple(part for part in parts if part is not None)

    def _at(self, marked: Tensor) -> Tensor:
        return places_of(marked, self.latents.seen.device)

    def _prefill(self, read: Tensor, text: FluxText, context: CallContext) -> None:
        """A call of the tokens that `read` marks, at time 1, where all are noise."""
        seen = self.latents.seen
        noise = noise_of(self.rows, seen.shape[-1]).to(seen).expand_as(seen)
        start = seen.new_ones(len(seen), dtype=torch.float32)
        self._call(noise, self._at(read), start, text, context)

    def _call(
        self, noisy: Tensor, places: Tensor, t: Tensor, text: FluxText, context: CallContext
    ) -> Tensor:
        """The velocity of the image tokens at `places`."""
        return predict_velocity(
            self.transformer,
            self.latents.inputs(noisy)[:, places],
            t,
            ids=self.latents.ids[places],
            **text._asdict(),
            guidance=self.guidance,
            context=context,
        )


def places_of(marked: Tensor, device: torch.device) -> Tensor:
    return marked.nonzero().flatten().to(device)


def noise_of(rows: Tensor, channels: int) -> Tensor:
    """(n, c) noise for tokens of these rows (n,), the same each time. That of a row depends on its
    number and length alone, so that examples have theirs whatever the query is."""
    numbers, lengths = rows.unique_consecutive(return_counts=True)
    return torch.cat(
        [
            torch.randn(length, channels, generator=torch.Generator().manual_seed(row))
            for row, length in zip(numbers.int().tolist(), lengths.tolist(), strict=True)
        ]
    )


def picked(part: Part | None, places: Sequence[int]) -> Part | None:
    """The samples at `places`; the only one serves all, and takes no more memory."""
    if part is None:
        return None
    return {
        name: (keys, values) if len(keys) == 1 else (keys[places], values[places])
        for name, (keys, values) in part.items()
    }
