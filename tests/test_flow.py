"""The flow is the straight line from latent to noise, and its times are those of diffusers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux_fill import calculate_shift

from visualcloze_deft.diffusion import flow, timesteps
from visualcloze_deft.paths import BASE

CLEAN, NOISE = torch.randn(2, 3, 5, 4, dtype=torch.float64, generator=torch.manual_seed(0))


def test_the_line_starts_at_the_latent_and_ends_in_noise() -> None:
    assert torch.equal(flow.interpolate(CLEAN, NOISE, torch.zeros(3)), CLEAN)
    assert torch.equal(flow.interpolate(CLEAN, NOISE, torch.ones(3)), NOISE)


def test_every_sample_has_its_own_time() -> None:
    t = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    mixed = flow.interpolate(CLEAN, NOISE, t)
    assert torch.equal(mixed[0], CLEAN[0])
    assert torch.allclose(mixed[1], (CLEAN[1] + NOISE[1]) / 2)
    assert torch.equal(mixed[2], NOISE[2])


def test_velocity_is_the_derivative_of_the_line() -> None:
    early, late = torch.full((3,), 0.25), torch.full((3,), 0.75)
    passed = flow.interpolate(CLEAN, NOISE, late) - flow.interpolate(CLEAN, NOISE, early)
    assert torch.allclose(passed / 0.5, flow.velocity(CLEAN, NOISE))


def test_the_way_to_the_truth_ends_there_from_anywhere_and_is_the_line_on_the_line() -> None:
    t = torch.tensor([0.2, 0.5, 1.0], dtype=torch.float64)
    anywhere = CLEAN + NOISE.flip(0)
    way = flow.velocity_to(CLEAN, anywhere, t)
    assert torch.allclose(anywhere - t[:, None, None] * way, CLEAN)
    on_line = flow.interpolate(CLEAN, NOISE, t)
    assert torch.allclose(flow.velocity_to(CLEAN, on_line, t), flow.velocity(CLEAN, NOISE))


def test_a_step_begins_between_its_end_and_pure_noise_and_often_in_noise() -> None:
    t = torch.rand(1000, generator=torch.manual_seed(2))
    start = timesteps.earlier(t, torch.rand(1000, 2, generator=torch.manual_seed(3)))
    assert (start >= t).all()
    assert (start <= 1).all()
    assert 0.35 < (start == 1).float().mean() < 0.45


def test_training_times_are_between_zero_and_one_with_median_a_half() -> None:
    t = timesteps.logit_normal(torch.tensor([-3.0, 0.0, 3.0]))
    assert 0 < t[0] < t[1] == 0.5 < t[2] < 1
    assert torch.allclose(t[0], 1 - t[2])


def test_the_error_of_the_truth_is_zero_and_a_constant_offset_counts_squared() -> None:
    weight = torch.rand(3, 5, generator=torch.manual_seed(1)) + 0.1
    assert torch.equal(flow.velocity_error(CLEAN, CLEAN, weight), torch.zeros(3))
    assert torch.allclose(flow.velocity_error(CLEAN + 2, CLEAN, weight), torch.full((3,), 4.0))


def test_only_weighted_tokens_count_and_only_the_ratio_of_weights() -> None:
    weight = torch.tensor([[0.0, 1.0, 2.0]])
    zero = torch.zeros(1, 3, 4)
    error = zero + torch.tensor([9.0, 1.0, 2.0])[:, None]
    assert flow.velocity_error(error, zero, weight).item() == (1 * 1 + 2 * 4) / 3
    assert torch.equal(
        flow.velocity_error(error, zero, 7 * weight), flow.velocity_error(error, zero, weight)
    )


def test_the_error_is_measured_in_float32() -> None:
    half = torch.full((1, 1, 1), 1.0, dtype=torch.bfloat16)
    error = flow.velocity_error(half, torch.full((1, 1, 1), 1.001), torch.ones(1, 1))
    assert error.dtype == torch.float32
    assert error.item() == pytest.approx(1e-6, rel=1e-2)


@pytest.mark.parametrize("tokens", [16, 64, 256, 1152, 4096, 5184])
def test_the_shift_is_that_of_diffusers(tokens: int) -> None:
    ours = timesteps.shift_of(tokens, base=0.5, maximum=1.15, base_tokens=256, max_tokens=4096)
    assert ours == pytest.approx(calculate_shift(tokens, 256, 4096, 0.5, 1.15), abs=1e-12)


@pytest.mark.parametrize("steps", [1, 2, 7, 30])
@pytest.mark.parametrize("mu", [0.0, 0.5, 1.15])
def test_the_schedule_is_that_of_diffusers(steps: int, mu: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(BASE, subfolder="scheduler")
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(
        scheduler.config, use_dynamic_shifting=True
    )
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), mu=mu)
    assert torch.allclose(timesteps.schedule(steps, mu), scheduler.sigmas, rtol=0, atol=1e-6)


def test_the_schedule_falls_from_one_to_zero() -> None:
    times = timesteps.schedule(30, 0.7)
    assert (times[0], times[-1]) == (1, 0)
    assert (times.diff() < 0).all()


def test_a_shift_moves_training_times_towards_noise_and_keeps_their_ends() -> None:
    t = torch.linspace(0, 1, 101)
    assert torch.equal(timesteps.shift(t, 1.0), t)
    noisier = timesteps.shift(t, 3.0)
    assert (noisier[0], noisier[-1]) == (0, 1)
    assert (noisier[1:-1] > t[1:-1]).all()
    assert torch.allclose(timesteps.shift(noisier, 1 / 3), t, atol=1e-6)
