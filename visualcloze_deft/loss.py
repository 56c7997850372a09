"""The transformer with its training loss, as one module that an engine can wrap.

Axes: b batch, n tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from visualcloze_deft import flow
from visualcloze_deft.batch import Group


class GridLoss(nn.Module):
    """The transformer with its loss: one call takes a whole batch of groups, as engines like it."""

    def __init__(
        self, transformer: FluxTransformer2DModel, *, context_weight: float, guidance: float
    ) -> None:
        super().__init__()
        self.transformer = transformer
        self.context_weight = context_weight
        self.guidance = guidance

    def forward(self, groups: Sequence[Group]) -> Tensor:
        """(b,) the loss of each sample, group after group."""
        return torch.cat([self.errors(group) for group in groups])

    def errors(self, group: Group) -> Tensor:
        latents, dtype = group.latents, self.transformer.dtype
        noisy = flow.interpolate(latents.clean, group.noise, group.t)
        predicted = self.transformer(
            hidden_states=latents.inputs(noisy).to(dtype),
            timestep=group.t.to(dtype),
            guidance=torch.full_like(group.t, self.guidance),
            pooled_projections=group.pooled,
            encoder_hidden_states=group.text,
            txt_ids=torch.zeros(group.text.shape[1], 3, device=noisy.device),
            img_ids=latents.ids,
            return_dict=False,
        )[0]
        weight = latents.is_target + self.context_weight * (1 - latents.is_target)
        return flow.velocity_error(predicted, flow.velocity(latents.clean, group.noise), weight)
