"""What the backward pass of a step of FLUX's transformer holds, block by block."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, replace

from visualcloze_deft.backbones.base import SINGLE, Activations, Load
from visualcloze_deft.backbones.flux_fill.layers import BLOCKS
from visualcloze_deft.backbones.flux_fill.sizes import Flux
from visualcloze_deft.config.run_settings import Adapter

IN_BLOCK = re.compile(rf"({BLOCKS})\.(.*)")


@dataclass(frozen=True, kw_only=True)
class SavedActivations:
    """Counts what autograd keeps of a block whose layers `wrapped` carry an adapter.

    size: bytes of a value of the base's precision.
    """

    model: Flux
    load: Load
    adapter: Adapter
    wrapped: frozenset[str]
    size: int

    def reads(self, layers: str, rows: int, width: int, *, there: bool = False) -> int:
        """By the adapters of `layers`, which read one (rows, width) tensor. there: whether
        something else keeps that tensor already."""
        count = sum(name in self.wrapped for name in layers.split())
        lora, rank = self.adapter.method == "lora", self.adapter.rank
        own = SINGLE if lora else self.size  # peft's LoRA casts its input to float32
        each = rows * rank * own
        if self.adapter.dropout:
            each += 2 * rows * width * own  # what is left of the tensor, and which values are
        elif own != self.size:
            each += rows * width * own
        elif count and not there:
            return rows * width * own + count * each
        return count * each

    def attention(self, rows: int) -> int:
        """Queries and keys before their norm, in float32, and what the attention itself reads and
        gives: queries, keys, values, output and a logarithm for each head."""
        width, heads = self.model.width, self.model.heads
        return rows * (2 * width * SINGLE + 4 * width * self.size + 3 * heads * SINGLE)

    def modulation(self, layer: str, scales: int, gates: int, rows: int) -> int:
        """Shifts, scales and gates of a norm; what they multiply where they are trained."""
        width, grids = self.model.width, self.load.grids
        found = self.reads(layer, grids, width)
        found += grids * width * (3 * gates + scales) * self.size
        if layer in self.wrapped:
            found += (scales + gates) * rows * width * self.size
        return found + scales * 2 * rows * SINGLE  # mean and deviation

    def double(self, *, first: bool) -> int:
        w, grids = self.model.width, self.load.grids
        found = self.attention(self.load.tokens)
        for tokens, norm, into, out, ff in (
            (self.load.image, "norm1", "attn.to_q attn.to_k attn.to_v", "attn.to_out.0", "ff"),
            (
                self.load.text,
                "norm1_context",
                "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
                "attn.to_add_out",
                "ff_context",
            ),
        ):
            rows = grids * tokens
            found += self.modulation(f"{norm}.linear", 2, 2, rows)
            found += (5 if first else 6) * rows * w * self.size  # into both norms and the GELU
            found += self.reads(into, rows, w)
            found += self.reads(out, rows, w, there=grids == 1)  # more are cut apart and copied
            found += self.reads(f"{ff}.net.0.proj", rows, w)
            found += self.reads(f"{ff}.net.2", rows, 4 * w)
        return found

    def single(self, *, first: bool) -> int:
        w, rows = self.model.width, self.load.tokens
        found = self.attention(rows) + self.modulation("norm.linear", 1, 1, rows)
        found += (4 if first else 5) * rows * w * self.size  # into the norm and the GELU
        found += self.reads("attn.to_q attn.to_k attn.to_v proj_mlp", rows, w)
        return found + self.reads("proj_out", rows, 5 * w)


def activations_of(
    model: Flux, settings: Adapter, adapted: Collection[str], load: Load, size: int
) -> Activations:
    """What one forward pass of the transformer leaves. adapted: the layers with an adapter. size:
    bytes of a value of the base.

    A block before the first adapter keeps nothing: no gradient reaches it.
    """
    whole = load.tokens
    again = load.text if load.seen == "causal" else 0  # of the task, beside the whole
    if load.seen != "full":  # targets are computed twice
        load = replace(load, image=load.image + load.widest, text=load.text + again)
    wrapped: dict[str, set[str]] = {}
    for name in adapted:
        if inside := IN_BLOCK.fullmatch(name):
            wrapped.setdefault(inside[1], set()).add(inside[2])
    blocks: list[int] = []
    factors: list[int] = []
    reached = False
    for name in model.blocks:
        own = frozenset(wrapped.get(name, ()))
        kept = SavedActivations(model=model, load=load, adapter=settings, wrapped=own, size=size)
        count = kept.single if name.startswith("single") else kept.double
        sides = (sum(model.linear[f"{name}.{layer}"]) for layer in own)
        factors.append(0 if settings.method == "lora" else settings.rank * sum(sides) * size)
        blocks.append(count(first=not reached) + factors[-1] if reached or own else 0)
        reached = reached or bool(own)
    tokens, width = load.tokens, model.width
    # Keys and values of context: what stays until it is read, and, beside a call's own, those that
    # are cut out of one call and joined to those of another.
    once = load.seen != "full"
    cached = 2 * once * (whole + load.grids * again) * width * size
    joined = 4 * once * whole * width * size
    values = load.grids * (load.image * (model.inputs + 4 * model.outputs) + load.text * model.text)
    # What a single block's backward holds at once beside what was kept: the gradients of its widest
    # tensors and their sums; LoRA's in float32. Followed tensor by tensor at FLUX's sizes.
    held = 15 if settings.method == "lora" and size < SINGLE else 13
    return Activations(
        blocks=tuple(kept and kept + joined for kept in blocks),
        factors=tuple(factors),
        entry=tokens * width * size + cached,
        outside=tokens * width * size,  # the last norm reads a view of what the last block gave
        positions=2 * SINGLE * model.head * (load.image + load.text),
        batch=values * size,
        work=held * tokens * width * size,
    )
