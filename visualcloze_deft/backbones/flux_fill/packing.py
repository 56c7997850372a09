"""FLUX.1-Fill's tokens: strips of latents to one sequence with masks and positions, and back.

Every strip of a grid stays a sequence of its own. Axes: b batch, c channels, h w latents, p q patch
(2 x 2), i j pixels of one latent (8 x 8), n tokens, d text width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from visualcloze_deft.grids.cell_sizes import CELL_STEP, PATCH, VAE_SCALE


class FluxText(NamedTuple):
    """What FLUX reads of b prompts. text: T5's tokens (b, l, d). pooled: CLIP's vector (b, d)."""

    text: Tensor
    pooled: Tensor

    def some(self, places: Sequence[int]) -> FluxText:
        """Of the prompts at `places`, which may name one several times."""
        chosen = list(places)
        return FluxText(self.text[chosen], self.pooled[chosen])


@dataclass(frozen=True, kw_only=True)
class Latents:
    """Grids of one shape as tokens. clean, seen: (b, n, 64); mask: (b, n, 256); ids: (n, 3)."""

    clean: Tensor
    seen: Tensor
    mask: Tensor
    ids: Tensor

    def inputs(self, noisy: Tensor) -> Tensor:
        """What the transformer reads: 64 noisy + 64 seen + 256 mask values per token."""
        return torch.cat([noisy, self.seen, self.mask], dim=-1)  # b n 384

    def some(self, places: Sequence[int]) -> Latents:
        """The samples at `places`, which may name one several times."""
        chosen = list(places)
        return replace(
            self, clean=self.clean[chosen], seen=self.seen[chosen], mask=self.mask[chosen]
        )

    @property
    def is_target(self) -> Tensor:
        """(b, n), 1 for tokens that are generated."""
        return self.mask.mean(dim=-1)


def pack(latent: Tensor) -> Tensor:
    """(b, c, h, w) latents to (b, n, 4 c) tokens, FLUX's order."""
    return rearrange(latent, "b c (h p) (w q) -> b (h w) (c p q)", p=PATCH, q=PATCH)


def unpack(tokens: Tensor, shape: Sequence[tuple[int, int]]) -> tuple[Tensor, ...]:
    """The inverse of `pack` for a whole grid: (b, n, 64) to one (b, 16, h, w) latent a strip.

    `shape`: (height, width) of each strip in pixels, as in `Grid.shape`.
    """
    sides = [(h // CELL_STEP, w // CELL_STEP) for h, w in shape]
    parts = tokens.split([h * w for h, w in sides], dim=1)
    return tuple(
        rearrange(part, "b (h w) (c p q) -> b c (h p) (w q)", h=h, p=PATCH, q=PATCH)
        for part, (h, w) in zip(parts, sides, strict=True)
    )


def pack_mask(mask: Tensor) -> Tensor:
    """(b, 1, h, w) pixel masks to (b, n, 256) tokens: 8 x 8 pixels become channels, then pack."""
    folded = rearrange(mask, "b 1 (h i) (w j) -> b (i j) h w", i=VAE_SCALE, j=VAE_SCALE)
    return pack(folded)


def position_ids(shape: Sequence[tuple[int, int]]) -> Tensor:
    """(n, 3) ids: row of the grid counted from 1, then y and x over the joined strip."""
    rows = []
    for index, (height, width) in enumerate(shape, 1):
        y, x = torch.meshgrid(
            torch.arange(height // CELL_STEP), torch.arange(width // CELL_STEP), indexing="ij"
        )
        rows.append(torch.stack([torch.full_like(y, index), y, x], dim=-1).reshape(-1, 3))
    return torch.cat(rows).float()
