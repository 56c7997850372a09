"""Every script works from its command line to its last line, at its smallest.

The scripts for a GPU are in test_gpu_scripts.py, those of the embedded base in test_train_base.py.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import golden
import pytest
import tomli_w
from PIL import Image
from test_compare import fields

from visualcloze_deft.adapters import files, injection
from visualcloze_deft.backbones.flux_fill.loading import load_models
from visualcloze_deft.config.run_settings import Adapter, load_run, write_run
from visualcloze_deft.training.run_folder import SETTINGS

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "scripts"
RECIPE = """#!/bin/sh
{}
"""

Script = Callable[..., str]


def test_every_script_is_run_by_a_test() -> None:
    """Or is a part of one that is."""
    code = [*SCRIPTS.rglob("*.py"), *Path(__file__).parent.glob("*.py")]
    for script in SCRIPTS.glob("*.*"):
        others = (path.read_text(encoding="utf-8") for path in code if path != script)
        assert any(re.search(rf"\b{script.stem}\b", text) for text in others), script.name


@pytest.fixture
def script(tmp_path: Path) -> Script:
    """Runs `python scripts/NAME WORDS` in a folder of its own; what it printed."""

    def run(name: str, *words: object, where: Path = SCRIPTS) -> str:
        places = filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
        done = subprocess.run(
            [sys.executable, where / name, *map(str, words)],
            cwd=tmp_path,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(places)},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return run


@pytest.fixture(scope="module")
def adapter(micro_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    models = load_models(str(micro_model))
    injection.attach(models.transformer, Adapter(rank=2), seed=3)
    files.save(models.transformer, folder, base="micro")
    return folder


@pytest.fixture
def photos(tmp_path: Path) -> str:
    for role, colour in {"depth": "grey", "target": "red"}.items():
        (tmp_path / "photos" / role).mkdir(parents=True)
        for k in range(4):
            Image.new("RGB", (48, 32), colour).save(tmp_path / "photos" / role / f"{k}.png")
    return f"folder={tmp_path / 'photos'}"


def rows(table: str) -> list[list[str]]:
    """The cells of a Markdown table's rows."""
    lines = [line for line in table.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


# ---- figures


@pytest.mark.scripts
def test_the_data_bench_times_grids_tables_and_waiting(script: Script, photos: str) -> None:
    small = "--tasks depth-to-image --resolution 32 --grids 1 --rounds 1 --rows 100 --tokens 100"
    said = script("bench_data.py", "--data", photos, *small.split())
    assert "of the time is waiting" in said


@pytest.mark.scripts
def test_the_start_bench_times_whole_commands(script: Script) -> None:
    rows = script("bench_start.py", "--repeats", 1).splitlines()
    assert len(rows) == 2 + 4


@pytest.mark.scripts
def test_the_context_cache_is_measured_beside_other_caches(
    script: Script, micro_model: Path, tmp_path: Path
) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- context:begin -->\nold\n<!-- context:end -->\nafter\n")
    small = "--scenes 1 --seeds 1 --steps 5 --examples 1 --output out"
    said = script("measure_context.py", "--model", micro_model, "--report", page, *small.split())
    found = rows(said)
    assert [row[0] for row in found[2:7]] == [
        "none",
        *(f"context cache, {full} full" for full in (1, 2, 3)),
        "first-block=0.05",
    ]
    assert found[2][2] == ""
    assert rows(page.read_text()) == found
    told = ("--model", micro_model, "--ways", "2 full", *small.split())
    again = rows(script("measure_context.py", *told))
    assert [row[0] for row in again] == [row[0] for row in found]  # the others stay


@pytest.mark.scripts
def test_the_context_cache_is_timed_beside_diffusers_own_pipeline(
    script: Script, tmp_path: Path
) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- peers:begin -->\nold\n<!-- peers:end -->\nafter\n")
    small = "--resolution 32 --steps 3 --rounds 1 --output out"
    found = rows(script("bench_peers.py", "--report", page, *small.split()))
    assert found[2][:3] == ["diffusers", "none", "1.00"]
    named = {row[1]: row for row in found}
    assert "more than 3 steps" in named["`--context-cache 6`"][4]
    assert named["`--context-cache 1`"][4].endswith(" dB")
    assert rows(page.read_text()) == found


@pytest.mark.scripts
def test_the_precisions_of_compiled_examples_are_compared(
    script: Script, micro_model: Path, adapter: Path, tmp_path: Path
) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- compiled:begin -->\nold\n<!-- compiled:end -->\nafter\n")
    small = "--scenes 1 --steps 1 --output out"
    told = ("--model", micro_model, "--adapter", adapter, "--report", page, *small.split())
    found = rows(script("measure_compiled.py", *told))
    assert [row[0] for row in found[2:]] == ["model", "fp8", "int8"]
    assert found[2][2] == "0.00%"
    assert float(found[3][2].rstrip("%")) > float(found[4][2].rstrip("%")) > 0
    assert rows(page.read_text()) == found


@pytest.mark.scripts
def test_trained_contexts_are_compared_with_a_full_one(
    script: Script, micro_model: Path, tmp_path: Path
) -> None:
    for context in ("full", "mixed"):
        run = load_run(None, [f"model={micro_model}", f"context={context}", "adapter.rank=2"])
        models = load_models(str(micro_model))
        injection.attach(models.transformer, run.adapter, seed=3)
        folder = tmp_path / context / "adapter"
        folder.mkdir(parents=True)
        files.save(models.transformer, folder, base="micro", metadata={"context": context})
        write_run(run, folder.parent / SETTINGS)
    said = script("measure_trained_context.py", "full", "mixed", "--scenes", 1, "--steps", 1)
    found = rows(said)
    ways = ["full", "mixed, run full", "mixed, run isolated"]
    assert [cell.rpartition(",")[0] for cell in found[0][1:]] == ways
    (apart,) = (row for row in found if row[0].startswith("to full"))
    assert apart[1] == ""
    assert apart[2].startswith("+0.00")  # the same untrained adapter, run the same way
    assert rows((tmp_path / "runs" / "trained-context" / "table.md").read_text()) == found


@pytest.mark.scripts
def test_the_encodings_bench_tells_how_often_an_entry_is_met_again(
    script: Script, photos: str
) -> None:
    said = script("bench_encodings.py", "--data", photos, "--batch", 1, "--rounds", 1)
    assert "| all tasks, their usual words | 11 to 20 |" in said


@pytest.mark.scripts
def test_the_infer_bench_compares_both_pipelines(script: Script, tmp_path: Path) -> None:
    report = tmp_path / "page.md"
    report.write_text("before\n<!-- bench:begin -->\nold\n<!-- bench:end -->\nafter\n")
    small = "--resolution 32 --steps 1 --cached-steps 2 --rounds 1 --batch 1 --output out"
    said = script("bench_infer.py", *small.split(), "--caches", "--report", report)
    assert (tmp_path / "out" / "table.md").read_text() == said.removesuffix("\n")
    text = report.read_text()
    assert "old" not in text
    assert "| 4x4 |" in text
    assert text.startswith("before")
    assert text.endswith("after\n")


@pytest.mark.scripts
def test_the_train_bench_compares_engines(
    script: Script, micro_model: Path, tmp_path: Path
) -> None:
    small = "--tasks depth-to-image --batch 1 --rank 2 --rounds 1 --warmup 1 --output out"
    said = script("bench_train.py", "--model", micro_model, *small.split())
    names = [row[0] for row in rows(said)]
    assert {"vcdeft deft", "vcdeft lora", "accelerate + peft LoRA"} <= {*names}
    assert (tmp_path / "out" / "bench.json").is_file()


@pytest.mark.scripts
def test_the_zero_bench_has_a_row_for_each_stage(script: Script, micro_model: Path) -> None:
    small = "--stages 2 --processes 1 --batch 1 --steps 3 --rounds 1"
    more = ("--", "--tasks", "depth-to-image", "--rank", 2)
    found = rows(script("bench_zero.py", "--model", micro_model, *small.split(), *more))
    assert found[-1][0] == "2"
    assert int(found[-1][2]) > 0


@pytest.mark.scripts
def test_the_adapter_bench_times_a_layer_and_a_step(script: Script, tmp_path: Path) -> None:
    small = "--tokens 16 --rounds 1 --ranks 2 --dtypes float32 --shapes 0 --blocks 0 1"
    variants = ("--variants", "linear", "peft LoRA")
    said = script(
        "bench_adapters.py", *small.split(), "--block-tokens", 144, *variants, "--output", "out"
    )
    assert {"linear", "peft LoRA"} <= {row[0] for row in rows(said)}
    assert (tmp_path / "out" / "bench.json").is_file()


@pytest.mark.scripts
def test_the_cost_model_prints_a_table_of_methods(script: Script) -> None:
    small = "--rows 1 --columns 2 --ranks 2 --blocks 1 1 --kinds"
    said = script("cost_model.py", *small.split())
    assert "launches" in said
    assert len(rows(said)) > 2


# ---- results, and the pages that show them


@pytest.mark.scripts
def test_an_evaluation_of_scenes_comes_into_the_readme(
    script: Script, micro_model: Path, adapter: Path, tmp_path: Path
) -> None:
    asked = ("--adapter", adapter, "--model", micro_model, "--scenes", 1, "--steps", 1)
    script("evaluate_scenes.py", *asked, "--output", "found")
    table = (tmp_path / "found" / "table.md").read_text()
    place = copied("update_readme.py", tmp_path / "repository")
    for page in ("README.md", "docs/results.md"):
        (place / page).parent.mkdir(exist_ok=True)
        shutil.copyfile(ROOT / page, place / page)
    script("update_readme.py", "found", where=place / "scripts")
    text = (place / "docs" / "results.md").read_text()
    assert f"<!-- table:begin -->\n{table}<!-- table:end -->" in text
    shown = (place / "README.md").read_text().split("<!-- results:begin -->")[1]
    assert next(row for row in rows(table) if "deblurring" in row) in rows(shown)
    assert len(rows(table)) > 11
    assert (place / "docs" / "images" / "demo.png").is_file()


@pytest.mark.scripts
def test_the_first_picture_of_the_readme_is_drawn(
    script: Script, micro_model: Path, adapter: Path, tmp_path: Path
) -> None:
    asked = ("--adapter", adapter, "--model", micro_model, "--steps", 1)
    script("draw_grid.py", *asked, "--output", "docs/grid.png")
    with Image.open(tmp_path / "docs" / "grid.png") as picture:
        assert picture.width > 3 * picture.height


@pytest.mark.scripts
def test_golden_values_are_the_same_twice_and_a_difference_is_found(
    script: Script, tmp_path: Path
) -> None:
    script("golden.py", "--small", "--output", "one.json")
    said = script("golden.py", "--small", "--output", "two.json", "--against", "one.json")
    assert "all 3 values as before" in said
    values = json.loads((tmp_path / "one.json").read_text())
    other = golden.differences(values, values | {"export": "0"})
    assert len(other) == 1
    assert other[0].startswith("export:")


@pytest.mark.scripts
def test_prose_is_measured_by_its_sentences(script: Script, tmp_path: Path) -> None:
    long = " ".join(["word"] * 31)
    text = (
        f"# A heading that is long\n\nOne two three. Four what.\n\n```\n{long}\n```\n\n- {long}.\n"
    )
    (tmp_path / "page.md").write_text(text)
    ((_, words, share, what),) = rows(script("prose.py", "page.md"))[2:]
    assert (words, share, what) == ("12.0", "33%", "27.8")


@pytest.mark.scripts
def test_code_that_runs_is_counted(script: Script) -> None:
    (_, files, functions), (_, before, _) = rows(script("trace_flow.py"))[2:]
    assert 1 < int(files) < int(functions)
    assert int(before) > 1


@pytest.mark.scripts
def test_rates_are_swept_and_a_comparison_comes_into_its_page(
    script: Script, micro_model: Path, tmp_path: Path
) -> None:
    value = fields(micro_model, tmp_path / "compare-scenes")
    value |= {"methods": ["lora"], "seeds": [0], "match": ["rank"]}
    value["run"] |= {"steps": 4, "save_every": 4}
    (tmp_path / "small.toml").write_text(tomli_w.dumps(value))
    said = script("sweep_rates.py", "small.toml", "--rates", "1e-3", "--output", "rates")
    assert re.search(r"^lora-r4-s3: 1e-3\n +1e-3 +\d\.\d+ ", said, re.M)

    words = [sys.executable, "-m", "visualcloze_deft", "compare", "small.toml"]
    subprocess.run(words, cwd=tmp_path, check=True, capture_output=True, timeout=300)
    place = copied("update_compare.py", tmp_path / "repository")
    shutil.copyfile(ROOT / "docs" / "compare.md", place / "docs" / "compare.md")
    script("update_compare.py", "compare-scenes", where=place / "scripts")
    page = (place / "docs" / "compare.md").read_text()
    part = page.partition("<!-- compare-scenes:begin -->")[2].partition("<!-- compare-scenes:end")[
        0
    ]
    assert "<summary>Each task</summary>" in part
    for picture in re.findall(r"\]\((images/.*?)\)", part):
        assert (place / "docs" / picture).is_file()


def copied(name: str, place: Path) -> Path:
    """A repository that has this script alone: it writes into the one that it lies in."""
    (place / "scripts").mkdir(parents=True)
    (place / "docs").mkdir()
    shutil.copyfile(SCRIPTS / name, place / "scripts" / name)
    return place


# ---- shell


def test_wheels_for_a_gpu_machine_are_those_that_the_project_names(tmp_path: Path) -> None:
    """A Python that only writes down what it is asked for stands in for pip and the network."""
    python = tmp_path / "python"
    python.write_text(RECIPE.format('printf "%s\\n" "$@" >> asked'))
    python.chmod(0o755)
    run = ["sh", SCRIPTS / "gpu_wheels.sh", "3.11"]
    subprocess.run(run, cwd=tmp_path, env=os.environ | {"PYTHON": str(python)}, check=True)
    asked = (tmp_path / "asked").read_text().splitlines()
    assert asked[asked.index("--python-version") + 1] == "3.11"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    name_of = re.compile(r"[\w-]+")
    named = {name_of.match(one)[0]: one for one in asked if re.match(r"[a-z][\w-]*[<>=]", one)}
    needed = [one.partition(";")[0] for one in project["dependencies"]]  # without a system
    wanted = {name_of.match(one)[0]: one for one in needed}
    for name in named.keys() & wanted.keys():
        if not named[name].startswith(f"{name}=="):  # one version of what is split in two packages
            assert named[name] == wanted[name]
    there = "torch jinja2 numpy scipy matplotlib pillow protobuf sentencepiece tensorboard ninja"
    assert wanted.keys() - named.keys() == {*there.split(), "opencv-python-headless"}


@pytest.mark.scripts
def test_a_job_of_slurm_trains(micro_model: Path, tmp_path: Path) -> None:
    """Its lines edited as it says, and on this machine alone, which SLURM would have given."""
    job = (SCRIPTS / "slurm.sh").read_text()
    for told, here in {
        "GPUS=8 ": "GPUS=1 ",
        "--config flux-8gpu-zero3": f"--config tiny --model {micro_model} --zero 2 --steps 1",
        "--data graph200k=/shared/graph200k --output /shared/runs/flux": "--output run",
    }.items():
        assert told in job
        job = job.replace(told, here)
    (tmp_path / "slurm.sh").write_text(job)
    activate = tmp_path / ".venv" / "bin" / "activate"
    activate.parent.mkdir(parents=True)
    activate.write_text("")
    for name, does in {"scontrol": "echo localhost", "srun": 'shift 2; exec "$@"'}.items():
        command = tmp_path / "bin" / name
        command.parent.mkdir(exist_ok=True)
        command.write_text(RECIPE.format(does))
        command.chmod(0o755)
    path = os.pathsep.join([str(tmp_path / "bin"), str(Path(sys.executable).parent)])
    given = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "here", "SLURM_NNODES": "1"}
    subprocess.run(
        ["bash", "slurm.sh", "--tasks", "depth-to-image", "--rank", "2"],
        cwd=tmp_path,
        env=os.environ
        | given
        | {
            "SLURM_CPUS_PER_TASK": "1",
            "PATH": f"{path}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "DS_ACCELERATOR": "cpu",
        },
        check=True,
        timeout=300,
    )
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.scripts
def test_subject_settings_are_measured_with_and_without_prior_preservation(
    script: Script, micro_model: Path, tmp_path: Path
) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- subject:begin -->\nold\n<!-- subject:end -->\nafter\n")
    small = "--seeds 0 --steps 1 --grids 2 --old-grids 2 --inference-steps 1 --output out"
    words = ["--model", micro_model, "--report", page, "--set", "adapter.rank=2", *small.split()]
    said = script("measure_subject.py", *words)
    found = rows(said)
    assert len(found) == 2 * (2 + 5)
    assert all(len(row) == 4 for row in found)
    text = page.read_text()
    assert "old" not in text
    assert rows(text) == found
    assert rows(script("measure_subject.py", *words)) == found  # from what was kept
