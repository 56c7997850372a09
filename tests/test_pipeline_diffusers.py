"""What diffusers' own tests ask of a pipeline, besides generation: the claims of its
PipelineTesterMixin, and what is its own of the switches that all its pipelines have."""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    FasterCacheConfig,
    FirstBlockCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    FluxFillPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
    VisualClozeGenerationPipeline,
)
from diffusers.hooks import apply_group_offloading
from hub_cache import COMMIT, in_hub_cache
from PIL import Image

import visualcloze_deft.inference.pipeline
from visualcloze_deft import InContextPipeline
from visualcloze_deft.adapters import files, injection
from visualcloze_deft.config.run_settings import Adapter
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
    file = visualcloze_deft.inference.pipeline.__file__
    theirs = DiffusionPipeline.from_pretrained(
        tmp_path / "saved", custom_pipeline=file, trust_remote_code=True
    )
    for other in (again, theirs):
        assert (other.config.cells, other.config.resolution) == ("square", 32)
        torch.testing.assert_close(latents(other), latents(pipe))


# ---- parts


TEXT = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
WITHOUT_TEXT = dict.fromkeys(TEXT)


def encoded(pipe: InContextPipeline) -> dict[str, torch.Tensor]:
    return dict(
        zip(("prompt_embeds", "pooled_prompt_embeds"), pipe.encode_prompt("x"), strict=True)
    )


def test_components_are_the_parts_it_is_made_of(micro_model: Path) -> None:
    pipe = load(micro_model)
    options = {"resolution", "cells", "clip_text", "encodings", "task_folders", "merge"}
    parts = set(inspect.signature(InContextPipeline.__init__).parameters) - options - {"self"}
    assert set(pipe.components) == parts


@pytest.mark.parametrize("made", ["loaded", "constructed"])
def test_texts_are_encoded_in_isolation(micro_model: Path, made: str) -> None:
    """By a pipeline without the other parts, for one without text encoders."""
    whole = load(micro_model)
    others = dict.fromkeys(("transformer", "vae", "scheduler"))
    if made == "loaded":
        texts, grids = load(micro_model, **others), load(micro_model, **WITHOUT_TEXT)
    else:
        texts = InContextPipeline(**whole.components | others).to("cpu")
        grids = InContextPipeline(**whole.components | WITHOUT_TEXT, resolution=32).to("cpu")
    assert texts.transformer is None
    assert grids.tokenizer_2 is None
    torch.testing.assert_close(latents(grids, **encoded(texts)), latents(whole, **encoded(whole)))
    with pytest.raises(
        UserError, match="text_encoder: this pipeline has none; load it with one, or give prompt"
    ):
        latents(grids)
    with pytest.raises(UserError, match="text_encoder: this pipeline has none"):
        grids.encode_prompt("x")
    with pytest.raises(UserError, match="transformer: this pipeline has none; load it with one"):
        latents(texts, **encoded(whole))
    with pytest.raises(UserError, match="transformer: this pipeline has none"):
        texts.load_adapter("anywhere")
    with pytest.raises(UserError, match="transformer is None"):
        load(micro_model, transformer=None, lora="some.safetensors")


def test_parts_that_are_none_stay_none_when_saved(
    micro_model: Path,
    tmp_path: Path,
    refused: Callable[..., str],
    grid_file: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    pipe, saved = load(micro_model, **WITHOUT_TEXT), tmp_path / "saved"
    words = encoded(load(micro_model))
    pipe.save_pretrained(saved)
    again = load(saved)
    assert all(getattr(again, part) is None for part in TEXT)
    assert torch.equal(latents(again, **words), latents(pipe, **words))
    given = {part: getattr(load(micro_model), part) for part in TEXT}
    assert torch.equal(latents(load(saved, **given)), latents(load(micro_model)))
    load(micro_model, text_encoder_2=None).save_pretrained(tmp_path / "half")
    assert load(tmp_path / "half").tokenizer_2 is not None
    capsys.readouterr()
    line = refused("infer", "--examples", grid_file(), "--model", saved)
    assert "no text_encoder, text_encoder_2, tokenizer, tokenizer_2" in line


@pytest.mark.parametrize("kind", [FluxFillPipeline, VisualClozeGenerationPipeline, FluxPipeline])
def test_parts_go_to_and_from_other_pipelines(micro_model: Path, kind: Any) -> None:
    pipe = load(micro_model, cells="square")
    wanted, before = latents(pipe), dict(pipe.config)
    theirs = kind.from_pipe(pipe)
    assert theirs.transformer is pipe.transformer
    ours = InContextPipeline.from_pipe(theirs, resolution=32, cells="square")
    assert torch.equal(latents(ours), wanted)
    assert torch.equal(latents(pipe), wanted)
    kept = {"resolution", "cells", "clip_text"}
    assert {k: v for k, v in ours.config.items() if k in kept} == {k: before[k] for k in kept}


def test_another_transformer_is_without_the_adapters_of_the_first(
    micro_model: Path, tmp_path: Path
) -> None:
    pipe, base = load(micro_model), load(micro_model).transformer
    plain = latents(pipe)
    injection.attach(base, Adapter(rank=2, method="para"), seed=0)
    files.save(base, tmp_path, base="micro")
    pipe.load_adapter(tmp_path, "one")
    changed = latents(pipe)
    assert not torch.equal(changed, plain)
    pipe.transformer = load(micro_model).transformer
    assert pipe.get_active_adapters() == []
    assert torch.equal(latents(pipe), plain)
    pipe.load_adapter(tmp_path, "one")
    assert torch.equal(latents(pipe), changed)
    pipe.transformer = torch.compile(pipe.transformer)  # the same one, which keeps them
    assert pipe.get_active_adapters() == ["one"]


def test_other_parts_that_are_not_flux_fills_are_named(micro_model: Path) -> None:
    pipe = load(micro_model)
    own, euler = pipe.scheduler, FlowMatchEulerDiscreteScheduler
    for other, said in (
        (DDIMScheduler(), "DDIMScheduler: grids are made with FlowMatchEuler"),
        (euler.from_config(own.config, use_karras_sigmas=True), "use_karras_sigmas = True is not"),
        (euler(shift=3.0), "use_dynamic_shifting = False is not"),
    ):
        pipe.scheduler = other
        with pytest.raises(UserError, match=said):
            latents(pipe)
    pipe.scheduler = own
    pipe.transformer = FluxTransformer2DModel.from_config(
        {**pipe.transformer.config, "in_channels": 64}
    )
    with pytest.raises(UserError, match="its transformer has 64 input"):
        latents(pipe)


def test_variants_are_saved_and_said_where_nothing_else_is_there(
    micro_model: Path, tmp_path: Path
) -> None:
    pipe = load(micro_model)
    pipe.save_pretrained(tmp_path, variant="fp16")
    assert list(tmp_path.glob("transformer/*.fp16.safetensors"))
    assert torch.equal(latents(load(tmp_path, variant="fp16")), latents(pipe))
    with pytest.raises(UserError, match="weight files of a variant alone"):
        load(tmp_path)


# ---- calls


def test_a_call_names_the_arguments_that_diffusers_pipelines_have() -> None:
    """Programs look for them in its signature."""
    names = "num_inference_steps num_images_per_prompt guidance_scale generator latents output_type"
    names += " return_dict prompt_embeds callback_on_step_end callback_on_step_end_tensor_inputs"
    parameters = inspect.signature(InContextPipeline.__call__).parameters
    assert set(names.split()) <= set(parameters)
    for name in names.split():
        assert parameters[name].default is not inspect.Parameter.empty


def test_a_tuple_holds_the_same_images(micro_model: Path) -> None:
    pipe, options = load(micro_model), {"rows": ROWS, "num_inference_steps": 1}
    (images,) = pipe(**options, return_dict=False)
    assert [one.tobytes() for one in images] == [one.tobytes() for one in pipe(**options).images]


def test_images_of_each_prompt_are_counted_in_batches_of_any_size(micro_model: Path) -> None:
    pipe = load(micro_model)
    for grids in (1, 2):
        for images in (1, 3):
            options = {"num_images_per_prompt": images, "num_inference_steps": 1}
            assert len(pipe([{"rows": ROWS}] * grids, **options)) == grids * images


def test_callbacks_are_given_what_they_ask_for_and_may_change_it(micro_model: Path) -> None:
    pipe = load(micro_model)

    def change(pipe: InContextPipeline, step: int, _: Any, told: dict[str, Any]) -> dict[str, Any]:
        assert set(told) == set(pipe._callback_tensor_inputs)
        pipe._guidance_scale += 1
        if step == pipe.num_timesteps - 1:
            told["latents"] = torch.zeros_like(told["latents"])
        return told

    everything = pipe._callback_tensor_inputs
    options = {"callback_on_step_end": change, "callback_on_step_end_tensor_inputs": everything}
    assert latents(pipe, guidance_scale=2.0, **options).abs().sum() == 0
    assert pipe.guidance_scale == 2.0 + 3

    def nothing(_: Any, __: int, ___: Any, told: dict[str, Any]) -> dict[str, Any]:
        assert told == {}
        return told

    options = {"callback_on_step_end": nothing, "callback_on_step_end_tensor_inputs": ()}
    assert torch.equal(latents(pipe, **options), latents(pipe))
    with pytest.raises(UserError, match="give some of latents"):
        latents(pipe, callback_on_step_end=nothing, callback_on_step_end_tensor_inputs=["noise"])


def test_the_bar_of_steps_can_be_turned_off(
    micro_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe = load(micro_model)
    latents(pipe)
    assert "3/3" in capsys.readouterr().err
    pipe.set_progress_bar_config(disable=True)
    latents(pipe)
    assert capsys.readouterr().err == ""


# ---- switches


def test_half_precision_leaves_the_vae_in_single(micro_model: Path) -> None:
    pipe = load(micro_model)
    pipe.to(dtype=torch.float16)
    assert dtypes(pipe).pop("vae") == torch.float32
    assert set(dtypes(pipe).values()) == {torch.float16, torch.float32}
    assert latents(pipe).isfinite().all()


def test_slices_and_fused_projections_change_nothing(micro_model: Path, tmp_path: Path) -> None:
    pipe = load(micro_model)
    plain = latents(pipe)
    pipe.enable_attention_slicing(1)
    pipe.vae.enable_slicing()
    assert torch.equal(latents(pipe), plain)
    pipe.disable_attention_slicing()
    pipe.transformer.fuse_qkv_projections()
    torch.testing.assert_close(latents(pipe), plain)
    with pytest.raises(UserError, match="attn has fused projections"):
        pipe.load_adapter(tmp_path)
    pipe.transformer.unfuse_qkv_projections()
    assert torch.equal(latents(pipe), plain)


def test_weights_cast_layer_by_layer_work_and_take_no_adapters(
    micro_model: Path, tmp_path: Path
) -> None:
    pipe = load(micro_model, torch_dtype=HALF)
    plain = latents(pipe)
    pipe.transformer.enable_layerwise_casting(torch.float8_e4m3fn, compute_dtype=HALF)
    off = (latents(pipe) - plain).abs().mean() / plain.abs().mean()
    assert 0 < off < 0.1
    with pytest.raises(UserError, match="layerwise casting keeps in 8 bits"):
        pipe.load_adapter(tmp_path)


def test_parts_offloaded_in_groups_make_the_same_image(micro_model: Path) -> None:
    place, pipe = torch.device("cpu"), load(micro_model)
    options = {"offload_type": "block_level", "num_blocks_per_group": 1}
    plain = latents(pipe)
    pipe.transformer.enable_group_offload(place, **options)
    for part in (pipe.text_encoder, pipe.text_encoder_2):
        apply_group_offloading(part, onload_device=place, **options)
    assert torch.equal(latents(pipe), plain)
    pipe = load(micro_model)
    pipe.enable_group_offload(place, offload_type="leaf_level", exclude_modules="vae")
    assert torch.equal(latents(pipe), plain)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to offload from")
def test_offloading_without_a_gpu_is_refused_and_changes_nothing(micro_model: Path) -> None:
    pipe = load(micro_model)
    plain = latents(pipe)
    for enable in (pipe.enable_model_cpu_offload, pipe.enable_sequential_cpu_offload):
        with pytest.raises(RuntimeError, match="requires accelerator, but not found"):
            enable()
    assert torch.equal(latents(pipe), plain)


def test_caches_forget_one_call_before_the_next(micro_model: Path) -> None:
    common = {
        "spatial_attention_block_skip_range": 2,
        "spatial_attention_timestep_skip_range": (-1, 999),
        "spatial_attention_block_identifiers": ("transformer_blocks",),
    }
    for config in (
        PyramidAttentionBroadcastConfig(**common),
        MagCacheConfig(num_inference_steps=3, mag_ratios=[1.0] * 3, retention_ratio=0.3),
        TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1),
        FirstBlockCacheConfig(threshold=10.0),
    ):
        pipe = load(micro_model)
        plain = latents(pipe)
        config.current_timestep_callback = lambda pipe=pipe: pipe.current_timestep
        pipe.transformer.enable_cache(config)
        first = latents(pipe)
        assert not torch.equal(first, plain), config
        assert torch.equal(latents(pipe), first), config
        pipe.transformer.disable_cache()
        torch.testing.assert_close(latents(pipe), plain)
