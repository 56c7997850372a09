"""The transformer with its training loss, as one module that an engine can wrap.

Axes: b batch, n tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from visualcloze_deft.backbones.flux_fill.model import predict_velocity
from visualcloze_deft.diffusion import flow
from visualcloze_deft.sampling.encoding import NEAREST, TokenBatch


class GridLoss(nn.Module):
    """The transformer with its loss: one call takes a whole batch of groups, as engines like it."""

    def __init__(
        self,
        transformer: FluxTransformer2DModel,
        *,
        context_weight: float,
        guidance: float,
        scheduled_sampling: bool = False,
    ) -> None:
        """scheduled_sampling: whether, in training, groups may hold samples whose `start` is above
        `t`."""
        super().__init__()
        self.transformer = transformer
        self.context_weight = context_weight
        self.guidance = guidance
        self.scheduled_sampling = scheduled_sampling

    def forward(self, groups: Sequence[TokenBatch]) -> Tensor:
        """(b,) the loss of each sample, group after group."""
        return torch.cat([self.errors(group) for group in groups])

    def errors(self, group: TokenBatch) -> Tensor:
        latents, t, start = group.latents, group.t, group.start
        noisy = flow.interpolate(latents.clean, group.noise, start)
        target = flow.velocity(latents.clean, group.noise)
        if self.scheduled_sampling and self.training:
            noisy = noisy + (t - start)[:, None, None] * self.guess(group, noisy)
            led = flow.velocity_to(latents.clean, noisy, t.clamp(min=NEAREST))
            target = torch.where((start > t)[:, None, None], led, target)
        predicted = self.velocity(group, noisy, t)
        weight = latents.is_target + self.context_weight * (1 - latents.is_target)
        return flow.velocity_error(predicted, target, weight)

    @torch.no_grad()
    def guess(self, group: TokenBatch, noisy: Tensor) -> Tensor:
        """The velocity of samples that are led, 0 for the others.

        At least one is asked for: under ZeRO-3 the call gathers weights from every process.
        """
        led = (group.start > group.t).nonzero().flatten()
        led = led if len(led) else led.new_zeros(1)
        some = group.some(led)
        guess = torch.zeros_like(noisy)
        guess[led] = self.velocity(some, noisy[led], some.start).to(guess)
        return guess

    def velocity(self, group: TokenBatch, noisy: Tensor, t: Tensor) -> Tensor:
        return predict_velocity(
            self.transformer,
            group.latents.inputs(noisy),
            t,
            ids=group.latents.ids,
            text=group.text,
            pooled=group.pooled,
            guidance=self.guidance,
        )
