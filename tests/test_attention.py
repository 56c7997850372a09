"""The choice of attention's kernel: what is refused, what is taken, and who is touched by it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import standins
import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.models.attention_dispatch import _AttentionBackendRegistry as Registry
from standins import standing_in
from torch import Tensor

from visualcloze_deft.adapters import injection
from visualcloze_deft.backbones import attention, attention_check
from visualcloze_deft.backbones.attention import AUTO, BACKENDS, Choice
from visualcloze_deft.backbones.attention_check import Passes, Shapes, plain
from visualcloze_deft.backbones.flux_fill.loading import load_transformer
from visualcloze_deft.backbones.flux_fill.model import predict_velocity
from visualcloze_deft.cli import main
from visualcloze_deft.config.run_settings import Adapter
from visualcloze_deft.errors import UserError
from visualcloze_deft.inference.pipeline import InContextPipeline
from visualcloze_deft.training.engine import recompute

CPU = torch.device("cpu")


def shapes(dtype: torch.dtype = torch.float32, *lengths: int) -> Shapes:
    return Shapes(lengths=lengths or (9, 130), heads=2, width=16, dtype=dtype, device=CPU)


def test_the_four_short_names_are_torchs_kernels_and_all_of_diffusers_can_be_named() -> None:
    names = ("cudnn", "flash", "efficient", "math")
    assert [BACKENDS[name].value for name in names] == [f"_native_{name}" for name in names]
    assert set(BACKENDS.values()) == set(AttentionBackendName)
    assert BACKENDS["flash_attn"] == AttentionBackendName.FLASH


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["native", "flash", "math"])
def test_kernels_that_are_right_pass_the_test(name: str, dtype: torch.dtype) -> None:
    attend = attention.attend_with(name)
    assert attention_check.fault_of(attend, shapes(dtype), passes="both") is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("attend", "forward", "both"),
    [
        (standins.right, None, None),
        (standins.nan_backward, None, "the gradient of keys is not finite at 9 tokens"),
        (standins.nan_forward, "the output is not finite", "the output is not finite"),
        (standins.wrong, None, "the gradient of keys is off by 10"),
        (standins.raises, "no kernel image for this device", "no kernel image for this device"),
        (standins.reads_behind, "the output is not finite", "the output is not finite"),
    ],
)
def test_a_kernel_that_fails_is_refused_with_its_reason(
    attend: attention_check.Attend, forward: str | None, both: str | None, dtype: torch.dtype
) -> None:
    passes: tuple[Passes, ...] = ("forward", "both")
    for each, expected in zip(passes, (forward, both), strict=True):
        fault = attention_check.fault_of(attend, shapes(dtype), passes=each)
        assert (fault or "none").startswith(expected or "none"), fault
        assert "\n" not in (fault or "")


def test_a_fault_in_the_last_tokens_alone_is_found() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        good = attention_check.plain(q, k, v)
        return torch.cat([good[:, :-2], 2 * good[:, -2:]], dim=1)

    fault = attention_check.fault_of(attend, shapes(torch.bfloat16, 1090), passes="forward")
    assert fault is not None
    assert fault.startswith("the output is off by 99")


def test_a_kernel_that_takes_gradients_to_be_contiguous_is_refused() -> None:
    """As in single blocks, where they are parts of wider rows."""

    class Assuming(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, values: Tensor) -> Tensor:
            return values.clone()

        @staticmethod
        def backward(ctx: object, gradient: Tensor) -> Tensor:
            return gradient.as_strided(gradient.shape, torch.empty(gradient.shape).stride())

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return Assuming.apply(attention_check.plain(q, k, v))  # type: ignore[no-any-return]

    fault = attention_check.fault_of(attend, shapes(), passes="both")
    assert fault is not None
    assert "gradient of queries is not finite" in fault


def test_auto_takes_the_first_that_is_right_and_says_what_it_refused() -> None:
    with standing_in(cudnn=standins.nan_backward, flash=standins.wrong, efficient=standins.raises):
        choice = attention.choose(attention.CANDIDATES, shapes(), passes="both")
    assert choice.backend == "math"
    assert choice.line.startswith(
        "attention: math (checked in float32 at 9 and 130 tokens, 2 heads of 16; "
        "refused: cudnn: the gradient of keys is not finite at 9 tokens; "
        "refused: flash: the gradient of keys is off by 10"
    )
    assert choice.line.endswith("; refused: efficient: no kernel image for this device)")


def test_auto_with_no_kernel_that_is_right_says_what_failed() -> None:
    with (
        standing_in(flash=standins.wrong, efficient=standins.raises, math=standins.nan_forward),
        pytest.raises(UserError, match=r"flash: the gradient of keys is off .*math: the output"),
    ):
        attention.choose(("flash", "efficient", "math"), shapes(), passes="both")


def test_a_kernel_that_fails_in_another_process_is_refused_here_too() -> None:
    def shared(fault: str | None) -> str | None:
        told.append(fault)
        return fault or (None if len(told) > 1 else "wrong there")

    told: list[str | None] = []
    choice = attention.choose(("flash", "math"), shapes(), passes="both", shared=shared)
    assert (choice.backend, told) == ("math", [None, None])
    assert "flash: wrong there" in choice.line


def test_compiled_training_takes_cudnn_only_where_it_is_named() -> None:
    compiled = replace(shapes(), compiled=True)
    assert "cudnn" not in attention.candidates(compiled, passes="both")
    assert attention.candidates(compiled, passes="forward")[0] == "cudnn"
    assert attention.candidates(shapes(), passes="both")[0] == "cudnn"


def test_cudnn_is_tested_with_the_dense_gradients_that_a_transformer_gives_it() -> None:
    met: list[bool] = []

    class Attend(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return q * 1

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            met.append(grad.is_contiguous())
            return grad, grad, grad

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        attended: Tensor = Attend.apply(query, key, value)
        return attended

    case = attention_check.inputs(shapes(), 9, layout="part")
    with standing_in(cudnn=attend, flash=attend):
        for name in ("cudnn", "flash"):
            attention_check.results(attention.attend_as_used(name), case, passes="both")
    assert met == [True, False]


def test_auto_on_a_cpu_is_torchs_own_choice_and_tests_nothing() -> None:
    with standing_in(native=standins.raises):
        assert attention.decide(AUTO, shapes(), passes="both") == Choice(backend="native")


@pytest.mark.parametrize(
    ("name", "before", "expected"),
    [(AUTO, "math", "math"), (AUTO, "cudnn", "native"), ("flash", "math", "flash")],
)
def test_auto_goes_on_with_what_a_run_had_where_that_works(
    name: str, before: str, expected: str
) -> None:
    choice = attention.decide(name, shapes(), passes="both", before=before)
    assert choice.backend == expected


def test_the_switch_changes_one_transformer_and_can_be_undone(
    micro_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Not another model's attention, nor the backend of models that have none of their own."""
    first, second = (
        FluxTransformer2DModel.from_pretrained(micro_model, subfolder="transformer")
        for _ in range(2)
    )

    def backends(transformer: FluxTransformer2DModel) -> set[object]:
        return {one._attention_backend for one in transformer.attn_processors.values()}

    active = Registry.get_active_backend()
    attention.use(first, "math")
    assert backends(first) == {AttentionBackendName._NATIVE_MATH}
    assert backends(second) == {None}
    assert Registry.get_active_backend() == active
    attention.use(first, "native")
    assert backends(first) == {AttentionBackendName.NATIVE}
    assert not caplog.records


def test_a_pipeline_computes_with_the_backend_that_was_chosen(micro_model: Path) -> None:
    calls: list[str] = []

    def counted(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        calls.append("math")
        return standins.right(query, key, value)

    from test_pipeline import scene_rows

    pipe = InContextPipeline.from_pretrained(str(micro_model))
    assert pipe.attention == Choice(backend="native")
    plain = pipe(rows=scene_rows(), num_inference_steps=1, output_type="np")[0]
    with standing_in(math=counted):
        pipe.set_attention("math")
        calls.clear()
        other = pipe(rows=scene_rows(), num_inference_steps=1, output_type="np")[0]
    assert len(calls) == 2  # blocks
    assert abs(plain - other).max() < 1e-3
    pipe.set_attention("auto")
    again = pipe(rows=scene_rows(), num_inference_steps=1, output_type="np")[0]
    assert (again == plain).all()


def test_a_pipeline_that_tests_its_kernels_says_what_it_took(
    micro_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "UNTESTED", frozenset())
    with standing_in(cudnn=standins.wrong, flash=standins.nan_forward, efficient=standins.right):
        pipe = InContextPipeline.from_pretrained(str(micro_model))
        assert pipe.attention.backend == "cudnn"  # wrong in the backward pass alone
        with standing_in(cudnn=standins.raises):
            pipe.set_attention("auto")
    assert pipe.attention.backend == "efficient"
    assert "refused: cudnn: no kernel image" in pipe.attention.line
    assert "refused: flash: the output is not finite" in pipe.attention.line


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("flashy", "--attention flashy: did you mean flash?"),
        ("cudnn", "--attention cudnn: does not work here, on cpu in float32 (No viable backend"),
        ("flash_attn", "--attention flash_attn: does not work here"),
    ],
)
def test_a_backend_that_is_not_here_is_refused_before_anything_is_loaded(
    hollow_model: Path,
    tmp_path: Path,
    grid_file: Callable[..., Path],
    refused: Callable[..., str],
    name: str,
    said: str,
) -> None:
    model = ("--model", hollow_model, "--attention", name)
    line = refused("train", *model, "--output", tmp_path / "run")
    assert said in line
    assert name == "flashy" or "give auto, or one of native" in line
    assert not (tmp_path / "run").exists()
    assert said in refused("infer", *model, "--examples", grid_file(), "--output", tmp_path / "out")
    with pytest.raises(UserError, match=f"--attention {name}"):
        InContextPipeline.from_pretrained(str(hollow_model), attention=name)


def test_a_record_says_which_kernel_made_the_image_and_auto_leaves_it_finished(
    micro_model: Path,
    tmp_path: Path,
    grid_file: Callable[..., Path],
    refused: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Whichever kernel "auto" takes the next time."""
    monkeypatch.setattr(attention, "UNTESTED", frozenset())
    words = [
        "infer",
        "--model",
        str(micro_model),
        "--examples",
        str(grid_file()),
        "--inference-steps",
        "1",
    ]
    words += ["--output", str(tmp_path / "out")]
    with standing_in(cudnn=standins.right):
        main(words)
    line = "attention: cudnn (checked in float32 at "
    assert line in capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "001.json").read_text())
    assert (record["attention"], record["attention_used"]) == (None, "cudnn")
    assert record["attention_check"].startswith(line)
    with standing_in(cudnn=standins.wrong):
        main(words)
    assert "1 of 1 grids are finished already" in capsys.readouterr().out
    assert "made with attention null, asked for is" in refused(*words, "--attention", "math")


def strides_and_gradients(
    folder: Path, *, dense: bool, blocks: str
) -> tuple[set[tuple[int, ...]], list[Tensor]]:
    """The strides of the gradients that attention's output gets in all blocks, and the adapter's
    gradients."""
    model = load_transformer(str(folder), dtype=torch.float32).train()
    injection.attach(model, Adapter(rank=2), seed=0)
    recompute(model, blocks)
    if dense:
        attention.dense_gradients(model)
        attention.dense_gradients(model)  # twice is once
    found: set[tuple[int, ...]] = set()

    def noting(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = plain(query, key, value)
        if output.requires_grad:
            output.register_hook(lambda gradient: found.add(gradient.stride()))
        return output

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(Registry._backends, BACKENDS["native"], noting)
        names = {"query", "key", "value"}
        patch.setitem(Registry._supported_arg_names, BACKENDS["native"], names)
        config, draw = model.config, torch.Generator().manual_seed(0)
        predict_velocity(
            model,
            torch.randn(2, 8, config.in_channels, generator=draw),
            torch.rand(2, generator=draw),
            ids=torch.ones(8, 3),
            text=torch.randn(2, 4, config.joint_attention_dim, generator=draw),
            pooled=torch.randn(2, config.pooled_projection_dim, generator=draw),
            guidance=1.0,
        ).square().mean().backward()
    return found, [p.grad for p in injection.trainable(model).values()]


@pytest.mark.parametrize("blocks", ["none", "all"])
def test_dense_gradients_have_one_layout_in_all_blocks_and_the_same_numbers(
    micro_model: Path, blocks: str
) -> None:
    """Without, single blocks have another layout than double ones: cuDNN's backward pass in torch
    2.11 is compiled for the first one and reads all others with it."""
    odd, expected = strides_and_gradients(micro_model, dense=False, blocks=blocks)
    alike, found = strides_and_gradients(micro_model, dense=True, blocks=blocks)
    assert len(odd) == 2
    assert len(alike) == 1
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
