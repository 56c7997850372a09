"""LoRA files of other tools: read whole, whatever their names, or refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers.loaders.lora_conversion_utils import _convert_xlabs_flux_lora_to_diffusers
from hub_cache import in_hub_cache
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from visualcloze_deft.adapters import verify
from visualcloze_deft.backbones import lora_files, lora_names
from visualcloze_deft.backbones.flux_fill.loading import load_transformer
from visualcloze_deft.backbones.lora_files import shapes_of
from visualcloze_deft.backbones.lora_names import Change
from visualcloze_deft.backbones.lora_places import lora_file
from visualcloze_deft.backbones.peft_files import CONFIG, WEIGHTS
from visualcloze_deft.cli import main
from visualcloze_deft.errors import UserError

RANK, ALPHA = 2, 4.0  # a reader that drops alpha makes half the change
SINGLE, DOUBLE = "single_transformer_blocks.0", "transformer_blocks.0"
LAYERS = (
    *(f"{SINGLE}.attn.{name}" for name in ("to_q", "to_k", "to_v")),
    *(f"{SINGLE}.{name}" for name in ("proj_mlp", "proj_out")),
    *(f"{DOUBLE}.attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")),
    *(f"{DOUBLE}.ff.net.{name}" for name in ("0.proj", "2")),
)
ONETRAINER = {  # which numbers the parts of a fused layer
    **{LAYERS[k]: f"single_blocks.0.linear1.{k}" for k in range(4)},
    f"{SINGLE}.proj_out": "single_blocks.0.linear2",
    **{LAYERS[5 + k]: f"double_blocks.0.img_attn.qkv.{k}" for k in range(3)},
    f"{DOUBLE}.attn.to_out.0": "double_blocks.0.img_attn.proj",
    f"{DOUBLE}.ff.net.0.proj": "double_blocks.0.img_mlp.0",
    f"{DOUBLE}.ff.net.2": "double_blocks.0.img_mlp.2",
}


@pytest.fixture(scope="module")
def shapes(micro_model: Path) -> lora_names.Shapes:
    return shapes_of(str(micro_model))


@pytest.fixture
def changes(shapes: lora_names.Shapes) -> dict[str, Change]:
    """A down and an up matrix for each layer, whose product counts ALPHA / RANK."""
    random = torch.Generator().manual_seed(0)
    return {
        name: (
            torch.randn(RANK, shapes[name][1], generator=random),
            torch.randn(shapes[name][0], RANK, generator=random),
        )
        for name in LAYERS
    }


def named(
    changes: dict[str, Change],
    name: Callable[[str], str],
    down: str = "lora_A.weight",
    up: str = "lora_B.weight",
) -> dict[str, Tensor]:
    found = {}
    for layer, (a, b) in changes.items():
        found[f"{name(layer)}.{down}"], found[f"{name(layer)}.{up}"] = a.clone(), b.clone()
        found[f"{name(layer)}.alpha"] = torch.tensor(ALPHA)
    return found


def flat(layer: str) -> str:
    return layer.replace(".", "_")


def compiled(layer: str) -> str:
    block, _, rest = layer.partition(".0.")
    return f"transformer.{block}.0._orig_mod.{rest}"


DOWN, UP = "lora_down.weight", "lora_up.weight"
NAMINGS: dict[str, tuple[Callable[[str], str], str, str]] = {
    "bare": (str, "lora_A.weight", "lora_B.weight"),
    "diffusers": ("transformer.{}".format, "lora_A.weight", "lora_B.weight"),
    "old diffusers": ("transformer.{}".format, "lora.down.weight", "lora.up.weight"),
    "compiled": ("transformer._orig_mod.{}".format, "lora_A.weight", "lora_B.weight"),
    "compiled blocks": (compiled, "lora_A.weight", "lora_B.weight"),
    "DDP": ("module.{}".format, "lora_A.weight", "lora_B.weight"),
    "named adapter": ("transformer.{}".format, "lora_A.default.weight", "lora_B.default.weight"),
    "native with lora_down": ("transformer.{}".format, DOWN, UP),
    "peft": ("base_model.model.{}".format, "lora_A.weight", "lora_B.weight"),
    "peft inside": ("transformer.base_model.model.{}".format, "lora_A.weight", "lora_B.weight"),
    "ComfyUI, native": ("diffusion_model.{}".format, "lora_A.weight", "lora_B.weight"),
    "checkpoint": ("model.diffusion_model.{}".format, DOWN, UP),
    "OneTrainer, old": (lambda layer: f"lora_transformer_{flat(layer)}", DOWN, UP),
    "LyCORIS": (lambda layer: f"lycoris_{flat(layer)}", DOWN, UP),
    "kohya, native": (lambda layer: f"lora_unet_{flat(layer)}", DOWN, UP),
    "OneTrainer": (lambda layer: f"transformer.{ONETRAINER[layer]}", DOWN, UP),
}


def check_equal(found: dict[str, Change], changes: dict[str, Change], scale: float) -> None:
    assert set(found) == set(changes)
    for name, (a, b) in changes.items():
        torch.testing.assert_close(found[name][1] @ found[name][0], scale * b @ a, msg=name)


@pytest.mark.parametrize("tool", NAMINGS)
def test_every_naming_gives_the_same_change(
    shapes: lora_names.Shapes, changes: dict[str, Change], tmp_path: Path, tool: str
) -> None:
    file = tmp_path / "lora.safetensors"
    save_file(named(changes, *NAMINGS[tool]), file)
    check_equal(lora_files.read(file, shapes=shapes), changes, ALPHA / RANK)


@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "base_model.model.", "model."])
def test_fused_layers_are_read_behind_any_prefix(
    shapes: lora_names.Shapes, changes: dict[str, Change], tmp_path: Path, prefix: str
) -> None:
    file = tmp_path / "lora.safetensors"
    save_file(named(lora_names.fuse(changes, shapes), lambda layer: prefix + layer), file)
    found = lora_files.read(file, shapes=shapes)
    assert set(found) == set(changes)
    a, b = changes[f"{SINGLE}.proj_out"]
    down, up = found[f"{SINGLE}.proj_out"]
    torch.testing.assert_close(up @ down, ALPHA / RANK * b @ a)
    a, b = changes[f"{SINGLE}.attn.to_v"]  # which has a quarter of the ranks of linear1
    down, up = found[f"{SINGLE}.attn.to_v"]
    torch.testing.assert_close(up @ down, ALPHA / (4 * RANK) * b @ a)


def test_xlabs_names_mean_what_diffusers_takes_them_for(
    shapes: lora_names.Shapes, tmp_path: Path
) -> None:
    width, random = shapes[f"{DOUBLE}.attn.to_q"][0], torch.Generator().manual_seed(0)
    sides = {
        **{f"double_blocks.0.processor.qkv_lora{k}": (width, 3 * width) for k in (1, 2)},
        **{f"double_blocks.0.processor.proj_lora{k}": (width, width) for k in (1, 2)},
        "single_blocks.0.processor.qkv_lora": (width, 3 * width),
        "single_blocks.0.processor.proj_lora": (5 * width, width),
    }
    tensors: dict[str, Tensor] = {}
    for name, (i, o) in sides.items():
        tensors[f"{name}.down.weight"] = torch.randn(RANK, i, generator=random)
        tensors[f"{name}.up.weight"] = torch.randn(o, RANK, generator=random)
    file = tmp_path / "xlabs.safetensors"
    save_file(tensors, file)
    theirs = _convert_xlabs_flux_lora_to_diffusers(tensors)
    found = lora_files.read(file, shapes=shapes)
    assert {f"transformer.{name}.lora_A.weight" for name in found} < set(theirs)
    assert len(theirs) == 2 * len(found)
    for name, (a, b) in found.items():
        up, down = (theirs[f"transformer.{name}.lora_{part}.weight"] for part in "BA")
        torch.testing.assert_close(b @ a, up @ down, msg=name)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(f"{SINGLE}.attn.to_k.lora_B.weight"), rf"{SINGLE}.attn.to_k.* no partner"),
        (lambda t: t.pop(f"{SINGLE}.attn.to_k.lora_A.weight"), rf"{SINGLE}.attn.to_k.* no partner"),
        (
            lambda t: t.update({"single_transformer_blocks.7.proj_mlp.alpha": torch.tensor(1.0)}),
            "blocks.7.* no matrices",
        ),
        (
            lambda t: t.update(
                {k.replace("blocks.0", "blocks.7"): v.clone() for k, v in t.items() if "mlp" in k}
            ),
            "blocks.7.proj_mlp.* is no layer of this transformer",
        ),
        (
            lambda t: t.update({f"transformer.{k}": v.clone() for k, v in t.items()}),
            "are of one layer",
        ),
        (
            lambda t: t.update(
                {
                    k.replace("lora_A", "lora_A.other").replace("lora_B", "lora_B.other"): v.clone()
                    for k, v in t.items()
                    if "lora" in k
                }
            ),
            "are of one layer",
        ),
        (
            lambda t: t.update(
                {
                    "single_blocks.0.linear1.lora_A.weight": torch.ones(1, 32),
                    "single_blocks.0.linear1.lora_B.weight": torch.ones(224, 1),
                }
            ),
            "both change",
        ),
        (lambda t: t.update({f"{SINGLE}.proj_mlp.dora_scale": torch.ones(1)}), "of DoRA"),
        (
            lambda t: t.update({f"{SINGLE}.proj_mlp.lora_magnitude_vector": torch.ones(1)}),
            "of DoRA",
        ),
        (lambda t: t.update({f"{SINGLE}.proj_mlp.lokr_w1": torch.ones(1)}), "of LoKr"),
        (lambda t: t.update({f"{SINGLE}.proj_mlp.lora_mid.weight": torch.ones(1)}), "Tucker"),
        (lambda t: t.update({f"{SINGLE}.proj_mlp.diff_b": torch.ones(1)}), "of whole weights"),
        (lambda t: t.update({f"{SINGLE}.proj_mlp.lora_B.bias": torch.ones(1)}), "of a bias"),
        (lambda t: t.update({f"{SINGLE}.attn.norm_q.weight": torch.ones(1)}), "of a norm"),
        (lambda t: t.update({"bundle_emb.x": torch.ones(1)}), "no part of a LoRA"),
    ],
)
def test_what_would_not_be_used_is_refused_by_name(
    shapes: lora_names.Shapes, changes: dict[str, Change], tmp_path: Path, change, words: str
) -> None:
    file, tensors = tmp_path / "lora.safetensors", named(changes, str)
    change(tensors)
    save_file(tensors, file)
    with pytest.raises(UserError, match=words):
        lora_files.read(file, shapes=shapes)


def test_what_adds_zero_is_no_reason_to_refuse(
    shapes: lora_names.Shapes, changes: dict[str, Change], tmp_path: Path
) -> None:
    file, tensors = tmp_path / "lora.safetensors", named(changes, str)
    tensors |= {f"{SINGLE}.proj_mlp.{end}": torch.zeros(3) for end in ("diff_b", "lora_B.bias")}
    save_file(tensors, file)
    check_equal(lora_files.read(file, shapes=shapes), changes, ALPHA / RANK)


def test_tensors_for_text_encoders_are_refused_unless_they_are_to_be_left_out(
    shapes: lora_names.Shapes,
    changes: dict[str, Change],
    micro_model: Path,
    tmp_path: Path,
    refused: Callable[..., str],
    grid_file: Callable[..., Path],
) -> None:
    """By every command that reads a LoRA; what is imported without them is a LoRA, too."""
    file, tensors = tmp_path / "lora.safetensors", named(changes, str)
    save_file(tensors | {"lora_te1_x.lora_down.weight": torch.ones(2, 2)}, file)
    folder = tmp_path / "without"
    infer = ("infer", "--examples", grid_file(), "--model-lora", file)
    train = ("train", "--tasks", "depth-to-image", "--set", f"model_lora={file}")
    evaluate = ("eval", "none", "--suite", "scenes", "--model-lora", file)
    for words in (infer, train, evaluate, ("import", file)):
        line = refused(*words, "--model", micro_model, "--output", folder)
        assert "lora_te1_x.lora_down.weight is one of 1 tensors for text encoders" in line
        assert "--without-text-encoders" in line
        assert not folder.exists()
    words = ("import", file, "--model", micro_model, "--output", folder)
    main([str(word) for word in (*words, "--without-text-encoders")])
    check_equal(lora_files.read(lora_file(str(folder)), shapes=shapes), changes, ALPHA / RANK)


def test_inputs_that_flux_dev_lacks_are_filled_with_zeros_and_that_is_said(
    shapes: lora_names.Shapes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    outputs, inputs = shapes["x_embedder"]
    a, b = torch.randn(RANK, 64), torch.randn(outputs, RANK)
    file = tmp_path / "dev.safetensors"
    save_file(
        {"transformer.x_embedder.lora_A.weight": a, "transformer.x_embedder.lora_B.weight": b}, file
    )
    down, up = lora_files.read(file, shapes=shapes)["x_embedder"]
    assert inputs == 384
    torch.testing.assert_close((up @ down)[:, :64], b @ a)
    assert not (up @ down)[:, 64:].any()
    assert "x_embedder has 64 inputs" in caplog.text
    save_file({f"proj_out.lora_{k}.weight": t for k, t in (("A", a), ("B", b[:64]))}, file)
    with pytest.raises(UserError, match="proj_out changes a weight of"):  # no other layer is filled
        lora_files.read(file, shapes=shapes | {"proj_out": (outputs, inputs)})


def peft_folder(changes: dict[str, Change], folder: Path, **settings: object) -> Path:
    folder.mkdir()
    tensors = {
        f"base_model.model.{name}.lora_{part}.weight": factor
        for name, (a, b) in changes.items()
        for part, factor in (("A", a), ("B", b))
    }
    save_file(tensors, folder / WEIGHTS)
    about = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA} | settings
    (folder / CONFIG).write_text(json.dumps(about), encoding="utf-8")
    return folder


def test_the_settings_beside_pefts_file_count(
    shapes: lora_names.Shapes, changes: dict[str, Change], tmp_path: Path
) -> None:
    folder = peft_folder(changes, tmp_path / "plain")
    check_equal(lora_files.read(lora_file(str(folder)), shapes=shapes), changes, ALPHA / RANK)
    folder = peft_folder(changes, tmp_path / "stabilised", use_rslora=True)
    check_equal(lora_files.read(folder / WEIGHTS, shapes=shapes), changes, ALPHA / RANK**0.5)
    for words, settings in (
        ("DoRA cannot be read", {"use_dora": True}),
        ("changed the base before training", {"init_lora_weights": "pissa_niter_4"}),
        ("give its folder with --adapter", {"peft_type": "DEFT"}),
        ("lora_alpha = 'x': input should be a valid number", {"lora_alpha": "x"}),
    ):
        folder = peft_folder(changes, tmp_path / words[:4], **settings)
        with pytest.raises(UserError, match=words):
            lora_files.read(folder / WEIGHTS, shapes=shapes)


def test_two_scales_that_differ_are_refused(
    shapes: lora_names.Shapes, changes: dict[str, Change], tmp_path: Path
) -> None:
    file = tmp_path / "lora.safetensors"
    for alpha, agree in ((ALPHA, True), (ALPHA / 2, False)):
        about = json.dumps({"transformer.r": RANK, "transformer.lora_alpha": alpha})
        save_file(named(changes, str), file, {lora_files.HEADER: about})
        if agree:
            check_equal(lora_files.read(file, shapes=shapes), changes, ALPHA / RANK)
        else:
            with pytest.raises(UserError, match="gives a scale of 2, its settings 1"):
                lora_files.read(file, shapes=shapes)


def test_a_folder_of_several_files_is_refused_unless_one_has_the_usual_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no \.safetensors file in it"):
        lora_file(str(tmp_path))
    for name in ("a.safetensors", "b.safetensors"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=r"2 .safetensors files, a.safetensors and b.safetensors"):
        lora_file(str(tmp_path))
    usual = tmp_path / "pytorch_lora_weights.safetensors"
    usual.touch()
    assert lora_file(str(tmp_path)) == usual


def test_a_hub_id_is_read_from_the_cache_without_the_hub(
    micro_model: Path,
    changes: dict[str, Change],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = tmp_path / "released" / "visualcloze-lora.safetensors"
    file.parent.mkdir()
    save_file(named(changes, "transformer.{}".format), file)
    in_hub_cache(file.parent, "someone/a-lora", tmp_path / "cache", monkeypatch)
    by_id, by_file = (
        load_transformer(str(micro_model), dtype=torch.float32, lora=lora)
        for lora in ("someone/a-lora", str(file))
    )
    torch.testing.assert_close(verify.answer(by_id, 1.0), verify.answer(by_file, 1.0))
    with pytest.raises(UserError, match="not in the hub's cache on this machine"):
        load_transformer(str(micro_model), dtype=torch.float32, lora="someone/else")


def test_infer_and_import_decide_alike(
    micro_model: Path,
    changes: dict[str, Change],
    tmp_path: Path,
    grid_file: Callable[..., Path],
    refused: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The picture of one naming is that of another; what import refuses, infer refuses."""
    names = ("diffusers", "compiled")
    for name in names:
        save_file(named(changes, *NAMINGS[name]), tmp_path / f"{name}.safetensors")
    lost = named(changes, *NAMINGS["diffusers"])
    del lost[f"transformer.{SINGLE}.attn.to_k.lora_B.weight"]
    save_file(lost, tmp_path / "lost.safetensors")
    common = ["infer", "--examples", grid_file(), "--model", micro_model, "--inference-steps", 1]

    pixels = []
    for name in names:
        lora, out = tmp_path / f"{name}.safetensors", tmp_path / name
        main([str(word) for word in (*common, "--model-lora", lora, "--output", out)])
        pixels.append(Image.open(out / "001.png").tobytes())
    assert pixels[0] == pixels[1]
    capsys.readouterr()
    lora, out = tmp_path / "lost.safetensors", tmp_path / "out"
    for words in (
        (*common, "--output", out, "--model-lora", lora),
        (*common, "--output", out, "--model-lora", lora, "--dry-run"),
        ("import", lora, "--output", out / "imported", "--model", micro_model),
    ):
        assert f"{SINGLE}.attn.to_k" in refused(*words)
    assert not out.exists()
