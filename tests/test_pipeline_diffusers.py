"""What diffusers' own tests ask of a pipeline, besides generation."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FasterCacheConfig,
    FluxTransformer2DModel,
    PyramidAttentionBroadcastConfig,
)
from hub_cache import COMMIT, in_hub_cache
from PIL import Image

import visualcloze_deft.pipeline
from visualcloze_deft import InContextPipeline
from visualcloze_deft.errors import UserError

ROWS = [[Image.new("RGB", (32, 32), "red"), Image.new("RGB", (32, 32), "blue")]]
ROWS += [[Image.new("RGB", (32, 32), "green"), None]]
HALF = torch.bfloat16


def latents(pipe: InContextPipeline, **more: Any) -> torch.Tensor:
    found: torch.Tensor = pipe(rows=ROWS, num_inference_steps=3, output_type="latent", **more)[0]
    return found


def load(model: Path | str, **more: Any) -> InContextPipeline:
    return InContextPipeline.from_pretrained(model, device="cpu", **more)


def dtypes(pipe: InContextPipeline) -> dict[str, torch.dtype]:
    parts = ("transformer", "vae", "text_encoder", "text_encoder_2")
    return {part: getattr(pipe, part).dtype for part in parts}


@pytest.mark.parametrize("word", ["dtype", "torch_dtype"])
def test_a_dtype_holds_for_all_parts_or_for_those_named(micro_model: Path, word: str) -> None:
    assert set(dtypes(load(micro_model, **{word: HALF})).values()) == {HALF}
    some = dtypes(load(micro_model, **{word: {"transformer": HALF, "default": torch.float32}}))
    assert some.pop("transformer") == HALF
    assert set(some.values()) == {torch.float32}
    rest = dtypes(load(micro_model, **{word: {"vae": HALF}}))
    assert rest.pop("vae") == HALF
    assert set(rest.values()) == {torch.float32}


def test_a_variant_is_read_where_there_are_files_of_it(micro_model: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(micro_model, tmp_path / "model"))
    other = load(micro_model).transformer
    torch.nn.init.ones_(other.proj_out.bias)
    other.save_pretrained(model / "transformer", variant="fp16")
    assert load(model, variant="fp16").transformer.proj_out.bias.eq(1).all()
    assert not load(model).transformer.proj_out.bias.eq(1).any()
    with pytest.raises(UserError, match="no weight files of the variant 'bf16'"):
        load(model, variant="bf16")


def test_a_revision_and_a_token_go_with_a_hub_id(
    micro_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_hub_cache(micro_model, "someone/pipeline", tmp_path / "cache", monkeypatch)
    pipe = load("someone/pipeline", revision=COMMIT, token="hf_x")
    assert pipe.config["_name_or_path"] == f"someone/pipeline@{COMMIT}"
    assert pipe.config.resolution == 32
    assert torch.equal(latents(pipe), latents(load(micro_model)))
    with pytest.raises(UserError, match="not in the hub's cache"):
        load("someone/pipeline", revision="gone")


def test_parts_may_be_given(micro_model: Path) -> None:
    """They are used as they are, and what is in the folder for them is not read."""
    whole = load(micro_model)
    given = {
        "transformer": FluxTransformer2DModel.from_pretrained(micro_model, subfolder="transformer"),
        "vae": AutoencoderKL.from_pretrained(micro_model, subfolder="vae"),
        "tokenizer": whole.tokenizer,
        "scheduler": whole.scheduler,
    }
    pipe = load(micro_model, **given)
    assert all(getattr(pipe, part) is value for part, value in given.items())
    torch.testing.assert_close(latents(pipe), latents(whole))
    with pytest.raises(UserError, match="a transformer that is given stays as it is"):
        load(micro_model, transformer=given["transformer"], quantise="fp8")
    again = InContextPipeline(**whole.components, resolution=32)
    torch.testing.assert_close(latents(again), latents(whole))


def test_other_arguments_are_diffusers(micro_model: Path, caplog: pytest.LogCaptureFixture) -> None:
    pipe = InContextPipeline.from_pretrained(
        micro_model, device_map="cpu", use_safetensors=True, resolution=64, safety_checker=None
    )
    assert pipe.config.resolution == 64
    assert "['safety_checker'] are not expected by InContextPipeline" in caplog.text
    with pytest.raises(UserError, match="weights are read from safetensors files alone"):
        load(micro_model, use_safetensors=False)
    with pytest.raises(UserError, match="device_map 'balanced': name one device"):
        InContextPipeline.from_pretrained(micro_model, device_map="balanced")


def test_callbacks_see_where_the_call_is(micro_model: Path) -> None:
    pipe, seen = load(micro_model), []

    def look(pipe: InContextPipeline, step: int, time: Any, told: dict[str, Any]) -> dict[str, Any]:
        assert pipe.current_timestep is not None
        seen.append((step, float(pipe.current_timestep), float(time), pipe.num_timesteps))
        assert (pipe.guidance_scale, pipe.interrupt) == (7.0, False)
        return told

    assert pipe.current_timestep is None
    pipe(rows=ROWS, num_inference_steps=3, guidance_scale=7.0, callback_on_step_end=look)
    assert [step for step, *_ in seen] == [0, 1, 2]
    assert [count for *_, count in seen] == [3, 3, 3]
    assert all(now == at for _, now, at, _ in seen)
    assert pipe.current_timestep is None


def test_an_interrupted_call_keeps_the_latents_of_that_step(micro_model: Path) -> None:
    pipe, kept = load(micro_model), []

    def stop(pipe: InContextPipeline, step: int, _: Any, told: dict[str, Any]) -> dict[str, Any]:
        kept.append(told["latents"].clone())
        pipe._interrupt = step == 1
        return told

    options = {"num_inference_steps": 4, "output_type": "latent", "callback_on_step_end": stop}
    (found,) = pipe(rows=ROWS, **options)
    assert torch.equal(found, kept[1][0])


def test_caches_that_go_by_the_timestep_work(micro_model: Path) -> None:
    """Pyramid attention broadcast and FasterCache ask for it in every attention layer."""
    pipe = load(micro_model)
    plain = latents(pipe)
    asked: list[Any] = []

    def timestep() -> Any:
        asked.append(pipe.current_timestep)
        return int(pipe.current_timestep)

    common = {
        "spatial_attention_block_skip_range": 2,
        "spatial_attention_block_identifiers": ("transformer_blocks", "single_transformer_blocks"),
        "current_timestep_callback": timestep,
    }
    for times in ((-2, -1), (-1, 999)):  # FasterCache wants the first step computed
        common["spatial_attention_timestep_skip_range"] = times
        for config in (
            PyramidAttentionBroadcastConfig(**common),
            FasterCacheConfig(
                **common, is_guidance_distilled=True, attention_weight_callback=lambda _: 0.5
            ),
        ):
            pipe.transformer.enable_cache(config)
            assert torch.equal(latents(pipe), plain) == (times == (-2, -1)), config
            pipe.transformer.disable_cache()
    assert asked
    assert None not in asked


def test_diffusers_loads_what_was_saved(
    micro_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Named by its class, or through `DiffusionPipeline` with this package's file."""
    cache = str(tmp_path / "modules")
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", cache)
    monkeypatch.syspath_prepend(cache)
    pipe = load(micro_model, cells="square")
    pipe.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    file = visualcloze_deft.pipeline.__file__
    theirs = DiffusionPipeline.from_pretrained(
        tmp_path / "saved", custom_pipeline=file, trust_remote_code=True
    )
    for other in (again, theirs):
        assert (other.config.cells, other.config.resolution) == ("square", 32)
        torch.testing.assert_close(latents(other), latents(pipe))
