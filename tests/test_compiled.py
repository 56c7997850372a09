"""Compiled blocks: many shapes of grids, the limit of torch, and the time that is said."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from processes import Group, run
from test_train import losses
from torch._dynamo.utils import counters

from visualcloze_deft.adapters import injection
from visualcloze_deft.adapters.deft import deft_linear
from visualcloze_deft.backbones.compiled import VARIANTS, Compiling, compile_blocks, explained
from visualcloze_deft.backbones.flux_fill.loading import load_models, load_transformer
from visualcloze_deft.backbones.flux_fill.model import predict_velocity
from visualcloze_deft.config.run_settings import Adapter
from visualcloze_deft.errors import Logged, UserError
from visualcloze_deft.training import run_folder
from visualcloze_deft.training.engine import recompute


@pytest.fixture(autouse=True)
def own_settings() -> Iterator[None]:
    """torch's settings and what it has compiled are those of one test."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=8, accumulated_recompile_limit=256):
        yield
    torch._dynamo.reset()
    counters.clear()


def transformer(double: int, single: int) -> FluxTransformer2DModel:
    """A random transformer with an adapter, ready to train."""
    torch.manual_seed(0)
    found = FluxTransformer2DModel(
        in_channels=384,
        out_channels=64,
        num_layers=double,
        num_single_layers=single,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    return found.requires_grad_(False)


def trained(model: FluxTransformer2DModel, *, recomputed: int = 0) -> None:
    injection.attach(model, Adapter(rank=2), seed=0)
    recompute(model, recomputed)
    deft_linear.share_factors(model)
    compile_blocks(model)


def step(model: FluxTransformer2DModel, *, grids: int, length: int, grad: bool = True) -> None:
    """Both passes over grids of `length` image tokens and 3 text tokens; without `grad` the first
    alone, as for a scheduled_sampling."""
    with nullcontext() if grad else torch.no_grad():
        velocity = predict_velocity(
            model,
            torch.randn(grids, length, 384),
            torch.rand(grids),
            ids=torch.zeros(length, 3),
            text=torch.randn(grids, 3, 16),
            pooled=torch.randn(grids, 16),
            guidance=1.0,
        )
    if grad:
        velocity.square().mean().backward()


def variants(model: FluxTransformer2DModel, shapes: list[tuple[int, int]]) -> int:
    """Graphs that torch makes of the blocks for (grids, length), with and without gradients."""
    torch._dynamo.reset()
    counters.clear()
    with torch.compiler.set_stance("default", force_backend="eager"):
        for grids, length in shapes:
            step(model, grids=grids, length=length, grad=False)
            step(model, grids=grids, length=length)
    assert not counters["graph_break"]
    return counters["stats"]["unique_graphs"]


def test_more_blocks_make_no_more_variants(one_thread: None) -> None:
    few, many = transformer(2, 2), transformer(3, 5)
    trained(few, recomputed=3)
    trained(many, recomputed=3)
    assert variants(few, [(2, 8)]) == variants(many, [(2, 8)]) < VARIANTS


def test_more_shapes_make_no_more_variants(one_thread: None) -> None:
    model = transformer(1, 1)
    trained(model)
    assert variants(model, [(2, 8), (2, 12)]) == variants(model, [(2, 8), (2, 12), (2, 16)])


def test_a_quantised_block_is_one_graph(one_thread: None, micro_model: Path) -> None:
    model = load_transformer(str(micro_model), dtype=torch.float32, bits="fp8")
    trained(model)
    assert variants(model, [(2, 8)]) == 4  # two kinds of blocks, with and without gradients


def test_a_block_is_one_graph_where_the_compiler_cannot_look_up_autocast(
    monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    """As torch before 2.12, where each layer became a graph and each place a variant of it."""
    unknown = torch.compiler.disable(torch.amp.is_autocast_available)
    monkeypatch.setattr(torch.amp, "is_autocast_available", unknown)
    model = transformer(1, 1)
    trained(model)
    assert variants(model, [(2, 8)]) == 4


def double(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


def test_more_shapes_than_torch_allows_by_itself_stay_compiled(micro_model: Path) -> None:
    compile_blocks(load_models(str(micro_model)).transformer)
    compiled = []

    def backend(graph: torch.fx.GraphModule, _: object) -> object:
        compiled.append(graph)
        return graph.forward

    each = torch.compile(double, backend=backend, dynamic=False)
    for length in range(2, 14):
        each(torch.ones(length))
    assert len(compiled) == 12 < VARIANTS


def test_beyond_the_limit_one_line_is_said_and_results_stay(
    micro_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where the command line makes one line of what a library logs."""
    compile_blocks(load_models(str(micro_model)).transformer)
    each = torch.compile(double, backend="eager", dynamic=False)
    before = logging.getLogRecordFactory()
    logging.setLogRecordFactory(Logged)
    try:
        with torch._dynamo.config.patch(recompile_limit=2):
            for length in range(2, 8):
                assert torch.equal(each(torch.ones(length)), 2 * torch.ones(length))
    finally:
        logging.setLogRecordFactory(before)
    (line,) = capsys.readouterr().out.splitlines()
    assert "grids of other shapes run uncompiled" in line


def test_what_cannot_be_compiled_is_refused_in_one_line() -> None:
    def backend(*_: object) -> object:
        raise AssertionError("get_pw_red_splits\n of many lines")

    with pytest.raises(UserError) as found, explained():
        torch.compile(double, backend=backend)(torch.ones(3))
    assert "cannot compile these blocks" in str(found.value)
    assert "get_pw_red_splits of many lines" in str(found.value)
    assert "\n" not in str(found.value)
    with pytest.raises(RuntimeError, match="another"), explained():
        raise RuntimeError("another")


def test_the_time_of_compiling_is_counted() -> None:
    compiling = Compiling()
    assert compiling.seconds == 0
    torch.compile(double, backend="eager")(torch.ones(3))
    found = compiling.seconds
    assert found > 0
    assert 0 < compiling.share <= 1
    assert double(torch.ones(3)).sum() == 6
    assert compiling.seconds == found


@pytest.mark.processes  # minutes of compiling
def test_a_compiled_run_over_many_shapes_has_the_losses_of_one_that_is_not(
    micro_model: Path, tmp_path: Path
) -> None:
    """Grids of 1 to 5 rows of 2 to 4 cells."""
    words = ["train", "--model", micro_model, "--tasks", "all", "--rank", "4", "--steps", "24"]
    rows = "data.recipe.examples=[1,1,1,1,1]"
    words += ["--set", rows, "--set", "data.recipe.run_length=1", "--lr", "0.001"]
    words += ["--set", "sample_grids=2"]
    run([*words, "--output", tmp_path / "plain"], processes=1)
    group = Group([*words, "--output", tmp_path / "run", "--set", "compile=true"], processes=1)
    assert group.wait(500) == 0, group.said[-3000:]
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "plain"), rel=1e-4)
    lines = [
        json.loads(x) for x in (tmp_path / "run" / run_folder.METRICS).read_text().splitlines()
    ]
    assert len({line["tokens_per_second"] * line["seconds"] // 4 for line in lines}) > 8
    assert all(0 < line["compiling"] <= 1 for line in lines)
    assert "compiling took " in group.said
    assert "run uncompiled" not in group.said
    assert "compiling" not in (tmp_path / "plain" / run_folder.METRICS).read_text()
