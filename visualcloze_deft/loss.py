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
from visualcloze_deft.models import predict_velocity


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
        latents = group.latents
        noisy = flow.interpolate(latents.clean, group.noise, group.t)
        predicted = predict_velocity(
            self.transformer,
            latents.inputs(noisy),
            group.t,
            ids=latents.ids,
            text=group.text,
            pooled=group.pooled,
            guidance=self.guidance,
        )
        weight = latents.is_target + self.context_weight * (1 - latents.is_target)
        return flow.velocity_error(predicted, flow.velocity(latents.clean, group.noise), weight)
