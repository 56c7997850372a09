"""Compiled blocks: many shapes of grids, the limit of torch, and the time that is said."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from processes import Group, run
from test_train import losses

from visualcloze_deft import rundir
from visualcloze_deft.compiled import VARIANTS, Compiling, compile_blocks, explained
from visualcloze_deft.errors import UserError
from visualcloze_deft.models import load_models


@pytest.fixture(autouse=True)
def own_settings() -> Iterator[None]:
    """torch's settings and what it has compiled are those of one test."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=8, accumulated_recompile_limit=256):
        yield
    torch._dynamo.reset()


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
    compile_blocks(load_models(str(micro_model)).transformer)
    each = torch.compile(double, backend="eager", dynamic=False)
    with torch._dynamo.config.patch(recompile_limit=2):
        for length in range(2, 8):
            assert torch.equal(each(torch.ones(length)), 2 * torch.ones(length))
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
    run([*words, "--output", tmp_path / "plain"], processes=1)
    group = Group([*words, "--output", tmp_path / "run", "--set", "compile=true"], processes=1)
    assert group.wait(500) == 0, group.said[-3000:]
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "plain"), rel=1e-4)
    lines = [json.loads(x) for x in (tmp_path / "run" / rundir.METRICS).read_text().splitlines()]
    assert len({line["tokens_per_second"] * line["seconds"] // 4 for line in lines}) > 8
    assert all(0 < line["compiling"] <= 1 for line in lines)
    assert "compiling took " in group.said
    assert "run uncompiled" not in group.said
    assert "compiling" not in (tmp_path / "plain" / rundir.METRICS).read_text()
