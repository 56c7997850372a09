"""Gradients that are not finite: where they came from is said, and another kernel mends them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import standins
import torch
from processes import Group, run
from safetensors.torch import load_file
from standins import spoiled_norm, standing_in, vcdeft_with
from torch import Tensor, nn

from visualcloze_deft.adapters import files, injection
from visualcloze_deft.backbones import kernels
from visualcloze_deft.backbones.attention_check import Shapes
from visualcloze_deft.backbones.flux_fill.loading import load_models
from visualcloze_deft.backbones.kernels import ComposedLayerNorm, ComposedRMSNorm, Kernels
from visualcloze_deft.config.run_settings import load_run
from visualcloze_deft.sampling.encoding import TokenBatch as Samples
from visualcloze_deft.sampling.encoding import encode
from visualcloze_deft.training import run_data, run_folder
from visualcloze_deft.training.checkpoint import newest
from visualcloze_deft.training.datasets import PixelDataset
from visualcloze_deft.training.engine import recompute
from visualcloze_deft.training.nonfinite import READ, Origin, traced
from visualcloze_deft.training.objective import GridLoss
from visualcloze_deft.training.report import REPORT

STEPS = 5
SHAPES = Shapes(
    lengths=(20, 70), heads=2, width=16, dtype=torch.float32, device=torch.device("cpu")
)


@pytest.fixture
def batch(micro_model: Path) -> tuple[GridLoss, list[Samples]]:
    """The loss of a micro model with an adapter, and what it is computed on."""
    settings = load_run(None, [f"model={micro_model}", "adapter.rank=4"])
    models = load_models(settings.model)
    injection.attach(models.transformer, settings.adapter, seed=0)
    draws = PixelDataset(run_data.mixture_of(settings))
    groups = encode(models, [draws[index] for index in range(2)], seed=0)
    return GridLoss(models.transformer, context_weight=1, guidance=1.0), groups


def origin_in(loss_of: GridLoss, groups: list[Samples]) -> Origin | None:
    with traced(loss_of) as trace:
        loss = loss_of(groups).sum()
        loss.backward()
    return trace.origin(loss_finite=bool(loss.isfinite()))


def gradients(loss_of: GridLoss, groups: list[Samples]) -> list[Tensor]:
    loss_of.zero_grad()
    loss_of(groups).sum().backward()
    trained = injection.trainable(loss_of.denoiser).values()
    return [p.grad.clone() for p in trained if p.grad is not None]


@pytest.mark.parametrize("blocks", ["none", "all"])
@pytest.mark.parametrize(
    ("backend", "operation"),
    [
        (standins.nan_backward, "SpoiledGradientBackward"),
        (standins.nan_forward, "the forward pass"),
    ],
)
def test_the_operation_and_the_layer_of_a_fault_are_named(
    batch: tuple[GridLoss, list[Samples]], backend: standins.Backend, operation: str, blocks: str
) -> None:
    """Also where blocks are computed again in the backward pass."""
    loss_of, groups = batch
    recompute(loss_of.denoiser, blocks)
    loss_of.train()
    with standing_in(native=backend):
        origin = origin_in(loss_of, groups)
    last, first = "denoiser.single_transformer_blocks.0", "denoiser.transformer_blocks.0"
    layer = f"{first if backend is standins.nan_forward else last}.attn"
    assert origin == Origin(operation=operation, layer=layer, suspect="attention")
    assert str(origin) == f"{operation} of {layer.removeprefix('denoiser.')}"


def test_watching_changes_no_number_and_finds_nothing_where_all_is_finite(
    batch: tuple[GridLoss, list[Samples]],
) -> None:
    loss_of, groups = batch
    expected = gradients(loss_of, groups)
    with traced(loss_of) as trace:
        found = gradients(loss_of, groups)
    assert trace.origin(loss_finite=True) is None
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    hooks = [hook for module in loss_of.modules() for hook in module._forward_hooks.values()]
    with traced(loss_of):
        pass
    after = [hook for module in loss_of.modules() for hook in module._forward_hooks.values()]
    assert hooks == after


def test_a_layer_whose_weights_are_not_finite_is_named_and_inputs_that_are_not(
    batch: tuple[GridLoss, list[Samples]],
) -> None:
    loss_of, groups = batch
    weight = loss_of.denoiser.transformer_blocks[0].ff.net[2].base_layer.weight
    kept = weight[0, 0].item()
    weight.data[0, 0] = torch.inf
    origin = origin_in(loss_of, groups)
    assert origin is not None
    assert origin.operation == "the forward pass"
    assert origin.layer.startswith("denoiser.transformer_blocks.0.ff.net.2")
    assert origin.suspect == "none"
    weight.data[0, 0] = kept
    groups[0].text.text[0, 0, 0] = torch.nan
    assert origin_in(loss_of, groups) == Origin(operation=READ)


def test_a_fault_of_a_fused_norm_is_mended_by_the_same_formula_in_single_operations(
    batch: tuple[GridLoss, list[Samples]], monkeypatch: pytest.MonkeyPatch
) -> None:
    loss_of, groups = batch
    expected = gradients(loss_of, groups)
    monkeypatch.setattr(nn.RMSNorm, "forward", spoiled_norm)
    origin = origin_in(loss_of, groups)
    assert origin is not None
    assert origin.layer.startswith("denoiser.single_transformer_blocks.0.attn.norm_")
    (other,) = kernels.remedies(Kernels(), origin.suspect, SHAPES)
    assert str(other) == "attention native and norms composed of single operations"
    assert not list(kernels.remedies(other, origin.suspect, SHAPES))
    kernels.use(loss_of.denoiser, other)
    for a, b in zip(gradients(loss_of, groups), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    kernels.use(loss_of.denoiser, Kernels())
    assert not any(type(m) in (ComposedRMSNorm, ComposedLayerNorm) for m in loss_of.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("kind", [ComposedRMSNorm, ComposedLayerNorm])
def test_composed_norms_are_torchs(
    kind: type[ComposedRMSNorm | ComposedLayerNorm], affine: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    norm = kind(16, eps=1e-6, elementwise_affine=affine).to(dtype)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    x, gradient = torch.randn(2, 3, 5, 16).to(dtype), torch.randn(2, 3, 5, 16).to(dtype)
    found = []
    for forward in (norm.forward, super(kind, norm).forward):
        read = x.clone().requires_grad_()
        output = forward(read)
        found.append((output, *torch.autograd.grad(output, read, gradient)))
    for one, expected in zip(*found, strict=True):
        assert (one - expected).norm() < torch.finfo(dtype).eps * expected.norm()


def test_remedies_come_after_the_test_of_their_results() -> None:
    with standing_in(flash=standins.wrong, efficient=standins.right, math=standins.nan_backward):
        found = list(kernels.remedies(Kernels(), "attention", SHAPES))
    assert found == [Kernels(attention="efficient")]
    assert not list(kernels.remedies(Kernels(), "none", SHAPES))


# In training processes


def words(model: Path, output: Path, *more: object) -> list[object]:
    base = ["train", "--model", model, "--tasks", "depth-to-image,novel-view", "--rank", 4]
    base += ["--steps", STEPS, "--batch", 2, "--output", output, "--lr", 0.01]
    return [
        *base,
        "--set",
        "save_every=1",
        "--set",
        "keep_checkpoints=9",
        "--set",
        "sample_grids=2",
        *more,
    ]


def lines(output: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (output / run_folder.METRICS).read_text().splitlines()]


def losses(output: Path) -> list[object]:
    return [line["loss"] for line in lines(output)]


def weights(output: Path) -> dict[str, Tensor]:
    return load_file(output / "adapter" / files.WEIGHTS)


def back_to(output: Path, step: int) -> None:
    """As if the run had ended after `step`."""
    shutil.rmtree(output / "adapter")
    for later in range(step + 1, STEPS + 1):
        shutil.rmtree(output / "checkpoints" / f"step-{later:06d}")


def same(one: Path, other: Path) -> bool:
    a, b = weights(one), weights(other)
    return losses(one) == losses(other) and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def with_math(micro_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that had the backend "math" from the first step on."""
    output = tmp_path_factory.mktemp("runs") / "math"
    run(words(micro_model, output, "--attention", "math"), processes=1)
    return output


ONLY_MATH = "flash=wrong"  # and CPUs have no efficient


@pytest.mark.parametrize("fault", ["nan_backward", "nan_forward"])
def test_a_run_goes_on_with_another_backend_from_the_step_whose_gradient_was_not_finite(
    micro_model: Path, with_math: Path, tmp_path: Path, fault: str
) -> None:
    output = tmp_path / "run"
    stands = f"native={fault},{ONLY_MATH}"
    said = run([stands, *words(micro_model, output)], processes=1, function=vcdeft_with)
    operation, loss = {
        "nan_backward": ("SpoiledGradientBackward of single_transformer_blocks.0.attn", "finite"),
        "nan_forward": ("the forward pass of transformer_blocks.0.attn", "not finite"),
    }[fault]
    line = f"step 1: gradient not finite after {operation} (float32, attention native, loss {loss})"
    assert said.count("gradient not finite") == 1
    assert f"{line}; with attention math it is: the run goes on so" in said
    assert "skipped" not in said
    assert same(output, with_math)
    assert json.loads((output / run_folder.VERSIONS).read_text())["attention"] == "math"
    found = newest(output / "checkpoints")[0].progress
    assert (found.attention, found.not_finite) == ("math", 0)


def test_after_a_change_of_backend_a_run_is_one_that_had_it_from_there_on(
    micro_model: Path, tmp_path: Path
) -> None:
    """Bit for bit, also resumed after the change: with the backend that it changed to, though
    torch's own would work again."""
    changed, named = tmp_path / "changed", tmp_path / "named"
    stands = f"native=nan_backward@step3,{ONLY_MATH}"
    said = run([stands, *words(micro_model, changed)], processes=1, function=vcdeft_with)
    assert "step 3: gradient not finite after" in said
    run(words(micro_model, named), processes=1)
    back_to(named, 2)
    run(["train", "--resume", "--output", named, "--attention", "math"], processes=1)
    assert same(changed, named)
    whole = tmp_path / "whole"
    shutil.copytree(changed, whole)
    back_to(changed, 4)
    run(["train", "--resume", "--output", changed], processes=1)
    assert same(changed, whole)
    assert newest(changed / "checkpoints")[0].progress.attention == "math"


@pytest.mark.processes
@pytest.mark.parametrize("zero", [0, 2, 3])
def test_all_processes_change_the_backend_where_it_fails_in_one(
    micro_model: Path, tmp_path: Path, zero: int
) -> None:
    """And take the same step again: its examples, its noise, its dropout."""
    more = ["--zero", zero, "--gradient-checkpointing", "all", "--set", "scheduled_sampling=0.5"]
    more += ["--set", "accumulate=2", "--set", "adapter.dropout=0.3"]
    one, other = tmp_path / "one", tmp_path / "other"
    stands = f"native=nan_backward@1,{ONLY_MATH}"
    said = run([stands, *words(micro_model, one, *more)], function=vcdeft_with)
    assert said.count("with attention math it is") == 1
    run(words(micro_model, other, *more, "--attention", "math"))
    assert same(one, other)


def test_a_step_whose_gradient_is_finite_the_second_time_is_taken(
    micro_model: Path, tmp_path: Path
) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    said = run(["native=nan_backward@once", *words(micro_model, one)], function=vcdeft_with)
    assert said.count("step 1: gradient not finite; computed again, it is") == 1
    assert "skipped" not in said
    run(words(micro_model, other))
    assert losses(one) == pytest.approx(losses(other), rel=1e-5)  # plain attention, once


def test_a_run_goes_on_with_composed_norms_where_the_fused_ones_fail(
    micro_model: Path, tmp_path: Path
) -> None:
    """Also resumed, without taking a step again."""
    output, whole = tmp_path / "run", tmp_path / "whole"
    said = run(["norms", *words(micro_model, output)], processes=1, function=vcdeft_with)
    assert "; with attention native and norms composed of single operations it is" in said
    assert newest(output / "checkpoints")[0].progress.norms == "composed"
    shutil.copytree(output, whole)
    back_to(output, 2)
    resuming = ["norms", "train", "--resume", "--output", output]
    said = run(resuming, processes=1, function=vcdeft_with)
    assert "not finite" not in said
    assert same(output, whole)
    page = (output / REPORT).read_text()
    assert "SpoiledGradientBackward of single_transformer_blocks.0.attn.norm_" in page
    assert "now native, norms composed" in page


def test_where_no_backend_helps_the_run_ends_with_operation_and_layer_and_blames_no_example(
    micro_model: Path, tmp_path: Path
) -> None:
    stands = "native=nan_backward,flash=nan_backward,math=nan_in_models"
    more = ["--set", "not_finite_at_most=2"]
    group = Group(
        [stands, *words(micro_model, tmp_path / "run", *more)], processes=1, function=vcdeft_with
    )
    assert group.wait() == 2
    (line,) = (line for line in group.said.splitlines() if line.startswith("vcdeft: "))
    where = "SpoiledGradientBackward of single_transformer_blocks.0.attn (float32, attention native"
    assert f"the first after {where}, loss finite). Their losses are finite: try another" in line
    assert "tasks preview" not in line
    tried = "loss finite), nor with attention math"  # flash is wrong already in its test
    assert f"step 1: gradient not finite after {where}, {tried}" in group.said
    assert group.said.count("gradient not finite after") == 1  # explained once
    assert "skipped, its gradient is not finite: examples 0 to 1, whose losses are" in group.said


def test_auto_in_a_run_takes_what_is_right_and_the_folder_records_it(
    micro_model: Path, with_math: Path, tmp_path: Path
) -> None:
    """As on a GPU: tested before the first step."""
    output = tmp_path / "run"
    stands = "test,flash=reads_behind,efficient=wrong,native=raises"
    said = run([stands, *words(micro_model, output)], processes=1, function=vcdeft_with)
    (line,) = (line for line in said.splitlines() if line.startswith("attention: "))
    assert line.startswith("attention: math (checked in float32 at ")
    assert "refused: flash: the output is not finite" in line
    assert "efficient: the gradient of keys is off by 10" in line
    recorded = json.loads((output / run_folder.VERSIONS).read_text())
    assert (recorded["attention"], recorded["attention_check"]) == ("math", line)
    assert same(output, with_math)
    back_to(output, 3)
    said = run(
        ["test,flash=right", "train", "--resume", "--output", output],
        processes=1,
        function=vcdeft_with,
    )
    assert "attention: math (checked" in said  # which it had, though flash would be faster
    assert same(output, with_math)
