"""Memory outside of steps: each count against the real network, and what a plan makes of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from living import Living
from test_memory import FLUX, FLUX_VAE, FlashAttention, asked, flux_settings, plan_of

from visualcloze_deft.adapters import injection
from visualcloze_deft.backbones.base import Load
from visualcloze_deft.backbones.flux_fill.files import component_config
from visualcloze_deft.backbones.flux_fill.model import predict_velocity
from visualcloze_deft.cli import main
from visualcloze_deft.config.run_settings import Adapter, load_run
from visualcloze_deft.planning.machine import RESERVE
from visualcloze_deft.planning.memory import memory_plan
from visualcloze_deft.planning.outside_steps import picture_bytes, pixel_values

__all__ = ["flux_settings"]

BLOCKS = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["flux", "tiny", "micro"])
def test_encoding_and_decoding_peak_as_counted(
    micro_model: Path, name: str, dtype: torch.dtype
) -> None:
    """On a strip of three 384 px cells."""
    if name == "flux":
        settings = FLUX_VAE | BLOCKS
    else:
        settings = component_config(str(micro_model) if name == "micro" else name, "vae")
    height, width = 384, 1152
    with torch.device("meta"), torch.no_grad():
        vae = AutoencoderKL.from_config(settings).to(dtype).eval()
        picture = torch.empty(1, 3, height, width, dtype=dtype)
        latents = torch.empty(1, 16, height // 8, width // 8, dtype=dtype)
        with FlashAttention(), Living() as encoding:
            vae.encode(picture).latent_dist.mode()
        with FlashAttention(), Living() as decoding:
            vae.decode(latents)
    counted, tokens = pixel_values(settings), height * width // 256
    for value, living in ((counted.encode, encoding), (counted.decode, decoding)):
        size = picture_bytes(value, tokens, dtype.itemsize)
        assert size == pytest.approx(living.most, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("method", "rank"), [("deft", 32), ("deft", 256), ("lora", 32)])
def test_a_sampling_step_of_flux_peaks_as_planned(
    flux_settings: Path, method: str, rank: int, dtype: torch.dtype
) -> None:
    """At FLUX's width and the sheet's grid of two rows of 3 cells, on one block of either kind."""
    few = FLUX | {"num_layers": 1, "num_single_layers": 1}
    (flux_settings / "transformer" / "config.json").write_text(json.dumps(few))
    settings = Adapter(rank=rank, method=method)
    with torch.device("meta"), torch.no_grad():
        model = FluxTransformer2DModel.from_config(few).to(dtype)
        injection.attach(model, settings, seed=0)
        sheet = Load(grids=1, image=3456, text=512)
        given = {k: v.to("meta") for k, v in asked(model.eval(), sheet).items()}
        with FlashAttention(), Living() as living:
            predict_velocity(model, **given, guidance=1.0)
    words = [f"adapter.method={method}", f"adapter.rank={rank}"]
    words.append(f"precision={str(dtype).removeprefix('torch.')}")
    plan = plan_of(flux_settings, *words)
    plan = replace(plan, load=Load(grids=1, image=5184, text=512, strip=1728))
    assert plan.outside.forward == pytest.approx(living.most, rel=0.1)


def test_auto_leaves_room_for_what_comes_between_steps(flux_settings: Path) -> None:
    """Steps on small grids take less than the text encoder that comes to the GPU."""
    words = [f"model={flux_settings}", "offload_encoders=true", "precision=bfloat16", "zero=auto"]
    small = Load(grids=1, image=512, text=512, strip=256)
    plan = memory_plan(load_run(None, words), small, processes=1, gpu=True)
    step, between = plan.parts(0, 0).peak, plan.between(0) + plan.outside.peak
    assert step < between == plan.peak(0, 0)
    assert plan.choose(int((step + between) / 2 / (1 - RESERVE))) is None
    assert plan.choose(int(between / (1 - RESERVE)) + 1) == (0, 0)


def test_encoders_that_rest_elsewhere_come_one_at_a_time(flux_settings: Path) -> None:
    words = [f"model={flux_settings}", "offload_encoders=true", "precision=bfloat16"]
    load = Load(grids=1, image=5184, text=512, strip=1728)
    plan = memory_plan(load_run(None, words), load, processes=1, gpu=True)
    assert plan.encoders == 0
    assert plan.outside.text / 1e9 == pytest.approx(9.52, abs=0.01)  # T5-XXL in bfloat16
    assert plan.outside.peak == plan.outside.text


def test_plan_shows_what_samples_take(
    flux_settings: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["plan", "--config", "flux-8gpu", "--model", str(flux_settings), "--grid", "3x3"]
    main([*words, "--memory", "80GB"])
    (line,) = (x for x in capsys.readouterr().out.splitlines() if x.startswith("samples"))
    assert "decode 0.68" in line
    main([*words, "--memory", "80GB", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["outside"]["decode"] / 1e9 == pytest.approx(0.68, abs=0.01)
    for way in found["ways"]:
        assert way["peak"] >= way["between"] + found["outside"]["peak"]


def test_the_held_out_loss_counts_where_it_takes_more_than_a_sheet(flux_settings: Path) -> None:
    load = Load(grids=4, image=5184, text=512, strip=1728)
    sheet = replace(plan_of(flux_settings), load=load)
    both = replace(plan_of(flux_settings, "logging.validate_every=10"), load=load)
    assert both.outside.forward > 3 * sheet.outside.forward
