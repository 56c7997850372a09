"""The embedded base: its format, its size, and that it reads grids it never saw."""

from __future__ import annotations

from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from families import families

from visualcloze_deft.backbones.flux_fill import packing
from visualcloze_deft.backbones.flux_fill.loading import load_models
from visualcloze_deft.backbones.flux_fill.model import Models
from visualcloze_deft.data.mixture import Mixture
from visualcloze_deft.data.queries import query_of
from visualcloze_deft.data.sources.scenes import Scenes
from visualcloze_deft.diffusion import flow
from visualcloze_deft.grids import grid
from visualcloze_deft.paths import BASE
from visualcloze_deft.sampling.denoising import Conditions, generate, predictor


@pytest.fixture(scope="module")
def models() -> Models:
    return load_models("tiny")


def test_it_is_small_and_safetensors_only() -> None:
    files = [path for path in BASE.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 16_000_000
    assert not [path for path in files if path.suffix in {".bin", ".pt", ".pkl", ".ckpt"}]


def test_it_has_the_geometry_of_flux_fill(models: Models) -> None:
    config = models.transformer.config
    assert (config.in_channels, config.out_channels, config.guidance_embeds) == (384, 64, True)
    assert len(config.axes_dims_rope) == 3
    assert models.vae.config.latent_channels == 16
    assert len(models.vae.config.block_out_channels) == 4  # x8


def test_plain_diffusers_loads_and_runs_it() -> None:
    pipe = diffusers.VisualClozePipeline.from_pretrained(BASE)
    assert isinstance(pipe.transformer, diffusers.FluxTransformer2DModel)
    item = Scenes(size=64, seed=9).item(0)
    stage = pipe.generation_pipe
    stage.set_progress_bar_config(disable=True)
    images = stage(
        task_prompt="From the depth map [IMAGE1] to the photo [IMAGE2].",
        content_prompt=item.texts["caption"],
        image=[[item.image("depth"), None]],
        num_inference_steps=2,
        max_sequence_length=40,
        generator=torch.Generator().manual_seed(0),
    ).images
    assert images[0][0].size == (pipe.config.resolution,) * 2


def test_the_vae_gives_back_what_it_was_shown(models: Models) -> None:
    source = Scenes(size=64, seed=9)
    pixels = grid.build(
        [[source.item(0).image("target"), source.item(1).image("depth")]],
        resolution=64,
        hidden=[False, False],
    ).strips[0][None]
    back = models.decode_latents(models.encode_pixels(pixels))
    assert 10 * np.log10(4 / (back - pixels).square().mean().item()) > 26  # dB


@pytest.mark.parametrize("task", ["depth-to-image", "image-to-depth", "image-editing"])
def test_it_reads_the_condition_and_the_words_of_scenes_it_never_saw(
    models: Models, task: str
) -> None:
    """Velocity error on hidden tokens, far in the noise: right against another scene's."""
    side = models.resolution
    mixture = Mixture(families(), [Scenes(size=side, seed=9)], seed=9, resolution=side)
    examples = [query_of(mixture, mixture.tasks[task], index=k) for k in range(12)]
    grids = [grid.join(e.complete, hidden=e.hidden) for e in examples]
    right = models.encode_grids(grids, clean=True)
    wrong = replace(right, seen=right.seen.roll(1, dims=0))
    prompts = [e.prompt for e in examples]
    noise = torch.randn(right.clean.shape, generator=torch.Generator().manual_seed(0))
    t = torch.full((len(grids),), 0.9)
    noisy = flow.interpolate(right.clean, noise, t)

    def error(latents: packing.Latents, words: list[str]) -> float:
        text = models.encode_text(words)
        with torch.no_grad():
            given = Conditions(latents=latents, text=text)
            velocity = predictor(models, given, guidance=30.0)(noisy, t[0])
        target = flow.velocity(right.clean, noise)
        return float(flow.velocity_error(velocity, target, right.is_target).mean())

    known = error(right, prompts)
    assert known < 0.95 * error(wrong, prompts)
    if task == "depth-to-image":
        assert known < error(right, prompts[1:] + prompts[:1])


@pytest.mark.parametrize("task", ["depth-to-image", "segmentation-to-image", "image-to-depth"])
def test_it_completes_grids_better_than_the_best_single_colour(models: Models, task: str) -> None:
    side = models.resolution
    mixture = Mixture(families(), [Scenes(size=side, seed=9)], seed=9, resolution=side)
    examples = [query_of(mixture, mixture.tasks[task], index=k) for k in range(12)]
    grids = [grid.join(e.complete, hidden=e.hidden) for e in examples]
    made = generate(
        models, grids, [e.prompt for e in examples], seeds=[e.index for e in examples], steps=8
    )
    errors, spreads = [], []
    for example, images in zip(examples, made, strict=True):
        truth = np.asarray(example.rows[-1][-1], float)
        errors.append(np.square(np.asarray(images[0], float) - truth).mean())
        spreads.append(truth.var(axis=(0, 1)).mean())
    assert np.mean(errors) < 0.7 * np.mean(spreads)
