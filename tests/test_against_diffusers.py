"""Side by side with diffusers' VisualClozePipeline on the same weights: equal where it is right,
and each of its defects, which fails there and does not here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from bench_infer import memory_of_tokens
from PIL import Image

from visualcloze_deft import InContextPipeline
from visualcloze_deft.backbones.flux_fill.model import Models
from visualcloze_deft.data.sources.scenes import Scenes
from visualcloze_deft.errors import UserError
from visualcloze_deft.grids.prompt import CONTENT_PREFIX, layout_sentence
from visualcloze_deft.inference.upsampling import Upsampling, upsample

TASK, CONTENT = "From depth to photo.", "a red ball"
Rows = list[list[Image.Image | None]]


@pytest.fixture(scope="module")
def ours(micro_model: Path) -> InContextPipeline:
    pipe = InContextPipeline.from_pretrained(str(micro_model))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def theirs(micro_model: Path) -> Any:
    """The generating half; with the whole, every test would upsample as well."""
    pipe = diffusers.VisualClozeGenerationPipeline.from_pretrained(micro_model, resolution=32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def scene_rows(size: tuple[int, int] = (32, 32), first: int = 0) -> Rows:
    source = Scenes(size=32, seed=5)
    images = [
        source.item(first + k).image(role).resize(size)
        for k in range(2)
        for role in ("depth", "target")
    ]
    return [images[:2], [images[2], None]]


def theirs_made(theirs: Any, rows: Rows, *, seed: int = 3, **options: Any) -> Any:
    given = {
        "task_prompt": TASK,
        "content_prompt": CONTENT,
        "image": rows,
        "generator": torch.Generator().manual_seed(seed),
    }
    usual = {"num_inference_steps": 2, "max_sequence_length": theirs.tokenizer_2.model_max_length}
    return theirs(**(given | usual | options)).images


def as_they_read(ours: InContextPipeline, rows: Rows) -> dict[str, torch.Tensor]:
    """Embeddings of the text that reaches their encoders."""
    layout = (layout_sentence(len(rows), len(rows[0])),)
    text, pooled = ours.encode_prompt(f"{layout} {TASK} {CONTENT_PREFIX} {CONTENT}")
    return {"prompt_embeds": text, "pooled_prompt_embeds": pooled}


def difference(one: Image.Image, other: Image.Image) -> int:
    assert one.size == other.size
    return int(np.abs(np.asarray(one).astype(int) - np.asarray(other).astype(int)).max())


@pytest.mark.parametrize("size", [(32, 32), (64, 32), (32, 64)])
@pytest.mark.parametrize("rows_above", [0, 1])
def test_the_same_image_where_diffusers_is_right(
    ours: InContextPipeline, theirs: Any, size: tuple[int, int], rows_above: int
) -> None:
    """One target, their text, known latents drawn as they draw them: the whole way to the pixels,
    from nothing but the seed."""
    rows = scene_rows(size)[1 - rows_above :]
    ((wanted,),) = theirs_made(theirs, rows)
    (found,) = ours(
        rows=rows,
        seed=3,
        num_inference_steps=2,
        resolution=32,
        known_latents="sample",
        **as_they_read(ours, rows),
    )
    assert difference(found, wanted) <= 1


def test_upsampling_is_that_of_flux_fill(micro_model: Path) -> None:
    theirs = diffusers.FluxFillPipeline.from_pretrained(micro_model)
    theirs.set_progress_bar_config(disable=True)
    with torch.no_grad():
        theirs.vae.encoder.conv_out.bias[16:] = -30.0  # its draw of known latents is the mode
        theirs.vae.encoder.conv_out.weight[16:] = 0.0
    pipe = InContextPipeline.from_pretrained(str(micro_model))
    image = Scenes(size=32, seed=5).item(0).image("target")
    how = Upsampling(width=64, height=48, strength=0.5)
    wanted = theirs(
        prompt=CONTENT,
        image=image,
        mask_image=Image.new("RGB", image.size, "white"),
        width=64,
        height=48,
        strength=how.strength,
        num_inference_steps=4,
        guidance_scale=30.0,
        generator=torch.Generator().manual_seed(5),
        max_sequence_length=theirs.tokenizer_2.model_max_length,
        output_type="pt",
    ).images[0]
    draw = torch.Generator().manual_seed(5)
    torch.randn(1, 16, 6, 8, generator=draw)  # what they draw the image's latents with
    text = pipe.models.encode_text([CONTENT])
    with torch.no_grad():
        found = upsample(
            pipe.models,
            image,
            how,
            text=text,
            draw=draw,
            steps=4,
            guidance=30.0,
        )
    torch.testing.assert_close((found.clamp(-1, 1) + 1) / 2, wanted, atol=2e-3, rtol=0)


# ---- defects of diffusers 0.42.1


def test_no_generator_is_needed(ours: InContextPipeline, theirs: Any) -> None:
    with pytest.raises(TypeError):
        theirs_made(theirs, scene_rows(), generator=None)
    assert len(ours(rows=scene_rows(), num_inference_steps=1)) == 1


def test_the_text_is_text_and_not_a_tuple(
    ours: InContextPipeline, theirs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    kind = type(theirs.tokenizer_2)
    tokenise = kind.__call__

    def listen(self: Any, text: Any, *args: Any, **options: Any) -> Any:
        read.extend([text] if isinstance(text, str) else text)
        return tokenise(self, text, *args, **options)

    monkeypatch.setattr(kind, "__call__", listen)
    theirs_made(theirs, scene_rows())
    assert any(text.startswith("('A grid layout") for text in read)
    read.clear()
    ours(rows=scene_rows(), task_prompt=TASK, content_prompt=CONTENT, num_inference_steps=1)
    assert read
    assert set(read) == {f"{layout_sentence(2, 2)} {TASK} {CONTENT_PREFIX} {CONTENT}"}


def test_embeddings_are_taken_for_text(ours: InContextPipeline, theirs: Any) -> None:
    own = as_they_read(ours, scene_rows())
    with pytest.raises(ValueError, match="task_prompt"):
        theirs_made(theirs, scene_rows(), task_prompt=None, content_prompt=None, **own)
    (told,) = ours(
        rows=scene_rows(), task_prompt=TASK, content_prompt=CONTENT, num_inference_steps=2
    )
    text, pooled = ours.encode_prompt(f"{layout_sentence(2, 2)} {TASK} {CONTENT_PREFIX} {CONTENT}")
    (embedded,) = ours(
        rows=scene_rows(), prompt_embeds=text, pooled_prompt_embeds=pooled, num_inference_steps=2
    )
    assert embedded.tobytes() == told.tobytes()
    with pytest.raises(UserError, match="together"):
        ours(rows=scene_rows(), prompt_embeds=text)


def test_latents_are_not_ignored(ours: InContextPipeline, theirs: Any) -> None:
    noises = [torch.randn(1, 16, 64, generator=torch.Generator().manual_seed(k)) for k in (1, 2)]
    a, b = (theirs_made(theirs, scene_rows(), latents=noise)[0][0] for noise in noises)
    assert a.tobytes() == b.tobytes()
    a, b, again = (
        ours(rows=scene_rows(), latents=noise, num_inference_steps=2)[0].tobytes()
        for noise in [*noises, noises[0]]
    )
    assert a != b
    assert a == again


def test_two_landscape_targets_stay_landscape(ours: InContextPipeline, theirs: Any) -> None:
    wide = [Image.new("RGB", (64, 32), colour) for colour in ("red", "green", "blue")]
    rows: Rows = [list(wide), [wide[0], None, None]]
    assert all(image.width < image.height for image in theirs_made(theirs, rows)[0])
    assert all(image.width > image.height for image in ours(rows=rows, num_inference_steps=1))


def test_grids_of_different_sizes_go_together(ours: InContextPipeline, theirs: Any) -> None:
    several = [scene_rows(), scene_rows((64, 32))[1:], scene_rows((32, 64))]
    with pytest.raises((RuntimeError, ValueError)):
        theirs_made(theirs, several[:2], task_prompt=[TASK] * 2, content_prompt=[CONTENT] * 2)
    together = ours(
        [{"rows": rows, "seed": k} for k, rows in enumerate(several)],
        num_inference_steps=2,
        batch_size=3,
    )
    for k, rows in enumerate(several):
        (alone,) = ours(rows=rows, seed=k, num_inference_steps=2)
        assert difference(together[k], alone) <= 1


def test_transposed_grids_have_ids_of_their_own(ours: InContextPipeline, theirs: Any) -> None:
    """As many tokens, other places: theirs is then not what it is alone."""
    several = [scene_rows((64, 32)), scene_rows((32, 64))]
    told = {"task_prompt": [TASK] * 2, "content_prompt": [CONTENT] * 2}

    def draws(*seeds: int) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    mixed = theirs_made(theirs, several, generator=draws(1, 2), **told)[1][0]
    alone = theirs_made(theirs, several[1], generator=draws(2)[0])[0][0]
    assert difference(mixed, alone) > 2
    grids = [{"rows": rows, "seed": k} for k, rows in enumerate(several)]
    both = ours(grids, num_inference_steps=2, batch_size=2)
    (own,) = ours(rows=several[1], seed=1, num_inference_steps=2)
    assert difference(both[1], own) <= 1


def test_several_images_of_several_grids_are_not_mixed_up(
    ours: InContextPipeline, theirs: Any
) -> None:
    several = [scene_rows(first=0), scene_rows(first=2)]
    prompts = [TASK, "Something else entirely, at length."]
    draws = [torch.Generator().manual_seed(k) for k in range(4)]
    mixed = theirs_made(
        theirs,
        several,
        generator=draws,
        task_prompt=prompts,
        content_prompt=[CONTENT] * 2,
        num_images_per_prompt=2,
    )
    second = theirs_made(theirs, several[0], seed=1)  # prompt 0's second image, were it of grid 0
    assert difference(mixed[1][0], second[0][0]) > 2
    grids = [
        {"rows": rows, "task_prompt": prompt} for rows, prompt in zip(several, prompts, strict=True)
    ]
    made = ours(grids, seed=5, num_images_per_prompt=2, num_inference_steps=2, batch_size=4)
    assert [(a.grid, a.seed) for a in made.answers] == [(0, 5), (0, 6), (1, 5), (1, 6)]
    for answer in made.answers:
        (alone,) = ours(
            rows=several[answer.grid],
            task_prompt=prompts[answer.grid],
            seed=answer.seed,
            num_inference_steps=2,
        )
        assert difference(answer.images[0], alone) <= 1


def test_a_strength_of_0_gives_images(ours: InContextPipeline, micro_model: Path) -> None:
    whole = diffusers.VisualClozePipeline.from_pretrained(micro_model, resolution=32)
    whole.generation_pipe.set_progress_bar_config(disable=True)
    (odd,) = whole(
        TASK,
        CONTENT,
        scene_rows(),
        upsampling_strength=0,
        return_dict=False,
        num_inference_steps=1,
        generator=torch.Generator().manual_seed(0),
        max_sequence_length=whole.tokenizer_2.model_max_length,
    )
    assert not isinstance(odd, list)
    (plain,) = ours(rows=scene_rows(), num_inference_steps=1)
    way = Upsampling(scale=2, strength=0)
    (enlarged,) = ours(rows=scene_rows(), num_inference_steps=1, upsampling=way)
    resized = plain.resize((64, 64), Image.Resampling.LANCZOS)
    assert difference(enlarged, resized) == 0


def test_rows_that_are_no_grid_are_named(ours: InContextPipeline, theirs: Any) -> None:
    image = Image.new("RGB", (32, 32))
    ragged: Rows = [[image, image], [image]]
    full: Rows = [[image, image], [image, image]]
    with pytest.raises((ValueError, RuntimeError, IndexError, TypeError)) as obscure:
        theirs_made(theirs, ragged)
    assert "length" not in str(obscure.value)
    with pytest.raises(UserError, match="row 1 has 2 images, row 2 has 1"):
        ours(rows=ragged)
    assert theirs_made(theirs, full) == [[]]  # after all sampling steps
    with pytest.raises(UserError, match="no target"):
        ours(rows=full)


def test_the_words_said_to_be_cut_are_those_that_are_cut(
    ours: InContextPipeline, theirs: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """T5 reads more than CLIP: what only CLIP cuts is not said to be cut for T5."""
    models: Models = ours.models
    words = [f"word{k} red" for k in range(60)]
    cut = models.unread(" ".join(words))
    for encoder, tokenizer, most in (
        ("T5", models.tokenizer_2, models.text_length),
        ("CLIP", models.tokenizer, models.tokenizer.model_max_length),
    ):
        ids = tokenizer(" ".join(words), truncation=True, max_length=most).input_ids
        kept = tokenizer.decode(ids, skip_special_tokens=True)
        whole = tokenizer.decode(tokenizer(" ".join(words)).input_ids, skip_special_tokens=True)
        joined = (kept + cut[encoder]).replace(" ", "")
        assert joined == whole.replace(" ", "")


def test_memory_grows_with_tokens_and_no_faster() -> None:
    """At FLUX's width, in bytes of living tensors: attention keeps no tokens x tokens matrix."""
    two, three, four = memory_of_tokens()
    assert [one["tokens"] for one in (two, three, four)] == [2304, 5184, 9216]
    first, second = (
        (b["memory"] - a["memory"]) / (b["tokens"] - a["tokens"])
        for a, b in ((two, three), (three, four))
    )
    assert second < 1.1 * first
