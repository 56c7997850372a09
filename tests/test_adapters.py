"""Adapters: the formulas, what trains, and the file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from visualcloze_deft.adapters import files, injection, methods
from visualcloze_deft.backbones.flux_fill.layers import FLUX_LAYERS
from visualcloze_deft.backbones.peft_files import read_metadata
from visualcloze_deft.config.run_settings import Adapter
from visualcloze_deft.errors import UserError

METHODS = ["deft", "deft-relaxed", "para", "lora"]


@pytest.fixture
def transformer(micro_model: Path) -> FluxTransformer2DModel:
    return FluxTransformer2DModel.from_pretrained(micro_model, subfolder="transformer")


def inputs() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {
        "hidden_states": torch.randn(2, 8, 384),
        "timestep": torch.rand(2),
        "guidance": torch.ones(2),
        "pooled_projections": torch.randn(2, 16),
        "encoder_hidden_states": torch.randn(2, 3, 16),
        "txt_ids": torch.zeros(3, 3),
        "img_ids": torch.rand(8, 3).round(),
    }


def run(transformer: FluxTransformer2DModel) -> Tensor:
    return transformer(**inputs(), return_dict=False)[0]


def perturb(transformer: FluxTransformer2DModel) -> None:
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in injection.trainable(transformer).values():
            parameter += 0.1 * torch.randn_like(parameter)


@pytest.mark.parametrize("method", ["deft", "deft-relaxed", "lora"])
def test_an_attached_adapter_changes_nothing_yet(
    transformer: FluxTransformer2DModel, method: str
) -> None:
    before = run(transformer)
    injection.attach(transformer, Adapter(method=method, rank=4), seed=0)
    torch.testing.assert_close(run(transformer), before, atol=1e-5, rtol=1e-5)


def test_para_removes_a_subspace_at_once(transformer: FluxTransformer2DModel) -> None:
    before = run(transformer)
    injection.attach(transformer, Adapter(method="para", rank=4), seed=0)
    assert not torch.allclose(run(transformer), before, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_every_adapter_matrix_gets_a_gradient_and_nothing_else_does(
    transformer: FluxTransformer2DModel, method: str
) -> None:
    injection.attach(transformer, Adapter(method=method, rank=4), seed=0)
    perturb(transformer)  # LoRA's A has no gradient while B is zero
    run(transformer).square().sum().backward()
    names = injection.trainable(transformer)
    assert all("deft_" in name or "lora_" in name for name in names)
    unused = "to_add_out|ff_context"  # the last block's text stream does not reach the output
    for name, parameter in names.items():
        if not any(part in name for part in unused.split("|")):
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name


def test_p_learns_at_a_tenth_of_rs_rate(transformer: FluxTransformer2DModel) -> None:
    injection.attach(transformer, Adapter(rank=4), seed=0)
    slow, full = injection.parameter_groups(transformer, Adapter(rank=4), lr=1e-3)
    assert (slow["lr"], full["lr"]) == (pytest.approx(1e-4), 1e-3)
    ids = {id(p) for n, p in injection.trainable(transformer).items() if "deft_P" in n}
    assert {id(p) for p in slow["params"]} == ids


@pytest.mark.parametrize("method", METHODS)
def test_a_saved_adapter_gives_the_same_output_here_and_in_plain_peft(
    micro_model: Path, transformer: FluxTransformer2DModel, tmp_path: Path, method: str
) -> None:
    injection.attach(transformer, Adapter(method=method, rank=4), seed=0)
    perturb(transformer)
    transformer.eval()
    files.save(transformer, tmp_path, base="micro")
    here = FluxTransformer2DModel.from_pretrained(micro_model, subfolder="transformer").eval()
    files.load(here, tmp_path)
    torch.testing.assert_close(run(here), run(transformer))

    plain = FluxTransformer2DModel.from_pretrained(micro_model, subfolder="transformer").eval()
    wrapped = PeftModel.from_pretrained(plain, tmp_path)
    torch.testing.assert_close(wrapped(**inputs(), return_dict=False)[0], run(transformer))
    assert PeftConfig.from_pretrained(tmp_path).r == 4


@pytest.mark.parametrize("method", ["deft", "deft-relaxed", "para"])
def test_training_a_transformer_follows_pefts_own_layers_from_the_same_start(
    micro_model: Path, transformer: FluxTransformer2DModel, tmp_path: Path, method: str
) -> None:
    """Where P moves so little that no sign of peft's basis flips; at p_lr_ratio 0.1 one does in the
    third step, and its loss jumps."""
    settings = Adapter(method=method, rank=4, p_lr_ratio=0.01)
    injection.attach(transformer, settings, seed=0)
    files.save(transformer, tmp_path, base="micro")
    plain = FluxTransformer2DModel.from_pretrained(micro_model, subfolder="transformer")
    theirs = PeftModel.from_pretrained(plain.train(), tmp_path, is_trainable=True)
    wanted = torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(3))
    curves = []
    for net in (transformer.train(), theirs):
        groups = injection.parameter_groups(net, settings, lr=0.01)
        optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.0)
        curves.append([])
        for _ in range(12):
            loss = (net(**inputs(), return_dict=False)[0] - wanted).square().mean()
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            curves[-1].append(loss.item())
    assert curves[0][-1] < 0.99 * curves[0][0]
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)


def test_the_file_says_what_it_holds(transformer: FluxTransformer2DModel, tmp_path: Path) -> None:
    injection.attach(transformer, Adapter(rank=4), seed=0)
    files.save(transformer, tmp_path, base="micro", metadata={"method": "deft"})
    assert read_metadata(tmp_path)["method"] == "deft"
    assert all("deft_" in name for name in load_file(tmp_path / files.WEIGHTS))


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("nothing", "matches no linear layer"),
        (r".*attn.*", "transformer_blocks.0.attn, .*, which is no linear layer"),
    ],
)
def test_a_pattern_that_matches_no_layer_or_no_linear_one_is_refused(
    transformer: FluxTransformer2DModel, pattern: str, words: str
) -> None:
    with pytest.raises(UserError, match=words):
        injection.attach(transformer, Adapter(target_modules=pattern), seed=0)


def break_truncate(folder: Path) -> None:
    path = folder / files.WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])


def break_rank(folder: Path) -> None:
    path = folder / files.CONFIG
    path.write_text(path.read_text().replace('"r": 4', '"r": 8'))


def break_layers(folder: Path) -> None:
    tensors = load_file(folder / files.WEIGHTS)
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, folder / files.WEIGHTS)


def break_method(folder: Path) -> None:
    path = folder / files.CONFIG
    path.write_text(path.read_text().replace('"DEFT"', '"IA3"'))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (break_truncate, "truncated"),
        (break_rank, "shape"),
        (break_layers, "another model"),
        (break_method, "IA3"),
    ],
)
def test_a_bad_adapter_is_refused_by_name(
    micro_model: Path, transformer: FluxTransformer2DModel, tmp_path: Path, damage, words: str
) -> None:
    injection.attach(transformer, Adapter(rank=4), seed=0)
    files.save(transformer, tmp_path, base="micro")
    damage(tmp_path)
    fresh = FluxTransformer2DModel.from_pretrained(micro_model, subfolder="transformer")
    with pytest.raises(UserError, match=words):
        files.load(fresh, tmp_path)


def test_a_file_that_peft_wrote_is_read(
    micro_model: Path, transformer: FluxTransformer2DModel, tmp_path: Path
) -> None:
    config = methods.peft_config(Adapter(rank=4), FLUX_LAYERS)
    theirs = get_peft_model(transformer, config).eval()
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter += 0.1 * torch.randn_like(parameter) if "deft_" in name else 0
    theirs.save_pretrained(tmp_path)
    ours = FluxTransformer2DModel.from_pretrained(micro_model, subfolder="transformer").eval()
    files.load(ours, tmp_path)
    expected = theirs(**inputs(), return_dict=False)[0]
    torch.testing.assert_close(run(ours), expected, atol=1e-4, rtol=1e-4)


def test_a_transformer_with_an_adapter_takes_no_second_one(
    transformer: FluxTransformer2DModel,
) -> None:
    injection.attach(transformer, Adapter(rank=4), seed=0)
    with pytest.raises(UserError, match="has an adapter already"):
        injection.attach(transformer, Adapter(rank=4), seed=0)


def test_a_second_load_is_refused_and_keeps_the_first(
    transformer: FluxTransformer2DModel, tmp_path: Path
) -> None:
    injection.attach(transformer, Adapter(rank=4), seed=0)
    perturb(transformer)
    files.save(transformer, tmp_path, base="micro")
    before = run(transformer)
    with pytest.raises(UserError, match="has an adapter already"):
        files.load(transformer, tmp_path)
    assert torch.equal(run(transformer), before)


def test_a_rank_larger_than_a_layer_names_the_layer(transformer: FluxTransformer2DModel) -> None:
    with pytest.raises(UserError, match=r"rank 33: larger than .*to_q, which has 32 inputs"):
        injection.attach(transformer, Adapter(rank=33, target_modules=r".*to_q"), seed=0)


def test_after_a_refused_adapter_the_right_one_can_be_loaded(
    micro_model: Path, transformer: FluxTransformer2DModel, tmp_path: Path
) -> None:
    for rank, name in ((4, "right"), (2, "wrong")):
        fresh = FluxTransformer2DModel.from_pretrained(micro_model, subfolder="transformer")
        injection.attach(fresh, Adapter(rank=rank), seed=0)
        (tmp_path / name).mkdir()
        files.save(fresh, tmp_path / name, base="micro")
    right, wrong = tmp_path / "right", tmp_path / "wrong"
    (wrong / files.WEIGHTS).write_bytes((right / files.WEIGHTS).read_bytes())
    before = run(transformer)
    with pytest.raises(UserError, match="this model and rank 2 need"):
        files.load(transformer, wrong)
    assert torch.equal(run(transformer), before)
    files.load(transformer, right)


def test_layers_that_match_nothing_are_refused(transformer: FluxTransformer2DModel) -> None:
    with pytest.raises(UserError, match="matches no linear layer"):
        injection.attach(transformer, Adapter(target_modules="nothing"), seed=0)
