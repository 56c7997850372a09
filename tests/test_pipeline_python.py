"""The Python API as users of diffusers write it: pictures of any kind, LoRA files, a push."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import VisualClozePipeline
from hub_cache import in_hub_cache
from hub_server import TOKEN, hub_server, use
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file

from visualcloze_deft import InContextPipeline
from visualcloze_deft.adapters import files, injection
from visualcloze_deft.adapters.export import export
from visualcloze_deft.backbones.flux_fill.loading import load_models
from visualcloze_deft.config.run_settings import Adapter
from visualcloze_deft.errors import UserError
from visualcloze_deft.inference.upsampling import Upsampling

NOISE = Image.effect_noise((48, 32), 90).convert("RGB")
PIXELS = np.asarray(NOISE)


@pytest.fixture(scope="module")
def pipe(micro_model: Path) -> InContextPipeline:
    return InContextPipeline.from_pretrained(str(micro_model), device="cpu")


@pytest.fixture(scope="module")
def adapter(micro_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DEFT adapter that changes much, in the folder `demo/adapter`."""
    transformer = load_models(str(micro_model)).transformer
    injection.attach(transformer, Adapter(rank=3), seed=0)
    random = torch.Generator().manual_seed(1)
    for parameter in injection.trainable(transformer).values():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=random)
    folder = tmp_path_factory.mktemp("runs") / "demo" / "adapter"
    folder.mkdir(parents=True)
    files.save(transformer, folder, base=str(micro_model))
    return folder


@pytest.fixture(scope="module")
def lora(adapter: Path) -> Path:
    """The same as a LoRA file of diffusers."""
    return export(adapter, adapter.parent / "lora.safetensors", "diffusers", verify=False).path


def made(pipe: InContextPipeline, cell: Any = NOISE, **options: Any) -> Image.Image:
    found: Image.Image = pipe(rows=[[cell, None]], num_inference_steps=2, **options)[0]
    return found


def close(one: Image.Image, other: Image.Image) -> bool:
    return bool(np.abs(np.asarray(one).astype(int) - np.asarray(other)).max() <= 1)


# ---- pictures


WAYS: dict[str, Any] = {
    "bytes": PIXELS,
    "bytes behind an axis of 1": PIXELS[None],
    "floats": PIXELS / 255,
    "tensor of floats": torch.from_numpy(PIXELS / 255).permute(2, 0, 1),
    "tensor of bytes": torch.from_numpy(PIXELS.copy()).permute(2, 0, 1)[None],
    "opaque": np.dstack([PIXELS, np.full(PIXELS.shape[:2], 255, np.uint8)]),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_picture_is_the_same_in_any_form(pipe: InContextPipeline, way: str) -> None:
    assert made(pipe, WAYS[way]).tobytes() == made(pipe).tobytes()


def test_a_path_is_read_as_a_grid_file_reads_it(pipe: InContextPipeline, tmp_path: Path) -> None:
    """Also in the sense of its role: 16 bits of depth are distances, near is bright."""
    deep = Image.fromarray(np.linspace(500, 9000, 32 * 32).astype(np.uint16).reshape(32, 32))
    deep.save(tmp_path / "depth.png")
    NOISE.save(tmp_path / "photo.png")
    rows = [["depth.png", "photo.png"], ["depth.png", None]]
    (tmp_path / "grid.json").write_text(json.dumps({"task": "depth-to-image", "rows": rows}))
    (wanted,) = pipe(tmp_path / "grid.json", num_inference_steps=1)
    paths = [[name and tmp_path / name for name in row] for row in rows]
    texts = [[name and str(tmp_path / name) for name in row] for row in rows]
    for given in (paths, texts):
        (found,) = pipe(rows=given, task="depth-to-image", num_inference_steps=1)
        assert found.tobytes() == wanted.tobytes()
    one = {"rows": paths, "task": "depth-to-image"}
    assert pipe(one, num_inference_steps=1)[0].tobytes() == wanted.tobytes()


def test_grey_true_and_false_and_half_floats_are_pictures(pipe: InContextPipeline) -> None:
    grey = np.asarray(NOISE.convert("L"))
    as_colours = NOISE.convert("L").convert("RGB")
    for way in (grey, grey[..., None], torch.from_numpy(grey.copy())[None]):
        assert made(pipe, way).tobytes() == made(pipe, as_colours).tobytes()
    white = Image.new("RGB", (32, 32), "white")
    assert made(pipe, np.ones((32, 32), bool)).tobytes() == made(pipe, white).tobytes()
    half = torch.full((3, 32, 32), 0.5, dtype=torch.bfloat16, requires_grad=True)
    assert made(pipe, half).tobytes() == made(pipe, Image.new("RGB", (32, 32), "#808080")).tobytes()


@pytest.mark.parametrize(
    ("cell", "words"),
    [
        (5, "row 1, image 1: int is no picture"),
        ("http://host/a.png", "web address; download it"),
        ("gone.png", "gone.png: no such image"),
        (PIXELS * 1.0, "row 1, image 1: values from 0 to 255; give floats from 0 to 1"),
        (PIXELS.astype(np.int64), "values of type int64; give uint8"),
        (np.full((32, 32), np.nan), "values from nan"),
        (np.zeros((3, 32, 32)), r"shape \(3, 32, 32\); give \(h, w, 3\)"),
        (np.zeros((0, 32, 3)), "no pixels"),
        (torch.zeros(2, 3, 32, 32), r"shape \(2, 3, 32, 32\); give \(3, h, w\)"),
    ],
)
def test_what_is_no_picture_is_named(pipe: InContextPipeline, cell: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        made(pipe, cell)


def test_a_number_is_the_scale_of_upsampling(pipe: InContextPipeline) -> None:
    wanted = made(pipe, upsampling=Upsampling(scale=1.5))
    assert made(pipe, upsampling=1.5).tobytes() == wanted.tobytes()
    two = pipe(rows=[[NOISE, None, None]], upsampling=[2, None], num_inference_steps=1)
    assert two[0].width == 2 * two[1].width
    (entry,) = pipe([{"rows": [[NOISE, None]], "upsampling": 2}], num_inference_steps=1)
    assert entry.size == two[0].size


@pytest.mark.parametrize(
    "wrong",
    [
        {"seed": 1.5},
        {"seed": "3"},
        {"task": 3},
        {"task_prompt": 3},
        {"num_images_per_prompt": "2"},
        {"num_inference_steps": 2.5},
        {"num_inference_steps": "4"},
        {"guidance_scale": "x"},
        {"resolution": 100.5},
        {"batch_size": 0},
        {"upsampling": "2"},
        {"upsampling": 0},
        {"upsampling": True},
        {"output_type": "jpg"},
        {"latents": 5},
        {"latents": torch.zeros(2, 3)},
        {"generator": 5},
        {"prompt_embeds": torch.zeros(1, 3, 16)},
        {"prompt_embeds": "x", "pooled_prompt_embeds": "y"},
        {"rows": [NOISE, None]},
        {"rows": "a.png"},
        {"grids": 5},
        {"known_cells": "x"},
    ],
)
def test_a_message_begins_with_the_argument_that_is_wrong(
    pipe: InContextPipeline, wrong: dict[str, Any]
) -> None:
    name = next(iter(wrong))
    rows = {} if "grids" in wrong else {"rows": [[NOISE, None]]}
    with pytest.raises(UserError) as raised:
        pipe(**rows | wrong)
    assert str(raised.value).startswith(name.removesuffix("s") if name == "rows" else name)


@pytest.mark.parametrize(
    "wrong",
    [
        {"quantise": "int3"},
        {"cells": "round"},
        {"clip_text": "all"},
        {"resolution": 100},
        {"dtype": "float32"},
        {"device": "gpu0"},
        {"adapter": "gone"},
        {"adapter": 5},
        {"adapter": [5]},
    ],
)
def test_loading_names_the_argument_that_is_wrong(micro_model: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError) as raised:
        InContextPipeline.from_pretrained(micro_model, **wrong)
    assert str(raised.value).startswith(next(iter(wrong)))


# ---- adapters


def test_a_lora_file_is_the_adapter_it_was_exported_from(
    micro_model: Path, adapter: Path, lora: Path, pipe: InContextPipeline
) -> None:
    """Loaded by every method, given at the start, and taken off again."""
    base = made(pipe)
    assert pipe.load_adapter(adapter) == "demo"
    wanted = made(pipe)
    assert not close(wanted, base)
    pipe.unload_lora_weights()
    assert made(pipe).tobytes() == base.tobytes()
    ways: dict[str, Any] = {
        "lora": lambda: pipe.load_adapter(lora),
        "one": lambda: pipe.load_lora_weights(lora, "one"),
        "two": lambda: pipe.load_lora_weights(
            str(lora.parent), weight_name="lora.safetensors", adapter_name="two"
        ),
        "default_0": lambda: pipe.load_lora_weights(load_file(lora)),
    }
    for name, load in ways.items():
        assert load() == name
        assert pipe.get_active_adapters() == [name]
        assert close(made(pipe), wanted)
        pipe.unload_lora_weights()
        assert pipe.get_active_adapters() == []
    for given in (lora, [lora], {lora: 1.0}, str(lora)):
        started = InContextPipeline.from_pretrained(micro_model, adapter=given)
        assert started.get_active_adapters() == ["lora"]
        assert close(made(started), wanted)


def test_an_adapter_folder_is_taken_where_a_lora_is(adapter: Path, pipe: InContextPipeline) -> None:
    pipe.load_adapter(adapter)
    wanted = made(pipe)
    pipe.unload_lora_weights()
    for place in (adapter, adapter / "adapter_model.safetensors"):
        pipe.load_lora_weights(place, adapter_name="deft")
        assert made(pipe).tobytes() == wanted.tobytes()
        pipe.unload_lora_weights()


def test_adapters_of_the_hub_are_known_by_their_repository(
    adapter: Path, pipe: InContextPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_hub_cache(adapter, "me/mugs", tmp_path / "cache", monkeypatch)
    assert pipe.load_adapter("me/mugs") == "mugs"
    pipe.unload_lora_weights()
    with pytest.raises(UserError, match="adapter 'someone/gone': no file or folder here; hub id"):
        pipe.load_adapter("someone/gone")


def test_one_scale_may_hold_for_several_adapters(
    adapter: Path, lora: Path, pipe: InContextPipeline
) -> None:
    pipe.load_adapter(adapter, "a")
    wanted = made(pipe)
    pipe.load_lora_weights(lora, adapter_name="b")
    pipe.set_adapters(["a", "b"], 0.5)
    assert close(made(pipe), wanted)
    pipe.unload_lora_weights()


def test_a_file_that_is_not_there_or_in_the_way_is_named(
    lora: Path, pipe: InContextPipeline
) -> None:
    with pytest.raises(UserError, match=r"weight_name 'b\.safetensors': no such file"):
        pipe.load_lora_weights(lora.parent, weight_name="b.safetensors")
    with pytest.raises(UserError, match=r"save_directory .*: a file"):
        pipe.save_pretrained(lora)


def test_an_adapter_is_named_once_and_by_text(adapter: Path, pipe: InContextPipeline) -> None:
    with pytest.raises(UserError, match="adapter_name 5: give text"):
        pipe.load_adapter(adapter, 5)  # type: ignore[arg-type]
    assert pipe.load_adapter(adapter, "a") == "a"
    with pytest.raises(UserError, match=r"adapter_names .*: give each once"):
        pipe.set_adapters(["a", "a"], [1, 2])
    with pytest.raises(UserError, match=r"adapter_weights .*: 2 scales for 1 names"):
        pipe.set_adapters("a", [1, 2])
    pipe.unload_lora_weights()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"a": torch.ones(1)}, "LoRA given as tensors: a is no part of a LoRA"),
        ({"a": 1}, "a is int, not a tensor"),
        ("gone", "LoRA 'gone': no such file or folder, and no hub id"),
        (Path("gone.safetensors"), "no such file"),
    ],
)
def test_what_is_no_lora_is_named(pipe: InContextPipeline, given: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        pipe.load_lora_weights(given)
    assert pipe.get_active_adapters() == []


# ---- the hub


def test_a_pipeline_is_pushed_with_a_card_and_nothing_of_this_machine(
    micro_model: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = InContextPipeline.from_pretrained(micro_model, adapter=adapter)
    wanted = made(pipe)
    with hub_server() as hub:
        use(hub, monkeypatch)
        address = pipe.push_to_hub("me/mugs", token=TOKEN, private=True)
        repository = hub.repos["me/mugs"]
        assert repository.private
        assert "/me/mugs/commit/" in address
        pushed = dict(repository.files)
        repository.files["README.md"] = b"mine"
        pipe.push_to_hub("me/mugs", token=TOKEN)
        assert repository.files["README.md"] == b"mine"
    card = pushed["README.md"].decode()
    assert "library_name: diffusers" in card
    assert 'from_pretrained("me/mugs")' in card
    assert "Merged into its weights: demo (scale 1)." in card
    assert not any(str(micro_model.parent).encode() in content for content in pushed.values())
    for name, content in pushed.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert made(InContextPipeline.from_pretrained(tmp_path)).tobytes() == wanted.tobytes()
    assert VisualClozePipeline.from_pretrained(tmp_path, resolution=32).transformer is not None


def test_what_cannot_be_saved_makes_no_repository(
    micro_model: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside = InContextPipeline.from_pretrained(micro_model, adapter=adapter, merge=False)
    with hub_server() as hub:
        use(hub, monkeypatch)
        with pytest.raises(UserError, match="push_to_hub: adapters stand beside the weights"):
            beside.push_to_hub("me/mugs", token=TOKEN)
        with pytest.raises(UserError, match="weights are safetensors alone"):
            beside.push_to_hub("me/mugs", token=TOKEN, safe_serialization=False)
    assert not hub.repos


def test_a_push_that_the_hub_refuses_is_one_line(
    pipe: InContextPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    with hub_server() as hub:
        use(hub, monkeypatch)
        with pytest.raises(UserError, match="push_to_hub 'me/mugs': the hub does not know the tok"):
            pipe.push_to_hub("me/mugs", token="hf_wrong")
        with pytest.raises(UserError, match="push_to_hub 'a/b/c': no name of a repository"):
            pipe.push_to_hub("a/b/c")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="push_to_hub 'me/mugs': HF_HUB_OFFLINE is set"):
        pipe.push_to_hub("me/mugs")
