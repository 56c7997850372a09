"""The scripts for a GPU, on a CPU: rows come as they are known, and a crash is one of them."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bench_gpu
import check_gpu
import gpu_rows
import pytest
import smoke_gpu
from gpu_rows import FAULT, LEFT_OUT, NOTED, OK, Case, Row, read

WORK = """
import os, time

def add(a, b):
    return {"sum": a + b, "process": os.getpid()}

def crash():
    raise RuntimeError("CUDA error: an illegal memory access was encountered")

def end():
    os.kill(os.getpid(), 11)

def wrong():
    return {"fault": "error 0.3"}

def sleep():
    time.sleep(60)

def talk():
    print("a library's notice")
    return {}
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Row]]:
    """Runs cases of the functions above; their rows by name, and "status"."""
    (tmp_path / "work.py").write_text(WORK)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def rows_of(*cases: Case, minutes: float = 1, only: str = "") -> dict[str, Any]:
        asked = argparse.Namespace(
            output=tmp_path / "out", minutes=minutes, only=only, small=True, table=False
        )
        status = gpu_rows.run(cases, "work", asked)
        return {row["name"]: row for row in read(tmp_path / "out")} | {"status": status}

    return rows_of


def case(work: str, name: str = "", *, section: str = "any", **more: Any) -> Case:
    return Case(section=section, name=name or work, work=work, **more)


def test_a_crash_is_a_row_with_its_error_and_the_other_rows_come_all_the_same(
    run: Callable[..., dict[str, Row]],
) -> None:
    one = {"a": 1, "b": 2}
    found = run(
        case("add", "before", given=one), case("crash"), case("end"), case("add", given=one)
    )
    assert found["status"] == 1
    assert [found[name]["verdict"] for name in ("before", "crash", "end", "add")] == [
        OK, FAULT, FAULT, OK,
    ]  # fmt: skip
    assert found["add"]["sum"] == 3
    assert found["add"]["process"] != found["before"]["process"]
    assert "illegal memory access" in found["crash"]["fault"]
    assert found["end"]["fault"].startswith("exit -11")


def test_cases_share_a_process_until_one_of_another_name_comes(
    run: Callable[..., dict[str, Row]],
) -> None:
    one = {"a": 1, "b": 2}
    names = {"first": "x", "second": "x", "third": "y"}
    found = run(*(case("add", name, given=one, process=at) for name, at in names.items()))
    processes = [found[name]["process"] for name in names]
    assert processes[0] == processes[1] != processes[2]
    assert found["status"] == 0


def test_a_fault_of_what_is_not_required_is_noted(run: Callable[..., dict[str, Row]]) -> None:
    found = run(case("wrong", required=False), case("talk"))
    assert (found["wrong"]["verdict"], found["talk"]["verdict"]) == (NOTED, OK)
    assert found["status"] == 0


def test_a_case_that_takes_too_long_is_ended(run: Callable[..., dict[str, Row]]) -> None:
    found = run(case("sleep", limit=0.5), case("talk"))
    assert found["sleep"]["fault"].startswith("no result after")
    assert found["talk"]["verdict"] == OK


def test_when_the_time_is_up_the_rest_is_left_out(
    run: Callable[..., dict[str, Row]], capsys: pytest.CaptureFixture[str]
) -> None:
    found = run(case("sleep"), case("talk"), minutes=0.02)
    assert found["sleep"]["verdict"] == LEFT_OUT
    assert "talk" not in found
    assert "1 not reached" in capsys.readouterr().out


def test_tables_have_a_column_for_every_figure_and_a_row_for_every_case() -> None:
    rows = [
        {"section": "a", "name": "x", "verdict": OK, "seconds": 1.0, "ms": 2.5},
        {"section": "a", "name": "y", "verdict": FAULT, "seconds": 1.0, "fault": "a|b"},
    ]
    lines = gpu_rows.tables(rows).splitlines()
    assert lines[2] == "|  | verdict | ms | fault | s |"
    assert lines[4:] == ["| x | ok | 2.5 |  | 1 |", "| y | FAULT |  | a/b | 1 |"]


@pytest.mark.parametrize("small", [True, False])
def test_no_two_rows_of_a_script_have_one_name(small: bool) -> None:
    smoke = [one.case for one in smoke_gpu.jobs(small=small)]
    for cases in (check_gpu.cases(small=small), bench_gpu.cases(small=small), smoke):
        names = [one.name for one in cases]
        assert len(names) == len(set(names))


def test_whatever_comes_before_a_chosen_row_is_run_first() -> None:
    every = smoke_gpu.jobs(small=True)
    cases = [one.case for one in every]
    wanted = smoke_gpu.with_needed(every, gpu_rows.chosen(cases, "a diffusers LoRA"))
    names = [one.case.name for one in wanted]
    assert names == ["card and versions", "zero 2", "diffusers", "a diffusers LoRA"]


def script_rows(script: Any, output: Path, only: str) -> list[Row]:
    assert script.main(["--small", "--output", str(output), "--only", only, "--minutes", "9"]) == 0
    return read(output)


def test_the_check_compares_gradients_with_float32(tmp_path: Path) -> None:
    (gradients,) = script_rows(check_gpu, tmp_path, "tiny, lora, auto, grids 8, zero 3")[1:]
    assert gradients["of"] == 64
    assert 0 < gradients["error"] < 0.05


def test_the_bench_measures_a_step_beside_its_plan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = script_rows(bench_gpu, tmp_path, "training: lora, none recomputed")
    step = found[-1]
    assert step["ms"] > 0
    assert step["planned GB"] > 0
    bench_gpu.main(["--table", "--output", str(tmp_path)])
    assert "| lora, none recomputed" in capsys.readouterr().out


def test_the_smoke_test_runs_commands(tmp_path: Path) -> None:
    found = script_rows(smoke_gpu, tmp_path / "out", "plan: ")
    assert [row["verdict"] for row in found] == [OK, OK]


@pytest.mark.processes
@pytest.mark.parametrize(
    ("script", "only"),
    [
        (check_gpu, "--attention auto"),
        (check_gpu, "narrow, "),
        (check_gpu, "norms"),
        (bench_gpu, "both pipelines"),
        (bench_gpu, "peft's"),
        (smoke_gpu, "killed and resumed"),
        (smoke_gpu, "infer: "),
        (smoke_gpu, "export: "),
    ],
)
def test_every_kind_of_row_works_on_a_cpu(script: Any, only: str, tmp_path: Path) -> None:
    asked = ["--small", "--output", str(tmp_path / "out"), "--only", only, "--minutes", "20"]
    assert script.main(asked) == 0
    assert len(read(tmp_path / "out")) > 1
