"""The embedded base in float16: pictures as in float32, however it came to be in float16."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from test_pipeline import scene_rows

from visualcloze_deft.backbones.flux_fill.loading import load_models
from visualcloze_deft.inference.pipeline import InContextPipeline

PSNR = 50.0  # decibel that a picture in float16 has at least, held to the one in float32


def picture(pipe: InContextPipeline) -> np.ndarray:
    """(h, w, 3) in 0..1."""
    (found,) = pipe(rows=scene_rows(size=64), num_inference_steps=4, seed=1, output_type="np")
    return np.asarray(found, dtype=np.float64)


def psnr(found: np.ndarray, wanted: np.ndarray) -> float:
    error = np.square(found - wanted).mean()
    return -10 * math.log10(error) if error else math.inf


@pytest.fixture(scope="module")
def in_float32() -> np.ndarray:
    return picture(InContextPipeline.from_pretrained("tiny"))


def test_loaded_in_float16_it_makes_the_picture_of_float32(in_float32: np.ndarray) -> None:
    pipe = InContextPipeline.from_pretrained("tiny", torch_dtype=torch.float16)
    assert pipe.transformer.dtype == pipe.text_encoder.dtype == torch.float16
    assert pipe.vae.dtype == torch.float32
    found = picture(pipe)
    assert np.isfinite(found).all()
    assert psnr(found, in_float32) > PSNR


def test_moved_to_float16_saved_and_loaded_too(in_float32: np.ndarray, tmp_path: Path) -> None:
    pipe = InContextPipeline.from_pretrained("tiny")
    assert pipe.to(torch.float16) is pipe
    assert pipe.transformer.dtype == torch.float16
    moved = picture(pipe)
    assert psnr(moved, in_float32) > PSNR
    pipe.save_pretrained(tmp_path)
    loaded = InContextPipeline.from_pretrained(tmp_path, torch_dtype=torch.float16)
    assert psnr(picture(loaded), in_float32) > PSNR


def test_a_vae_that_comes_in_float16_is_turned_to_float32(in_float32: np.ndarray) -> None:
    pipe = InContextPipeline.from_pretrained("tiny")
    pipe.vae.half()
    assert psnr(picture(pipe), in_float32) > PSNR
    assert pipe.vae.dtype == torch.float32


def test_the_vae_in_float16_is_why() -> None:
    """The fault that is avoided: it is there on a CPU, too."""
    models = load_models("tiny")
    latents = models.encode_pixels(torch.linspace(-1, 1, 3 * 64 * 64).reshape(1, 3, 64, 64))
    assert models.decode_latents(latents).isfinite().all()
    vae: AutoencoderKL = models.vae.half()
    config = vae.config
    given = latents.half() / config.scaling_factor + config.shift_factor
    with torch.no_grad():
        assert not vae.decode(given).sample.isfinite().all()
