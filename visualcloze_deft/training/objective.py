"""The denoiser with its training loss, as one module that an engine can wrap.

Axes: b batch, n tokens, c channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from visualcloze_deft.backbones.base import ContextCache
from visualcloze_deft.backbones.table import backbone_of_network
from visualcloze_deft.diffusion import flow
from visualcloze_deft.diffusion.flow import FLOW
from visualcloze_deft.diffusion.process import Process
from visualcloze_deft.sampling.context import with_targets
from visualcloze_deft.sampling.denoising import prefill
from visualcloze_deft.sampling.encoding import NEAREST, TokenBatch


class GridLoss(nn.Module):
    """The denoiser with its loss: one call takes a whole batch of groups, as engines like it."""

    def __init__(
        self,
        denoiser: nn.Module,
        *,
        context_weight: float,
        guidance: float,
        scheduled_sampling: bool = False,
        process: Process = FLOW,
    ) -> None:
        """scheduled_sampling: whether, in training, groups may hold samples whose `start` is above
        `t`. process: the model's."""
        super().__init__()
        self.denoiser = denoiser
        self.networks = backbone_of_network(denoiser).networks()
        self.context_weight = context_weight
        self.guidance = guidance
        self.scheduled_sampling = scheduled_sampling
        self.process = process

    def forward(self, groups: Sequence[TokenBatch]) -> Tensor:
        """(b,) the loss of each sample, group after group."""
        return torch.cat([self.errors(group) for group in groups])

    def errors(self, group: TokenBatch) -> Tensor:
        latents, t, start = group.latents, group.t, group.start
        process = self.process
        cache = None if group.seen == "full" else self.context_of(group)
        noisy = process.corrupt(latents.clean, group.noise, start)
        target = process.target(latents.clean, group.noise, t)
        if self.scheduled_sampling and self.training and process.rolled_out is not None:
            noisy = process.step(noisy, self.guess(group, noisy, cache), start, t)
            led = process.rolled_out(latents.clean, noisy, t.clamp(min=NEAREST))
            target = torch.where((start > t)[:, None, None], led, target)
        predicted = self.predict(group, noisy, t, cache)
        of_context = self.context_weight if cache is None else 0.0  # which has no noise there
        weight = latents.is_target + of_context * (1 - latents.is_target)
        return flow.velocity_error(predicted, target, weight)

    @torch.no_grad()
    def guess(self, group: TokenBatch, noisy: Tensor, cache: ContextCache | None) -> Tensor:
        """What is predicted of samples that are led, 0 for the others.

        At least one is asked for: under ZeRO-3 the call gathers weights from every process.
        """
        led = (group.start > group.t).nonzero().flatten()
        led = led if len(led) else led.new_zeros(1)
        some = group.some(led)
        guess = torch.zeros_like(noisy)
        own = cache and cache.some(led.tolist())
        guess[led] = self.predict(some, noisy[led], some.start, own).to(guess)
        return guess

    def predict(
        self, group: TokenBatch, noisy: Tensor, t: Tensor, cache: ContextCache | None
    ) -> Tensor:
        if cache is None:
            return self.networks.predict(
                self.denoiser, group.latents, noisy, t, text=group.text, guidance=self.guidance
            )
        return with_targets(torch.zeros_like(noisy), cache.active(noisy, t), cache.targets)

    def context_of(self, group: TokenBatch) -> ContextCache:
        """A group's context, computed once; gradients flow through it."""
        assert self.networks.context_cache is not None  # `preparation` has refused the run
        cache = self.networks.context_cache(
            self.denoiser, group.latents, text=group.text, guidance=self.guidance
        )
        prefill(cache, group.seen, group.task)
        return cache
