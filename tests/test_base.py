"""The embedded base: its format, its size, and that it completes grids it never saw."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest

from visualcloze_deft import grid
from visualcloze_deft.data.mixture import Mixture
from visualcloze_deft.data.scenes import Scenes
from visualcloze_deft.folders import BASE
from visualcloze_deft.models import Models, load_models
from visualcloze_deft.preview import query_of
from visualcloze_deft.registry import load_tasks
from visualcloze_deft.sample import generate


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
    import torch

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
    assert images[0][0].size == (64, 64)


def test_the_vae_gives_back_what_it_was_shown(models: Models) -> None:
    source = Scenes(size=64, seed=9)
    pixels = grid.build(
        [[source.item(0).image("target"), source.item(1).image("depth")]],
        resolution=64,
        hidden=[False, False],
    ).strips[0][None]
    back = models.decode_latents(models.encode_pixels(pixels))
    assert 10 * np.log10(4 / (back - pixels).square().mean().item()) > 24  # dB


def test_it_completes_held_out_grids_better_than_their_mean_colour(models: Models) -> None:
    mixture = Mixture(load_tasks(), [Scenes(size=64, seed=9)], seed=9)
    task = mixture.tasks["depth-to-image"]
    examples = [query_of(mixture, task, index=k) for k in range(8)]
    grids = [grid.build(e.rows, resolution=64, hidden=e.hidden) for e in examples]
    made = generate(models, grids, [e.prompt for e in examples], seeds=range(8), steps=12)
    errors, spread = [], []
    for (image,), example in zip(made, examples, strict=True):
        truth = np.asarray(example.rows[-1][1], float)
        errors.append(np.mean((np.asarray(image, float) - truth) ** 2))
        spread.append(np.mean((truth - truth.mean(axis=(0, 1))) ** 2))
    assert np.mean(errors) < 0.6 * np.mean(spread)
