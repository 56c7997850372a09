"""Inference: agreement with diffusers where diffusers is right, and the promises of the API."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from visualcloze_deft import InContextPipeline, grid, sample
from visualcloze_deft.batch import encode_grids
from visualcloze_deft.cells import cell_size
from visualcloze_deft.data.scenes import Scenes
from visualcloze_deft.errors import UserError
from visualcloze_deft.gridfile import request
from visualcloze_deft.models import load_models, merge_lora
from visualcloze_deft.prompt import CONTENT_PREFIX, layout_sentence

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
    latents = encode_grids(models, [built], clean=False)
    generator = torch.Generator().manual_seed(3)
    for height, width in built.shape:  # what diffusers drew for its known latents
        torch.randn(1, 16, height // 8, width // 8, generator=generator)
    noise = torch.randn(latents.seen.shape, generator=generator)
    layout = (layout_sentence(2, 2),)  # diffusers' prompt holds a tuple
    text, pooled = models.encode_text([f"{layout} {task} {CONTENT_PREFIX} {content}"])
    velocity = sample.velocity_of(models, latents, text, pooled, guidance=30.0)
    times, x = models.times(STEPS, noise.shape[1]), noise
    with torch.no_grad():
        for k in range(STEPS):
            x = sample.denoise(velocity, x, times[k : k + 2])
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
    both = pipe(tmp_path / "both.json", steps=2)
    (one,) = pipe(tmp_path / "one.json", steps=2)
    assert both[1].tobytes() == one.tobytes()
    (direct,) = pipe(rows=scene_rows(2), task="depth-to-image", seed=8, steps=2)
    assert direct.tobytes() == one.tobytes()
    (other,) = pipe(rows=scene_rows(2), task="depth-to-image", seed=9, steps=2)
    assert other.tobytes() != one.tobytes()


def test_a_grid_in_a_batch_equals_the_grid_alone(pipe: InContextPipeline) -> None:
    grids = [grid.build(scene_rows(2), resolution=32) for _ in range(2)]
    prompts = ["one", "two"]
    together = sample.generate(pipe.models, grids, prompts, seeds=[1, 2], steps=2)
    alone = sample.generate(pipe.models, grids[1:], prompts[1:], seeds=[2], steps=2)
    difference = torch.tensor(list(together[1][0].tobytes())).int() - torch.tensor(
        list(alone[0][0].tobytes())
    )
    assert difference.abs().max() <= 1


def test_several_targets_anywhere_come_back_in_order(pipe: InContextPipeline) -> None:
    full = [image for image in scene_rows(2)[0] if image is not None]
    images = pipe(rows=[[*full, full[0]], [None, full[1], None]], steps=1)
    assert [image.size for image in images] == [(32, 32)] * 2


def test_a_cell_keeps_the_aspect_of_its_row(pipe: InContextPipeline) -> None:
    wide = Image.new("RGB", (128, 64), "red")
    (image,) = pipe(rows=[[wide, None]], steps=1, resolution=64)
    assert image.size == cell_size((128, 64), 64)
    assert image.width > image.height


def test_resolution_changes_the_size_of_the_answer(pipe: InContextPipeline) -> None:
    for resolution in (32, 48, 64):
        (image,) = pipe(rows=scene_rows(1, 64), steps=1, resolution=resolution)
        assert image.size == (resolution, resolution)


def test_an_adapter_trained_on_one_model_works_in_the_pipeline(
    micro_model: Path, tmp_path: Path
) -> None:
    from visualcloze_deft import adapters
    from visualcloze_deft.settings import Adapter

    models = load_models(str(micro_model))
    adapters.attach(models.transformer, Adapter(rank=2, method="para"), seed=0)
    adapters.save(models.transformer, tmp_path, base="micro")
    with_adapter = InContextPipeline.from_pretrained(str(micro_model), adapter=tmp_path)
    without = InContextPipeline.from_pretrained(str(micro_model))
    a, b = (p(rows=scene_rows(), steps=1)[0].tobytes() for p in (with_adapter, without))
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
    merge_lora(models.transformer, str(tmp_path))
    after = dict(models.transformer.named_parameters())[
        "single_transformer_blocks.0.attn.to_q.weight"
    ]
    torch.testing.assert_close(after, before + b @ a, atol=1e-4, rtol=1e-4)


def test_a_lora_of_another_model_is_refused(micro_model: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    prefix = "transformer.single_transformer_blocks.0.attn.to_q"
    path = tmp_path / "pytorch_lora_weights.safetensors"
    tensors = {
        f"{prefix}.lora_A.weight": torch.zeros(4, 7),
        f"{prefix}.lora_B.weight": torch.zeros(7, 4),
    }
    save_file(tensors, path)
    with pytest.raises(UserError, match="does not fit"):
        load_models(str(micro_model), lora=str(tmp_path))


def test_an_adapter_of_ours_is_no_lora_to_merge(micro_model: Path, tmp_path: Path) -> None:
    from visualcloze_deft import adapters
    from visualcloze_deft.settings import Adapter

    models = load_models(str(micro_model))
    adapters.attach(models.transformer, Adapter(rank=2), seed=0)
    adapters.save(models.transformer, tmp_path, base="micro")
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
    merge_lora(models.transformer, str(tmp_path))
    after = models.transformer.get_parameter(f"{name}.weight")
    torch.testing.assert_close(after, before + 0.5 * b @ a, atol=1e-4, rtol=1e-4)


def test_images_of_any_mode_are_read_as_files_are(pipe: InContextPipeline) -> None:
    deep = Image.fromarray(np.full((32, 32), 257 * 100, np.uint16))
    asked = request([[deep, None]], pipe.tasks)
    assert asked.rows[0][0] is not None
    assert asked.rows[0][0].getpixel((0, 0)) == (100, 100, 100)


@pytest.mark.parametrize(
    "wrong", [{"steps": 0}, {"guidance": float("nan")}, {"resolution": 100}, {"file": "grid.json"}]
)
def test_a_bad_argument_of_a_call_is_named(pipe: InContextPipeline, wrong: dict[str, Any]) -> None:
    good = Image.new("RGB", (32, 32))
    rows = None if "file" in wrong else [[good, None]]
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
