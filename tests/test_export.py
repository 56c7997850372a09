"""Adapters to and from other tools' files."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import processes
import pytest
import torch
from diffusers import FluxFillPipeline, FluxTransformer2DModel, VisualClozePipeline
from diffusers.loaders import FluxLoraLoaderMixin
from diffusers.loaders.lora_conversion_utils import _convert_bfl_flux_control_lora_to_diffusers
from hub_cache import in_hub_cache
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from visualcloze_deft.adapters import export, files, import_lora, injection, verify
from visualcloze_deft.adapters.headers import Format
from visualcloze_deft.backbones import lora_files, lora_headers, lora_names
from visualcloze_deft.backbones.peft_files import WEIGHTS
from visualcloze_deft.cli import main
from visualcloze_deft.config.run_settings import Adapter
from visualcloze_deft.errors import UserError

METHODS = ["deft", "deft-relaxed", "para", "lora"]
FORMATS = ["peft", "diffusers", "comfyui", "kohya", "merged"]


def base(model: Path) -> FluxTransformer2DModel:
    return FluxTransformer2DModel.from_pretrained(model, subfolder="transformer")


def saved_adapter(model: Path, folder: Path, method: str, layers: str = "default") -> Path:
    transformer = base(model)
    settings = Adapter(method=method, rank=3, alpha=6, target_modules=layers)
    injection.attach(transformer, settings, seed=0)
    torch.manual_seed(1)
    for parameter in injection.trainable(transformer).values():
        parameter.data += 0.2 * torch.randn_like(parameter)
    folder.mkdir()
    about = {"base_model": str(model), "method": method}
    files.save(transformer, folder, base=str(model), metadata=about)
    return folder


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", FORMATS)
def test_what_is_exported_gives_the_adapters_output(
    micro_model: Path, tmp_path: Path, method: str, kind: Format
) -> None:
    folder = saved_adapter(micro_model, tmp_path / "adapter", method)
    report = export.export(folder, tmp_path / "out", kind)
    assert report.output is not None
    assert report.output < 1e-4
    assert report.weights is not None
    assert report.weights < 1e-5


@pytest.mark.parametrize("kind", ["diffusers", "comfyui", "kohya", "merged"])
def test_scale_is_folded_in(micro_model: Path, tmp_path: Path, kind: Format) -> None:
    folder = saved_adapter(micro_model, tmp_path / "adapter", "deft")
    report = export.export(folder, tmp_path / "out", kind, scale=0.5)
    assert report.output is not None
    assert report.output < 1e-4


def test_the_file_loads_with_diffusers_alone_and_says_what_it_is(
    micro_model: Path, tmp_path: Path
) -> None:
    folder = saved_adapter(micro_model, tmp_path / "adapter", "deft")
    file = tmp_path / "lora.safetensors"
    export.export(folder, file, "diffusers")
    live, plain = base(micro_model), base(micro_model)
    files.load(live, folder)
    tensors = FluxLoraLoaderMixin.lora_state_dict(str(file))
    FluxLoraLoaderMixin.load_lora_into_transformer(tensors, None, plain)
    torch.testing.assert_close(verify.answer(plain, 1.0), verify.answer(live, 1.0))
    with safe_open(file, "pt") as opened:
        about = opened.metadata()
    expected = {"method": "deft", "rank": "3", "alpha": "6", "scale": "1.0", "base_lora": ""}
    expected |= {"exported_as": "diffusers", "base_model": str(micro_model)}
    assert about.items() >= expected.items()
    assert about["exported_by"].startswith("visualcloze-deft ")


def half_model(model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The model in bfloat16, and kept in it as FLUX is: what a small adapter changes is lost in
    the rounding of the output, and must be compared in the weights."""
    shutil.copytree(model, folder)
    base(model).bfloat16().save_pretrained(folder / "transformer")
    monkeypatch.setattr(export, "LARGE", 0)
    return folder


def small_adapter(model: Path, folder: Path) -> Path:
    transformer = base(model)
    injection.attach(transformer, Adapter(rank=3), seed=0)
    torch.manual_seed(1)
    for name, parameter in injection.trainable(transformer).items():
        if "deft_R" in name:
            parameter.data += 0.02 * torch.randn_like(parameter)
    folder.mkdir()
    files.save(transformer, folder, base=str(model))
    return folder


def test_a_small_change_of_a_bfloat16_base_is_compared_as_the_reader_holds_it(
    micro_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = half_model(micro_model, tmp_path / "model", monkeypatch)
    folder = small_adapter(model, tmp_path / "adapter")
    for kind in FORMATS:
        report = export.export(folder, tmp_path / "out" / kind, kind)
        assert report.output is None, kind
        assert report.weights is not None
    monkeypatch.setattr(FluxLoraLoaderMixin, "load_lora_into_transformer", lambda *_: None)
    with pytest.raises(UserError, match="its change of the weights differs"):
        export.export(folder, tmp_path / "out" / "lost", "diffusers")
    monkeypatch.setattr(export, "merge", lambda transformer, *_: transformer)
    with pytest.raises(UserError, match="its change of the weights differs"):
        export.export(folder, tmp_path / "out" / "lost", "merged")


def test_a_merged_transformer_in_float32_holds_the_whole_change_of_a_bfloat16_base(
    micro_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = half_model(micro_model, tmp_path / "model", monkeypatch)
    folder = small_adapter(model, tmp_path / "adapter")
    rounded = export.export(folder, tmp_path / "half", "merged").weights
    whole = export.export(folder, tmp_path / "single", "merged", dtype=torch.float32).weights
    assert whole is not None
    assert whole < 1e-4 < (rounded or 0)


def test_original_names_are_those_that_diffusers_converts_from(tmp_path: Path) -> None:
    """diffusers' converter of Black Forest Labs' own LoRA files, for all layers of FLUX."""
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(guidance_embeds=True)
    shapes = lora_names.layer_shapes(transformer)
    random = torch.Generator().manual_seed(0)
    changes = {
        name: (torch.randn(2, i, generator=random), torch.randn(o, 2, generator=random))
        for name, (o, i) in shapes.items()
    }
    original = {
        f"{name}.lora_{part}.weight": factor
        for name, (a, b) in lora_names.fuse(changes, shapes).items()
        for part, factor in (("A", a), ("B", b))
    }
    places = [f"double_blocks.{k}.{side}_attn" for k in range(19) for side in ("img", "txt")]
    for place in [*places, *(f"single_blocks.{k}" for k in range(38))]:  # it asks for norms, too
        for part in ("query", "key"):
            original[f"{place}.norm.{part}_norm.scale"] = torch.ones(1)
    theirs = _convert_bfl_flux_control_lora_to_diffusers(original)
    assert not original  # every name was known
    del changes["norm_out.linear"]  # there it swaps halves of A as well as those of B
    for name, (a, b) in changes.items():
        down, up = (theirs[f"transformer.{name}.lora_{part}.weight"] for part in "AB")
        v = torch.randn(a.shape[1], 1, generator=random)
        torch.testing.assert_close(up @ (down @ v), b @ (a @ v), atol=1e-3, rtol=1e-3, msg=name)


def test_kohyas_names_are_read_by_diffusers_at_flux_width(tmp_path: Path) -> None:
    """One block of each kind at FLUX's widths, without a model: file against file."""
    shapes = {
        "single_transformer_blocks.0.attn.to_q": (3072, 3072),
        "single_transformer_blocks.0.attn.to_k": (3072, 3072),
        "single_transformer_blocks.0.attn.to_v": (3072, 3072),
        "single_transformer_blocks.0.proj_mlp": (12288, 3072),
        "single_transformer_blocks.0.proj_out": (3072, 15360),
        "transformer_blocks.0.attn.add_q_proj": (3072, 3072),
        "transformer_blocks.0.attn.add_k_proj": (3072, 3072),
        "transformer_blocks.0.attn.add_v_proj": (3072, 3072),
        "transformer_blocks.0.ff.net.0.proj": (12288, 3072),
    }
    changes = {n: (torch.randn(2, i), torch.randn(o, 2)) for n, (o, i) in shapes.items()}
    del changes["single_transformer_blocks.0.attn.to_k"]  # a fused layer in part
    file = tmp_path / "kohya.safetensors"
    lora_names.write(file, changes, "kohya", shapes=shapes, metadata={})
    read = FluxLoraLoaderMixin.lora_state_dict(str(file))
    for name, (a, b) in changes.items():
        theirs = (read[f"transformer.{name}.lora_{part}.weight"] for part in "BA")
        up, down = theirs
        torch.testing.assert_close((up @ down)[:40], (b @ a)[:40])


@pytest.mark.parametrize("kind", ["diffusers", "comfyui", "kohya"])
def test_writing_and_reading_are_inverse_for_every_linear_layer(
    micro_model: Path, tmp_path: Path, kind: lora_names.FileFormat
) -> None:
    shapes = lora_names.layer_shapes(base(micro_model))
    changes = {n: (torch.randn(2, i), torch.randn(o, 2)) for n, (o, i) in shapes.items()}
    lora_names.write(tmp_path / "all.safetensors", changes, kind, shapes=shapes, metadata={})
    back = lora_files.read(tmp_path / "all.safetensors", shapes=shapes)
    assert set(back) == set(changes)
    for name, (a, b) in changes.items():
        torch.testing.assert_close(back[name][1] @ back[name][0], b @ a)


@pytest.mark.parametrize("kind", ["diffusers", "comfyui", "kohya"])
def test_an_imported_lora_is_an_adapter_with_the_same_output(
    micro_model: Path, tmp_path: Path, kind: Format
) -> None:
    folder = saved_adapter(micro_model, tmp_path / "adapter", "deft")
    export.export(folder, tmp_path / "lora.safetensors", kind)
    imported = import_lora.import_lora(
        tmp_path / "lora.safetensors", tmp_path / "imported", model=str(micro_model)
    )
    live, again = base(micro_model), base(micro_model)
    files.load(live, folder)
    files.load(again, imported)
    torch.testing.assert_close(
        verify.answer(again, 1.0), verify.answer(live, 1.0), atol=1e-4, rtol=1e-4
    )


def test_alpha_scales_what_is_imported(micro_model: Path, tmp_path: Path) -> None:
    shapes = lora_names.layer_shapes(base(micro_model))
    name = "transformer_blocks.0.ff.net.2"
    o, i = shapes[name]
    a, b = torch.randn(4, i), torch.randn(o, 4)
    whole = "lora_unet_double_blocks_0_img_mlp_2"
    tensors = {f"{whole}.lora_down.weight": a, f"{whole}.lora_up.weight": b}
    tensors |= {f"{whole}.alpha": torch.tensor(1.0), "lora_te1_x.lora_down.weight": a.clone()}
    file = tmp_path / "k.safetensors"
    save_file(tensors, file)
    down, up = lora_files.read(file, shapes=shapes, text_encoders="left out")[name]
    torch.testing.assert_close(up @ down, b @ a / 4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(sorted(t)[0]), "no partner|no part of a LoRA"),
        (lambda t: t.update({"transformer.nothing.lora_A.weight": torch.ones(2, 3)}), "no partner"),
        (lambda t: next(iter(t.values())).fill_(torch.nan), "not finite"),
        (lambda t: t.update({"x.hada_w1_a": torch.ones(2)}), "LoHa"),
        (lambda t: [v.zero_() for k, v in t.items() if "lora_B" in k], "changes nothing"),
        (
            lambda t: t.update({sorted(t)[0].replace("lora_A.weight", "alpha"): torch.tensor(0.0)}),
            "alpha is 0",
        ),
        (
            lambda t: t.update({k: torch.cat([v, v], -1) for k, v in t.items() if "lora_A" in k}),
            "changes a weight of",
        ),
        (
            lambda t: t.update({sorted(t)[0].replace("lora_A.weight", "alpha"): torch.ones(3)}),
            "holds 3 values, not one",
        ),
        (
            lambda t: t.update({k: v[:0] for k, v in t.items() if "lora_A" in k}),
            "no matrices of one rank",
        ),
    ],
)
def test_a_lora_that_cannot_be_read_is_refused_by_name(
    micro_model: Path, tmp_path: Path, change, words: str
) -> None:
    folder = saved_adapter(micro_model, tmp_path / "adapter", "lora")
    file = tmp_path / "lora.safetensors"
    export.export(folder, file, "diffusers", verify=False)
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    with pytest.raises(UserError, match=words):
        import_lora.import_lora(file, tmp_path / "imported", model=str(micro_model))
    assert not (tmp_path / "imported").exists()


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ([], "must be an object"),
        ({"transformer.alpha_pattern": [1]}, r"alpha_pattern = \[1\]: input should be"),
        ({"transformer.alpha_pattern": {"(": 1}}, "no regular expression"),
        ({"transformer.alpha_pattern": {"x": 0}}, "alpha_pattern.x = 0: input should be"),
        ({"transformer.lora_alpha": "x"}, "lora_alpha = 'x': input should be a valid number"),
        ({"transformer.use_dora": True}, "DoRA cannot be read"),
    ],
)
def test_a_header_that_says_no_sense_is_refused(
    micro_model: Path, tmp_path: Path, header: object, words: str
) -> None:
    folder = saved_adapter(micro_model, tmp_path / "adapter", "lora")
    file = tmp_path / "lora.safetensors"
    export.export(folder, file, "diffusers", verify=False)
    save_file(load_file(file), file, {lora_files.HEADER: json.dumps(header)})
    with pytest.raises(UserError, match=words):
        import_lora.import_lora(file, tmp_path / "imported", model=str(micro_model))


def test_a_lora_in_eight_bits_is_read(micro_model: Path, tmp_path: Path) -> None:
    folder = saved_adapter(micro_model, tmp_path / "adapter", "lora")
    file = tmp_path / "lora.safetensors"
    export.export(folder, file, "diffusers", verify=False)
    save_file({n: t.to(torch.float8_e4m3fn) for n, t in load_file(file).items()}, file)
    imported = import_lora.import_lora(file, tmp_path / "imported", model=str(micro_model))
    assert {t.dtype for t in load_file(imported / WEIGHTS).values()} == {torch.float32}


def test_what_is_there_is_not_overwritten(micro_model: Path, tmp_path: Path) -> None:
    folder = saved_adapter(micro_model, tmp_path / "adapter", "lora")
    file = tmp_path / "lora.safetensors"
    file.write_text("mine")
    with pytest.raises(UserError, match="already there"):
        export.export(folder, file, "diffusers")
    assert file.read_text() == "mine"


def test_a_written_file_that_gives_another_output_is_refused_and_removed(
    micro_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved_adapter(micro_model, tmp_path / "adapter", "deft")
    original = lora_names.write

    def spoiled(path: Path, changes, *rest, **more) -> None:
        original(path, {n: (a, 1.01 * b) for n, (a, b) in changes.items()}, *rest, **more)

    monkeypatch.setattr(lora_names, "write", spoiled)
    with pytest.raises(UserError, match=r"differs from the adapter's by 1\.0e-02"):
        export.export(folder, tmp_path / "out" / "lora.safetensors", "diffusers")
    assert list((tmp_path / "out").iterdir()) == []


def test_the_command_line_exports_and_imports(
    micro_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved_adapter(micro_model, tmp_path / "adapter", "para")
    file, folder = tmp_path / "lora.safetensors", tmp_path / "imported"
    words = ["export", str(tmp_path / "adapter"), "--format", "diffusers", "--output", str(file)]
    main(words)
    assert "read again by diffusers" in capsys.readouterr().out
    main(["import", str(file), "--output", str(folder), "--model", str(micro_model)])
    start, command = capsys.readouterr().out.splitlines()
    assert start == f"{folder}: an adapter of method lora, rank 3; train from it with"
    assert command.split() == [
        *f"vcdeft train --model {micro_model} --method lora --rank 3".split(),
        *("--set", f"adapter.init_from={folder}"),
    ]
    assert load_file(folder / WEIGHTS)


def test_mistakes_on_the_command_line_are_one_line(
    micro_model: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    folder = saved_adapter(micro_model, tmp_path / "adapter", "deft")
    out = tmp_path / "out"
    assert "no such file or folder" in refused(
        "export", tmp_path / "no", "--format", "kohya", "--output", out
    )
    assert "'png' is not one of" in refused("export", folder, "--format", "png", "--output", out)
    assert "--scale" in refused(
        "export", folder, "--format", "peft", "--output", out, "--scale", "0.5"
    )
    for scale in ("nan", "inf", "0", "1e300"):
        assert "give a number other than 0" in refused(
            "export", folder, "--format", "kohya", "--output", out, "--scale", scale
        )
    cut = folder / WEIGHTS
    cut.write_bytes(cut.read_bytes()[:100])
    assert "truncated" in refused("export", folder, "--format", "kohya", "--output", out)
    cut.unlink()
    assert "missing" in refused("export", folder, "--format", "kohya", "--output", out)
    ours = refused("import", folder, "--output", out)
    assert "a run or adapter folder, which needs no import; 'vcdeft export' writes its LoRA" in ours
    (tmp_path / "pairs").mkdir()
    assert "pairs: a folder; name the" in refused("import", tmp_path / "pairs", "--output", out)
    assert "no such file" in refused("import", tmp_path / "no.safetensors", "--output", out)
    (tmp_path / "text.safetensors").write_text("no tensors")
    assert "damaged" in refused("import", tmp_path / "text.safetensors", "--output", out)
    folder = saved_adapter(micro_model, tmp_path / "again", "deft")
    start = f"adapter.init_from={folder}"
    assert "it is deft of rank 3" in refused("train", "--rank", "4", "--set", start)
    assert "adapter.init_from" in refused("train", "--set", f"adapter.init_from={tmp_path}")


def test_scales_in_the_header_of_diffusers_files_count(micro_model: Path, tmp_path: Path) -> None:
    transformer = base(micro_model)
    layers = r"transformer_blocks\.0\.attn\.to_q"
    config = LoraConfig(r=4, lora_alpha=1, target_modules=layers, init_lora_weights=False)
    transformer.add_adapter(config)
    transformer.save_lora_adapter(tmp_path)  # diffusers' own writer
    (file,) = tmp_path.glob("*.safetensors")
    folder = import_lora.import_lora(file, tmp_path / "imported", model=str(micro_model))
    again = base(micro_model)
    files.load(again, folder)
    torch.testing.assert_close(verify.answer(again, 1.0), verify.answer(transformer, 1.0))


def test_layers_that_end_alike_are_told_apart(micro_model: Path, tmp_path: Path) -> None:
    """proj_out ends the transformer and every single block; ranks differ."""
    shapes = lora_names.layer_shapes(base(micro_model))
    ranks = {"proj_out": 2, "transformer_blocks.0.ff.net.2": 4, "x_embedder": 4}
    changes = {
        n: (torch.randn(r, shapes[n][1]), torch.randn(shapes[n][0], r)) for n, r in ranks.items()
    }
    file = tmp_path / "lora.safetensors"
    lora_names.write(file, changes, "comfyui", shapes=shapes, metadata={})
    adapted, merged = base(micro_model), export.merge(base(micro_model), changes)
    files.load(adapted, import_lora.import_lora(file, tmp_path / "a", model=str(micro_model)))
    torch.testing.assert_close(
        verify.answer(adapted, 1.0), verify.answer(merged, 1.0), atol=1e-4, rtol=1e-4
    )


def test_kohyas_format_refuses_what_diffusers_would_drop(micro_model: Path, tmp_path: Path) -> None:
    folder = saved_adapter(micro_model, tmp_path / "adapter", "deft", layers="x_embedder|proj_out")
    with pytest.raises(UserError, match="diffusers drops"):
        export.export(folder, tmp_path / "out", "kohya")


@pytest.mark.parametrize("pipeline", [FluxFillPipeline, VisualClozePipeline])
def test_diffusers_pipelines_load_the_file(
    micro_model: Path, tmp_path: Path, pipeline: type[FluxFillPipeline]
) -> None:
    folder = saved_adapter(micro_model, tmp_path / "adapter", "deft")
    export.export(folder, tmp_path / "lora.safetensors", "diffusers")
    pipe = pipeline.from_pretrained(micro_model)
    pipe.load_lora_weights(str(tmp_path / "lora.safetensors"))
    found = pipe.transformer if hasattr(pipe, "transformer") else pipe.generation_pipe.transformer
    live = base(micro_model)
    files.load(live, folder)
    torch.testing.assert_close(verify.answer(found, 1.0), verify.answer(live, 1.0))


@pytest.mark.processes
def test_training_starts_from_an_imported_lora(micro_model: Path, tmp_path: Path) -> None:
    folder = saved_adapter(micro_model, tmp_path / "adapter", "deft")
    export.export(folder, tmp_path / "lora.safetensors", "kohya")
    start = import_lora.import_lora(
        tmp_path / "lora.safetensors", tmp_path / "start", model=str(micro_model)
    )
    words = ["train", "--model", micro_model, "--method", "lora", "--rank", 3, "--steps", 1]
    words += ["--lr", "1e-9", "--tasks", "depth-to-image", "--output", tmp_path / "run"]
    words += ["--set", "sample_grids=2"]
    processes.run([*words, "--set", f"adapter.init_from={start}"], processes=1)
    began = load_file(start / WEIGHTS)
    for name, tensor in load_file(tmp_path / "run" / "adapter" / WEIGHTS).items():
        torch.testing.assert_close(tensor, began[name])


def test_a_base_that_an_adapter_names_is_not_downloaded_unasked(
    micro_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]
) -> None:
    folder = saved_adapter(micro_model, tmp_path / "adapter", "deft")
    tensors = load_file(folder / WEIGHTS)
    file = tmp_path / "lora.safetensors"
    words = ("export", folder, "--format", "diffusers", "--output", file)
    save_file(tensors, folder / WEIGHTS, {"base_model": "someone/their-base"})
    assert "give --model someone/their-base to have it downloaded" in refused(*words)
    save_file(tensors, folder / WEIGHTS, {"base_lora": "someone/their-lora"})
    line = refused(*words, "--model", micro_model)
    assert "give --model-lora someone/their-lora to have it downloaded" in line
    in_hub_cache(micro_model, "someone/their-base", tmp_path / "cache", monkeypatch)
    save_file(tensors, folder / WEIGHTS, {"base_model": "someone/their-base"})
    export.export(folder, file, "diffusers")
    with safe_open(file, "pt") as opened:
        assert opened.metadata()["base_model"] == "someone/their-base"


# ---- headers that other tools read


def texts_of(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        return opened.metadata()


def content_of(file: Path) -> bytes:
    data = file.read_bytes()
    return data[8 + int.from_bytes(data[:8], "little") :]


def run_with_adapter(model: Path, run: Path) -> Path:
    """A run folder whose adapter says what training writes."""
    run.mkdir()
    folder = saved_adapter(model, run / "adapter", "deft")
    about = {"base_model": str(model), "method": "deft", "tasks": "depth-to-image", "step": "7"}
    about |= {"resolution": "32", "trigger": "sks owl"}
    save_file(load_file(folder / WEIGHTS), folder / WEIGHTS, about)
    return run


@pytest.mark.parametrize("kind", ["diffusers", "comfyui", "kohya"])
def test_headers_say_what_other_tools_list(micro_model: Path, tmp_path: Path, kind: Format) -> None:
    run = run_with_adapter(micro_model, tmp_path / "owls")
    os.utime(run / "adapter" / WEIGHTS, (1767225600, 1767225600))
    file = export.export(run, tmp_path / "x.safetensors", kind, verify=False).path
    found, said = texts_of(file), "DEFT adapter of rank 3, as a LoRA. Trained on the tasks "
    flux = "https://github.com/black-forest-labs/flux"
    assert (
        found.items()
        >= {
            "modelspec.sai_model_spec": "1.0.1",
            "modelspec.architecture": "flux-1-dev/lora",
            "modelspec.implementation": "diffusers" if kind == "diffusers" else flux,
            "modelspec.title": "owls",
            "modelspec.description": f"{said}depth-to-image for 7 steps.",
            "modelspec.date": "2026-01-01T00:00:00Z",
            "modelspec.resolution": "32x32",
            "modelspec.trigger_phrase": "sks owl",
            "ss_output_name": "owls",
            "ss_base_model_version": "flux1",
            "ss_sd_model_name": "micro",
            "ss_steps": "7",
            "ss_network_dim": "3" if kind == "diffusers" else "Dynamic",  # q, k and v fused: 9, 12
        }.items()
    )
    assert found.get("ss_network_module") == ("networks.lora_flux" if kind == "kohya" else None)
    assert "modelspec.license" not in found  # of a base whose licence is not known
    wanted = hashlib.sha256(content_of(file)).hexdigest()
    assert found["modelspec.hash_sha256"] == f"0x{wanted}"
    assert found["sshs_model_hash"] == wanted


def test_the_rank_in_the_header_is_that_of_every_layer(micro_model: Path, tmp_path: Path) -> None:
    layers = r"transformer_blocks\.0\.ff\.net\.2"
    folder = saved_adapter(micro_model, tmp_path / "mlp", "lora", layers=layers)
    file = export.export(folder, tmp_path / "x.safetensors", "kohya", verify=False).path
    found, ranks = texts_of(file), {len(t) for n, t in load_file(file).items() if "down" in n}
    assert (found["ss_network_dim"], found["ss_network_alpha"]) == ("3", "3")
    assert ranks == {3}
    assert {float(t) for n, t in load_file(file).items() if n.endswith(".alpha")} == {3.0}


@pytest.mark.parametrize("kind", ["diffusers", "comfyui", "kohya"])
def test_two_exports_of_an_adapter_are_equal_to_the_byte(
    micro_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Format
) -> None:
    """Whatever their files are called. SOURCE_DATE_EPOCH stands for the date of the adapter's."""
    run = run_with_adapter(micro_model, tmp_path / "owls")
    one, two = (export.export(run, tmp_path / name, kind, verify=False).path for name in ("a", "b"))
    assert one.read_bytes() == two.read_bytes()
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    dated = export.export(run, tmp_path / "c", kind, verify=False).path
    assert texts_of(dated)["modelspec.date"] == "1970-01-01T00:00:00Z"
    assert content_of(dated) == content_of(one)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "yesterday")
    with pytest.raises(UserError, match="SOURCE_DATE_EPOCH 'yesterday': give seconds since 1970"):
        export.export(run, tmp_path / "d", kind, verify=False)


def test_an_export_of_the_built_in_model_says_its_licence(tmp_path: Path) -> None:
    told = lora_headers.Told(
        name="a", base="tiny", date="", ranks=[4], about={"method": "lora", "rank": "4"}
    )
    assert lora_headers.header(told, "diffusers")["modelspec.license"] == "Apache-2.0"
    fill = replace(told, base="black-forest-labs/FLUX.1-Fill-dev@main")
    said = lora_headers.header(fill, "diffusers")
    assert said["modelspec.license"] == "FLUX.1 [dev] Non-Commercial License"
    assert said["ss_sd_model_name"] == "black-forest-labs/FLUX.1-Fill-dev"
