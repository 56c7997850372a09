"""Inference: agreement with diffusers where diffusers is right, and the promises of the API."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from PIL import Image

from visualcloze_deft import InContextPipeline
from visualcloze_deft.backbones.embedding_cache import Recent
from visualcloze_deft.backbones.flux_fill import packing
from visualcloze_deft.backbones.flux_fill.loading import load_models, load_transformer
from visualcloze_deft.data.sources.scenes import Scenes
from visualcloze_deft.errors import UserError
from visualcloze_deft.grids import grid
from visualcloze_deft.grids.cell_sizes import cell_size
from visualcloze_deft.grids.prompt import CONTENT_PREFIX, layout_sentence
from visualcloze_deft.inference import acceleration
from visualcloze_deft.inference.arguments import enough_memory
from visualcloze_deft.inference.request import request
from visualcloze_deft.inference.upsampling import Upsampling
from visualcloze_deft.sampling import denoising

STEPS = 4


@pytest.fixture(scope="module")
def pipe(micro_model: Path) -> InContextPipeline:
    return InContextPipeline.from_pretrained(str(micro_model))


def scene_rows(count: int = 2, size: int = 32) -> list[list[Image.Image | None]]:
    source = Scenes(size=size, seed=5)
    rows = [[source.item(k).image("depth"), source.item(k).image("target")] for k in range(count)]
    return [*rows[:-1], [rows[-1][0], None]]


def test_latents_follow_diffusers_step_by_step(micro_model: Path) -> None:
    """The same weights, text and noise: diffusers' pipeline on a single-target grid."""
    theirs = diffusers.VisualClozeGenerationPipeline.from_pretrained(micro_model)
    with torch.no_grad():
        theirs.vae.encoder.conv_out.bias[16:] = -30.0  # its draw of known latents is the mode
        theirs.vae.encoder.conv_out.weight[16:] = 0.0
    models = load_models(str(micro_model))
    rows = scene_rows()
    task, content = "From depth to photo.", "a red ball"
    seen_by_them: list[torch.Tensor] = []

    def keep(_pipe, _step, _time, tensors):
        seen_by_them.append(tensors["latents"])
        return tensors

    length = theirs.tokenizer_2.model_max_length
    theirs.set_progress_bar_config(disable=True)
    theirs(
        task_prompt=task,
        content_prompt=content,
        image=rows,
        num_inference_steps=STEPS,
        guidance_scale=30.0,
        generator=torch.Generator().manual_seed(3),
        max_sequence_length=length,
        output_type="latent",
        callback_on_step_end=keep,
    )
    built = grid.build(rows, resolution=32)
    latents = models.encode_grids([built], clean=False)
    generator = torch.Generator().manual_seed(3)
    for height, width in built.shape:  # what diffusers drew for its known latents
        torch.randn(1, 16, height // 8, width // 8, generator=generator)
    noise = torch.randn(latents.seen.shape, generator=generator)
    layout = (layout_sentence(2, 2),)  # diffusers' prompt holds a tuple
    text = models.encode_text([f"{layout} {task} {CONTENT_PREFIX} {content}"])
    given = denoising.Conditions(latents=latents, text=text)
    velocity = denoising.predictor(models, given, guidance=30.0)
    times, x = models.times(STEPS, noise.shape[1]), noise
    with torch.no_grad():
        for k in range(STEPS):
            x = denoising.denoise(velocity, x, times[k : k + 2])
            torch.testing.assert_close(x, seen_by_them[k], atol=1e-4, rtol=1e-4)


def test_the_same_seed_gives_the_same_image_whatever_else_is_asked(
    pipe: InContextPipeline, tmp_path: Path
) -> None:
    entries = []
    for k, seed in enumerate([7, 8]):
        rows = scene_rows(k + 1)
        names = [
            [None if image is None else f"{k}{r}{c}.png" for c, image in enumerate(row)]
            for r, row in enumerate(rows)
        ]
        for row, line in zip(rows, names, strict=True):
            for image, name in zip(row, line, strict=True):
                if image is not None:
                    image.save(tmp_path / name)
        entries.append({"task": "depth-to-image", "rows": names, "seed": seed})
    (tmp_path / "both.json").write_text(json.dumps(entries))
    (tmp_path / "one.json").write_text(json.dumps(entries[1]))
    both = pipe(tmp_path / "both.json", num_inference_steps=2)
    (one,) = pipe(tmp_path / "one.json", num_inference_steps=2)
    assert both[1].tobytes() == one.tobytes()
    (direct,) = pipe(rows=scene_rows(2), task="depth-to-image", seed=8, num_inference_steps=2)
    assert direct.tobytes() == one.tobytes()
    (other,) = pipe(rows=scene_rows(2), task="depth-to-image", seed=9, num_inference_steps=2)
    assert other.tobytes() != one.tobytes()


def test_a_grid_in_a_batch_equals_the_grid_alone(pipe: InContextPipeline) -> None:
    grids = [grid.build(scene_rows(2), resolution=32) for _ in range(2)]
    prompts = ["one", "two"]
    together = denoising.generate(pipe.models, grids, prompts, seeds=[1, 2], steps=2)
    alone = denoising.generate(pipe.models, grids[1:], prompts[1:], seeds=[2], steps=2)
    difference = torch.tensor(list(together[1][0].tobytes())).int() - torch.tensor(
        list(alone[0][0].tobytes())
    )
    assert difference.abs().max() <= 1


def test_several_targets_anywhere_come_back_in_order(pipe: InContextPipeline) -> None:
    full = [image for image in scene_rows(2)[0] if image is not None]
    images = pipe(rows=[[*full, full[0]], [None, full[1], None]], num_inference_steps=1)
    assert [image.size for image in images] == [(32, 32)] * 2


def test_a_cell_keeps_the_aspect_of_its_row(pipe: InContextPipeline) -> None:
    wide = Image.new("RGB", (128, 64), "red")
    (image,) = pipe(rows=[[wide, None]], num_inference_steps=1, resolution=64)
    assert image.size == cell_size((128, 64), 64)
    assert image.width > image.height


def test_resolution_changes_the_size_of_the_answer(pipe: InContextPipeline) -> None:
    for resolution in (32, 48, 64):
        (image,) = pipe(rows=scene_rows(1, 64), num_inference_steps=1, resolution=resolution)
        assert image.size == (resolution, resolution)


def test_an_adapter_trained_on_one_model_works_in_the_pipeline(
    micro_model: Path, tmp_path: Path
) -> None:
    from visualcloze_deft.adapters import files, injection
    from visualcloze_deft.config.run_settings import Adapter

    models = load_models(str(micro_model))
    injection.attach(models.transformer, Adapter(rank=2, method="para"), seed=0)
    files.save(models.transformer, tmp_path, base="micro")
    with_adapter = InContextPipeline.from_pretrained(str(micro_model), adapter=tmp_path)
    without = InContextPipeline.from_pretrained(str(micro_model))
    a, b = (
        p(rows=scene_rows(), num_inference_steps=1)[0].tobytes() for p in (with_adapter, without)
    )
    assert a != b


def test_a_released_lora_is_merged_into_the_base(micro_model: Path, tmp_path: Path) -> None:
    """A LoRA in diffusers' FLUX names: W + B A, and no adapter layers are left."""
    torch.manual_seed(4)
    models = load_models(str(micro_model))
    weight = models.transformer.single_transformer_blocks[0].attn.to_q.weight
    before = weight.detach().clone()
    a, b = torch.randn(4, weight.shape[1]), torch.randn(weight.shape[0], 4)
    prefix = "transformer.single_transformer_blocks.0.attn.to_q"
    from safetensors.torch import save_file

    save_file(
        {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b},
        tmp_path / "pytorch_lora_weights.safetensors",
    )
    merged = load_transformer(str(micro_model), dtype=torch.float32, lora=str(tmp_path))
    after = merged.get_parameter("single_transformer_blocks.0.attn.to_q.weight")
    torch.testing.assert_close(after, before + b @ a, atol=1e-4, rtol=1e-4)


def test_a_lora_of_another_model_is_refused(micro_model: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    prefix = "transformer.single_transformer_blocks.0.attn.to_q"
    path = tmp_path / "pytorch_lora_weights.safetensors"
    tensors = {
        f"{prefix}.lora_A.weight": torch.ones(4, 7),
        f"{prefix}.lora_B.weight": torch.ones(7, 4),
    }
    save_file(tensors, path)
    with pytest.raises(UserError, match="changes a weight of 7 x 7, here it has 32 x 32"):
        load_models(str(micro_model), lora=str(tmp_path))


def test_an_adapter_of_ours_is_no_lora_to_merge(micro_model: Path, tmp_path: Path) -> None:
    from visualcloze_deft.adapters import files, injection
    from visualcloze_deft.config.run_settings import Adapter

    models = load_models(str(micro_model))
    injection.attach(models.transformer, Adapter(rank=2), seed=0)
    files.save(models.transformer, tmp_path, base="micro")
    with pytest.raises(UserError, match="LoRA"):
        load_models(str(micro_model), lora=str(tmp_path))


def test_the_alpha_in_a_loras_metadata_counts(micro_model: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    models = load_models(str(micro_model))
    name = "single_transformer_blocks.0.attn.to_q"
    weight = models.transformer.get_parameter(f"{name}.weight")
    before = weight.detach().clone()
    a, b = torch.randn(4, weight.shape[1]), torch.randn(weight.shape[0], 4)
    config = {"transformer.r": 4, "transformer.lora_alpha": 2, "transformer.target_modules": [name]}
    save_file(
        {f"transformer.{name}.lora_A.weight": a, f"transformer.{name}.lora_B.weight": b},
        tmp_path / "pytorch_lora_weights.safetensors",
        {"lora_adapter_metadata": json.dumps(config)},
    )
    merged = load_transformer(str(micro_model), dtype=torch.float32, lora=str(tmp_path))
    after = merged.get_parameter(f"{name}.weight")
    torch.testing.assert_close(after, before + 0.5 * b @ a, atol=1e-4, rtol=1e-4)


def test_images_of_any_mode_are_read_as_files_are(pipe: InContextPipeline) -> None:
    deep = Image.fromarray(np.full((32, 32), 257 * 100, np.uint16))
    asked = request([[deep, None]], pipe.tasks)
    assert asked.rows[0][0] is not None
    assert asked.rows[0][0].getpixel((0, 0)) == (100, 100, 100)


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_inference_steps": 0},
        {"guidance_scale": float("nan")},
        {"resolution": 100},
        {"grids": "grid.json"},
    ],
)
def test_a_bad_argument_of_a_call_is_named(pipe: InContextPipeline, wrong: dict[str, Any]) -> None:
    good = Image.new("RGB", (32, 32))
    rows = None if "grids" in wrong else [[good, None]]
    with pytest.raises(UserError):
        pipe(rows=rows, task_prompt="turn it", **wrong)


def test_flux_dev_is_refused_with_the_reason(tmp_path: Path) -> None:
    from micro_model import write_micro_model

    folder = write_micro_model(tmp_path / "dev", in_channels=64)
    with pytest.raises(UserError, match="384 and 64"):
        load_models(str(folder))


def test_a_folder_without_its_parts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="transformer, vae"):
        load_models(str(tmp_path))


def test_words_that_do_not_fit_are_named(pipe: InContextPipeline) -> None:
    assert pipe.models.unread("a red ball") == {}
    unread = pipe.models.unread("red ball " * 40 + "green cone")
    assert unread["T5"].endswith("green cone")
    assert unread["CLIP"].endswith("green cone")


# ---- what a diffusers pipeline does, and what goes beyond it


def counted(pipe: InContextPipeline) -> Counter[str]:
    """How often each network runs from now on."""
    found: Counter[str] = Counter()

    def listen(name: str) -> Any:
        return lambda *_: found.update([name])

    for name in ("text_encoder", "text_encoder_2", "transformer"):
        getattr(pipe, name).register_forward_hook(listen(name))
    pipe.vae.encoder.register_forward_hook(listen("encoder"))
    pipe.vae.decoder.register_forward_hook(listen("decoder"))
    return found


def test_what_is_known_is_encoded_once(micro_model: Path, tmp_path: Path) -> None:
    """Over seeds and calls in memory, over processes on disk; only query strips are decoded."""
    rows = scene_rows(3)
    pipe = InContextPipeline.from_pretrained(str(micro_model), encodings=tmp_path)
    calls = counted(pipe)
    first = pipe(rows=rows, seed=[1, 2], num_inference_steps=2)
    assert calls == {
        "text_encoder": 1,
        "text_encoder_2": 1,
        "encoder": 3,
        "transformer": 4,
        "decoder": 2,
    }
    pipe(rows=rows, seed=3, num_inference_steps=2)
    assert calls["encoder"] == 3
    assert calls["text_encoder_2"] == 1
    other = InContextPipeline.from_pretrained(str(micro_model), encodings=tmp_path)
    calls = counted(other)
    again = other(rows=rows, seed=[1, 2], num_inference_steps=2)
    assert calls == {"transformer": 4, "decoder": 2}
    assert [image.tobytes() for image in again] == [image.tobytes() for image in first]


def test_what_is_kept_in_memory_is_bounded() -> None:
    kept = Recent(most=100)
    for k in range(5):
        kept.write(str(k), torch.full((10,), float(k)))  # 40 bytes
    assert [k for k in range(5) if kept.read(str(k)) is not None] == [3, 4]


@pytest.mark.parametrize("kind", ["pt", "np", "latent"])
def test_output_types_hold_the_same_image(pipe: InContextPipeline, kind: Any) -> None:
    (image,) = pipe(rows=scene_rows(), num_inference_steps=2)
    (found,) = pipe(rows=scene_rows(), num_inference_steps=2, output_type=kind)
    if kind == "latent":
        assert found.shape == (16, 64)
        strip = packing.unpack(found[None], ((32, 64), (32, 64)))[-1]
        found = (pipe.models.decode_latents(strip)[0, :, :, 32:].clamp(-1, 1) + 1) / 2
    values = np.asarray(found if kind == "np" else found.permute(1, 2, 0))
    assert np.abs(values * 255 - np.asarray(image)).max() <= 0.51


def test_a_generator_draws_in_place_of_seeds(pipe: InContextPipeline) -> None:
    rows = scene_rows()
    (seeded,) = pipe(rows=rows, seed=4, num_inference_steps=1)
    draw = torch.Generator().manual_seed(4)
    (drawn,) = pipe(rows=rows, generator=draw, num_inference_steps=1)
    assert drawn.tobytes() == seeded.tobytes()
    grids = [{"rows": rows}] * 2
    each = [torch.Generator().manual_seed(seed) for seed in (9, 4)]
    assert pipe(grids, generator=each, num_inference_steps=1)[1].tobytes() == seeded.tobytes()
    a, b = pipe(grids, generator=torch.Generator().manual_seed(4), num_inference_steps=1)
    assert a.tobytes() != b.tobytes()
    with pytest.raises(UserError, match="2 generators for 1 images"):
        pipe(rows=rows, generator=each)


@pytest.mark.parametrize("way", ["paste", "decode"])
def test_known_cells_come_back(pipe: InContextPipeline, way: Any) -> None:
    rows = [[Image.effect_noise((32, 32), 90).convert("RGB"), None]]
    made = pipe(rows=rows, num_inference_steps=1, known_cells=way)
    known, answer = made.answers[0].row
    assert answer is made[0]
    assert (known.tobytes() == rows[0][0].tobytes()) == (way == "paste")


def test_every_step_is_told_and_what_it_is_told_back_counts(pipe: InContextPipeline) -> None:
    told: list[tuple[int, float]] = []

    def listen(_: Any, step: int, time: torch.Tensor, given: dict[str, torch.Tensor]) -> Any:
        told.append((step, float(time)))
        return {"latents": torch.zeros_like(given["latents"])}

    (found,) = pipe(
        rows=scene_rows(), num_inference_steps=3, callback_on_step_end=listen, output_type="latent"
    )
    assert [step for step, _ in told] == [0, 1, 2]
    assert told[0][1] == 1000
    assert sorted(told, key=lambda one: -one[1]) == told
    assert not found.any()


def test_an_interrupted_call_stops_asking_the_transformer(micro_model: Path) -> None:
    pipe = InContextPipeline.from_pretrained(str(micro_model))
    calls = counted(pipe)

    def stop(pipe: Any, *_: Any) -> dict[str, Any]:
        pipe._interrupt = True
        return {}

    made = pipe(
        rows=scene_rows(),
        seed=[1, 2],
        num_inference_steps=8,
        upsampling=Upsampling(),
        callback_on_step_end=stop,
    )
    assert len(made) == 1
    assert calls["transformer"] == 1
    pipe(rows=scene_rows(), num_inference_steps=8)
    assert calls["transformer"] == 9


def test_known_latents_can_be_drawn(pipe: InContextPipeline) -> None:
    ways = ("mode", "sample", "sample")
    images = [pipe(rows=scene_rows(), num_inference_steps=1, known_latents=way)[0] for way in ways]
    assert images[0].tobytes() != images[1].tobytes()
    assert images[1].tobytes() == images[2].tobytes()


def test_each_target_is_enlarged_in_its_own_way(pipe: InContextPipeline) -> None:
    ways = [Upsampling(height=64, strength=0.5), None, Upsampling(scale=1.5, prompt="a cone")]
    wide = Image.new("RGB", (64, 32), "red")
    images = pipe(
        rows=[[wide, None, None, None]], upsampling=ways, num_inference_steps=2, resolution=32
    )
    plain = pipe(rows=[[wide, None, None, None]], num_inference_steps=2, resolution=32)
    width, height = plain[0].size
    assert images[0].size == (64 * width // height // 16 * 16, 64)
    assert images[1].tobytes() == plain[1].tobytes()
    assert images[2].size == tuple(int(1.5 * side) // 16 * 16 for side in plain[2].size)
    with pytest.raises(UserError, match="3 settings for 1 targets"):
        pipe(rows=scene_rows(), upsampling=ways)


@pytest.mark.parametrize(("strength", "steps"), [(0, 0), (0.01, 1), (0.4, 12), (1, 30)])
def test_strength_says_how_many_steps_are_taken(strength: float, steps: int) -> None:
    assert Upsampling(strength=strength).steps(30) == steps


def test_a_step_cache_starts_anew_with_every_image(micro_model: Path) -> None:
    cached = InContextPipeline.from_pretrained(str(micro_model))
    acceleration.enable(cached, cache="first-block=0.5")
    calls = counted_blocks(cached)
    both = cached(rows=scene_rows(), seed=[1, 2], num_inference_steps=6)
    assert calls["block"] < 12  # of which the cache left some out
    (alone,) = cached(rows=scene_rows(), seed=2, num_inference_steps=6)
    assert alone.tobytes() == both[1].tobytes()


def counted_blocks(pipe: InContextPipeline) -> Counter[str]:
    found: Counter[str] = Counter()
    last = pipe.transformer.single_transformer_blocks[-1].attn
    last.register_forward_hook(lambda *_: found.update(["block"]))
    return found


def test_offloaded_parts_make_the_same_image(micro_model: Path) -> None:
    """Weights that come to the device layer by layer, as accelerate's sequential offloading."""
    (wanted,) = InContextPipeline.from_pretrained(str(micro_model))(
        rows=scene_rows(), num_inference_steps=2
    )
    pipe = InContextPipeline.from_pretrained(str(micro_model))
    for part in ("text_encoder", "text_encoder_2", "transformer", "vae"):
        cpu_offload(getattr(pipe, part), torch.device("cpu"), offload_buffers=True)
    assert all(p.is_meta for p in pipe.transformer.parameters())
    (found,) = pipe(rows=scene_rows(), num_inference_steps=2)
    assert found.tobytes() == wanted.tobytes()
    with pytest.raises(UserError, match="remove_all_hooks"):
        pipe.load_adapter("anywhere")


def test_groups_of_layers_offloaded_make_the_same_image(micro_model: Path) -> None:
    rows = scene_rows()
    (wanted,) = InContextPipeline.from_pretrained(str(micro_model))(
        rows=rows, num_inference_steps=2
    )
    pipe = InContextPipeline.from_pretrained(str(micro_model))
    pipe.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    (found,) = pipe(rows=rows, num_inference_steps=2)
    assert found.tobytes() == wanted.tobytes()


@pytest.mark.processes  # a minute of compiling
def test_compiled_blocks_make_the_same_image(micro_model: Path) -> None:
    images = []
    for compiled in (False, True):
        pipe = InContextPipeline.from_pretrained(str(micro_model))
        acceleration.enable(pipe, compile_blocks=compiled)
        images += pipe(rows=scene_rows(), num_inference_steps=2, output_type="np")
    assert np.abs(images[0] - images[1]).max() < 0.01


def test_tiles_and_attention_backends_work(micro_model: Path) -> None:
    pipe = InContextPipeline.from_pretrained(str(micro_model))
    acceleration.enable(pipe, vae_tiling=True, attention="native")
    assert pipe.vae.use_tiling
    assert len(pipe(rows=scene_rows(), num_inference_steps=1)) == 1
    with pytest.raises(UserError, match="--attention flashy"):
        acceleration.enable(pipe, attention="flashy")


def test_running_out_of_memory_says_what_to_change() -> None:
    said = "out of memory while making 3 grids"
    with pytest.raises(UserError, match=said), enough_memory("making 3 grids"):
        torch.empty(2**60)
    with pytest.raises(RuntimeError, match="something else"), enough_memory("x"):
        raise RuntimeError("something else")


def test_the_same_parts_serve_two_pipelines(pipe: InContextPipeline) -> None:
    other = InContextPipeline(**pipe.components, resolution=32)
    a, b = (p(rows=scene_rows(), num_inference_steps=1, resolution=32)[0] for p in (pipe, other))
    assert a.tobytes() == b.tobytes()


def test_a_change_of_precision_encodes_anew(micro_model: Path) -> None:
    pipe = InContextPipeline.from_pretrained(str(micro_model))
    pipe(rows=scene_rows(), num_inference_steps=1)
    pipe.to(torch.bfloat16)
    assert pipe(rows=scene_rows(), num_inference_steps=1)[0].size == (32, 32)


def test_an_odd_list_of_grids_is_named(pipe: InContextPipeline) -> None:
    image = Image.new("RGB", (32, 32))
    for odd in ([[image, None]], [{"row": [[image, None]]}], [3]):
        with pytest.raises(UserError, match="grid 1"):
            pipe(odd)
    for odd in ({"scale": 2}, [{"scale": 2}]):
        with pytest.raises(UserError, match="expected Upsampling"):
            pipe([{"rows": [[image, None]], "upsampling": odd}])
