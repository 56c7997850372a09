"""`vcdeft infer`: what it writes is enough to make the same images again."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from visualcloze_deft import InContextPipeline
from visualcloze_deft.adapters import files, injection
from visualcloze_deft.adapters.metadata import check_start
from visualcloze_deft.backbones.flux_fill.loading import load_models
from visualcloze_deft.backbones.lora_files import shapes_of
from visualcloze_deft.backbones.peft_files import read_metadata
from visualcloze_deft.backbones.table import fingerprint
from visualcloze_deft.cli import main
from visualcloze_deft.config.run_settings import Adapter, load_run
from visualcloze_deft.errors import UserError
from visualcloze_deft.inference import infer, pipeline
from visualcloze_deft.training import run_folder


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.name.startswith(".")}


def run(*words: object) -> None:
    main([str(word) for word in ("infer", *words, "--inference-steps", 1)])


def test_the_record_of_an_image_makes_it_again(
    micro_model: Path, grid_file: Callable[..., Path], tmp_path: Path
) -> None:
    output, again = tmp_path / "out", tmp_path / "again"
    path = grid_file(content_prompt="a red ball", seed=7)
    run("--examples", path, "--model", micro_model, "--output", output, "--resolution", 32)
    assert names(output) == {"001.png", "001-sheet.png", "001.json"}
    record = json.loads((output / "001.json").read_text())
    kept = ("task", "task_prompt", "content_prompt", "rows", "seed")
    copy = tmp_path / "elsewhere" / "grid.json"
    copy.parent.mkdir()
    copy.write_text(json.dumps({key: record[key] for key in kept}))
    options = ("--model", record["model"], "--resolution", record["resolution"])
    run("--examples", copy, "--output", again, "--guidance", record["guidance"], *options)
    assert (again / "001.png").read_bytes() == (output / "001.png").read_bytes()
    sums = record["rows_sha256"]
    assert sums[0][0] == hashlib.sha256((tmp_path / "a.png").read_bytes()).hexdigest()
    assert (record["dtype"], record["device"]) == ("float32", "cpu")


def two_grids(grid_file: Callable[..., Path]) -> Path:
    row = ["a.png", "b.png"]
    return grid_file([{"rows": [row, ["a.png", None]]}, {"rows": [row, [None, None]], "seed": 9}])


def test_what_is_finished_is_not_made_again(
    micro_model: Path,
    grid_file: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output, path = tmp_path / "out", two_grids(grid_file)
    words = ("--examples", path, "--model", micro_model, "--output", output, "--resolution", 32)
    run(*words)
    assert names(output) >= {"001.png", "002-1.png", "002-2.png"}
    first = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in output.iterdir()}
    (output / "002.json").unlink()  # as if it had been interrupted before
    capsys.readouterr()
    run(*words)
    assert "1 of 2 grids are finished already" in capsys.readouterr().out
    for name, (content, when) in first.items():
        assert (output / name).read_bytes() == content
        assert (output / name).stat().st_mtime_ns == when or name.startswith("002")
    (output / "001.png").unlink()
    run(*words)
    assert (output / "001.png").read_bytes() == first["001.png"][0]


def test_what_was_made_otherwise_is_only_overwritten_where_asked(
    micro_model: Path,
    grid_file: Callable[..., Path],
    tmp_path: Path,
    refused: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    output, path = tmp_path / "out", two_grids(grid_file)
    words = ("--examples", path, "--model", micro_model, "--output", output, "--resolution", 32)
    run(*words)
    capsys.readouterr()
    before = (output / "001.png").read_bytes()
    for other, said in (
        (("--seed", 5), "made with seed 0, asked for is 5"),
        (("--guidance", 3), "made with guidance 30.0, asked for is 3.0"),
        (("--images-per-grid", 2), "made with seed 0, asked for is [0, 1]"),
    ):
        line = refused("infer", *words, "--inference-steps", 1, *other)
        assert said in line
        assert "--overwrite" in line
    Image.new("RGB", (32, 32), "green").save(tmp_path / "b.png")
    assert "made with rows_sha256" in refused("infer", *words, "--inference-steps", 1)
    assert (output / "001.png").read_bytes() == before
    run(*words, "--seed", 5, "--overwrite")
    assert (output / "001.png").read_bytes() != before
    run(*words, "--seed", 5)


def test_what_is_read_is_never_written_over(
    micro_model: Path, grid_file: Callable[..., Path], tmp_path: Path, refused: Callable[..., str]
) -> None:
    (tmp_path / "a.png").rename(tmp_path / "001.png")
    before = (tmp_path / "001.png").read_bytes()
    words = ("--examples", grid_file(rows=[["001.png", None]]), "--model", micro_model)
    for more in ((), ("--overwrite",)):
        assert "is read here" in refused("infer", *words, "--output", tmp_path, *more)
    assert (tmp_path / "001.png").read_bytes() == before
    (tmp_path / "grid.json").rename(tmp_path / "001.json")
    words = ("--examples", tmp_path / "001.json", "--model", micro_model, "--overwrite")
    assert "is read here" in refused("infer", *words, "--output", tmp_path)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("001.png", "not made by this command"),
        ("001-sheet.png", "not made by this command"),
        ("001.json", "no record of vcdeft"),
    ],
)
def test_files_of_others_in_the_output_folder_stay(
    micro_model: Path,
    grid_file: Callable[..., Path],
    tmp_path: Path,
    refused: Callable[..., str],
    name: str,
    said: str,
) -> None:
    path, output = grid_file(rows=[["a.png", None]]), tmp_path / "out"
    output.mkdir()
    (output / name).write_bytes((tmp_path / "a.png").read_bytes())
    before = (output / name).read_bytes()
    words = ("--examples", path, "--model", micro_model, "--output", output, "--inference-steps", 1)
    assert said in refused("infer", *words)
    assert (output / name).read_bytes() == before


def test_a_record_is_a_grid_file(
    micro_model: Path, grid_file: Callable[..., Path], tmp_path: Path
) -> None:
    way = {"scale": 1.5, "strength": 0.5}
    path = grid_file(content_prompt="a cup", seed=[3, 5], upsampling=way)
    run("--examples", path, "--model", micro_model, "--output", tmp_path / "out")
    again = tmp_path / "again"
    run("--examples", tmp_path / "out" / "001.json", "--model", micro_model, "--output", again)
    for name in ("001-seed3.png", "001-seed5.png"):
        assert (again / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_a_folder_of_grid_files_is_one_list(
    micro_model: Path, grid_file: Callable[..., Path], tmp_path: Path
) -> None:
    for name in ("mugs", "cups"):
        two_grids(grid_file).rename(tmp_path / f"{name}.json")
    run("--examples", tmp_path, "--model", micro_model, "--output", tmp_path / "out")
    wanted = {f"{name}-{n}.json" for name in ("mugs", "cups") for n in ("001", "002")}
    assert {name for name in names(tmp_path / "out") if name.endswith(".json")} == wanted


def test_an_image_says_what_made_it(
    micro_model: Path, grid_file: Callable[..., Path], tmp_path: Path
) -> None:
    path = grid_file(content_prompt="une tasse rouge ☕", seed=[4, 7])
    run("--examples", path, "--model", micro_model, "--output", tmp_path / "out")
    assert names(tmp_path / "out") >= {"001-seed4.png", "001-seed7.png"}
    with Image.open(tmp_path / "out" / "001-seed7.png") as image:
        told = json.loads(image.text["vcdeft"])
    record = json.loads((tmp_path / "out" / "001.json").read_text())
    assert told == {k: v for k, v in record.items() if k != "images"} | {"of_seed": 7}
    assert told["content_prompt"] == "une tasse rouge ☕"
    assert told["versions"]["torch"]


def test_a_dry_run_makes_nothing_and_says_what_would_be(
    hollow_model: Path,
    micro_model: Path,
    grid_file: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for part in ("tokenizer", "tokenizer_2"):  # and not a weight
        shutil.copytree(micro_model / part, hollow_model / part, dirs_exist_ok=True)
    words = ("--examples", two_grids(grid_file), "--model", hollow_model, "--dry-run")
    run(
        *words,
        "--output",
        tmp_path / "out",
        "--images-per-grid",
        2,
        "--resolution",
        64,
        "--upsample",
        2,
    )
    said = capsys.readouterr().out
    assert "001-seed0.png, 001-seed1.png  to do" in said
    assert "rows of 128x64, 128x64  64 tokens" in said
    assert "2 of 2 grids to do" in said
    assert names(tmp_path / "out") == set()


def test_upsampled_images_have_the_size_asked_for(
    micro_model: Path, grid_file: Callable[..., Path], tmp_path: Path
) -> None:
    ways = [{"width": 80, "strength": 0.5, "prompt": "a cone"}, None]
    path = grid_file(task=None, rows=[["a.png", None, None]], upsampling=ways)
    words = ("--examples", path, "--model", micro_model, "--resolution", 32)
    run(*words, "--output", tmp_path / "out", "--upsample", 3)
    sizes = [Image.open(tmp_path / "out" / f"001-{k}.png").size for k in (2, 3)]
    assert sizes == [(80, 80), (32, 32)]


@pytest.mark.processes
def test_two_processes_share_a_list(
    micro_model: Path, grid_file: Callable[..., Path], tmp_path: Path
) -> None:
    grids = [{"rows": [["a.png", None]], "seed": seed} for seed in range(6)]
    words = ("--examples", grid_file(grids), "--model", micro_model, "--resolution", 32)
    run(*words, "--output", tmp_path / "one")
    run(*words, "--output", tmp_path / "two", "--processes", 2)
    for name in names(tmp_path / "one"):
        if name.endswith(".png"):
            made = (tmp_path / "two" / name).read_bytes()
            assert made == (tmp_path / "one" / name).read_bytes()
    assert names(tmp_path / "two") == names(tmp_path / "one")


@pytest.mark.processes
def test_a_killed_command_goes_on_where_it_was(
    micro_model: Path, grid_file: Callable[..., Path], tmp_path: Path
) -> None:
    output, whole = tmp_path / "out", tmp_path / "whole"
    grids = [{"rows": [["a.png", None]], "seed": seed} for seed in range(12)]
    words = [
        "infer",
        "--examples",
        grid_file(grids),
        "--model",
        micro_model,
        "--inference-steps",
        60,
    ]
    group = processes.Group([*words, "--output", output], processes=1)
    while len(list(output.glob("*.json"))) < 2:
        time.sleep(0.01)
    group.send(signal.SIGKILL)
    group.wait()
    before = {path.name: path.stat().st_mtime_ns for path in output.glob("*.json")}
    assert 2 <= len(before) < 12
    for place in (output, whole):
        main([str(word) for word in (*words, "--output", place)])
    assert names(output) == names(whole)
    assert not list(output.glob(".*.part"))
    for name in names(whole):
        if name.endswith(".png"):
            assert (output / name).read_bytes() == (whole / name).read_bytes()
    assert all((output / name).stat().st_mtime_ns == when for name, when in before.items())


@contextmanager
def held(output: Path, then: str) -> Iterator[None]:
    """Another process holds grid 001; `then` it does when grid 002 is made, and some time more."""
    output.mkdir()
    command = [sys.executable, "-c", HOLD, str(output), then]
    other = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == b"True\n"
        yield
    finally:
        other.kill()
        other.communicate()


HOLD = """
import os, signal, sys, time
from pathlib import Path
from visualcloze_deft.storage.locks import WorkLocks
output = Path(sys.argv[1])
claims = WorkLocks(output)
print(claims.take("001"), flush=True)
while not (output / "002.json").exists():
    time.sleep(0.05)
time.sleep(1)
exec(sys.argv[2])
time.sleep(600)
"""


def test_a_grid_that_a_killed_process_leaves_is_made_by_the_one_that_waits_for_it(
    micro_model: Path,
    grid_file: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "out"
    words = ("--examples", two_grids(grid_file), "--model", micro_model, "--output", output)
    with held(output, "os.kill(os.getpid(), signal.SIGKILL)"):
        run(*words)
    assert "waiting for what other processes make, 1 grids" in capsys.readouterr().out
    records = [(output / f"{name}.json").stat().st_mtime for name in ("002", "001")]
    assert records == sorted(records)


def test_a_grid_that_another_process_makes_is_left_to_it_also_by_one_that_is_ended(
    micro_model: Path, grid_file: Callable[..., Path], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    words = ("--examples", two_grids(grid_file), "--model", micro_model, "--output", output)
    with held(output, "os.kill(os.getppid(), signal.SIGINT)"), pytest.raises(SystemExit) as ended:
        run(*words)
    assert ended.value.code == 130
    assert (output / "002.json").is_file()
    assert not (output / "001.json").exists()


def test_several_adapters_and_scales(
    micro_model: Path,
    grid_file: Callable[..., Path],
    tmp_path: Path,
    refused: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
) -> None:

    for name in ("one", "two"):
        models = load_models(str(micro_model))
        injection.attach(models.transformer, Adapter(rank=2, method="para"), seed=len(name))
        (tmp_path / name).mkdir()
        files.save(models.transformer, tmp_path / name, base="micro")
    words = ("--examples", grid_file(), "--model", micro_model, "--resolution", 32)
    made = {}
    for given in (("one",), ("one=1.0", "two=0"), ("one=0.5",), ("one=0",), ()):
        output = tmp_path / "-".join(("out", *given))
        chosen = [word for text in given for word in ("--adapter", tmp_path / text)]
        run(*words, *chosen, "--output", output)
        made[given] = Image.open(output / "001.png").tobytes()
    assert made["one",] == made["one=1.0", "two=0"]
    assert made["one=0",] == made[()]
    assert len(set(made.values())) == 3
    path = tmp_path / "one" / "adapter_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"inference_mode": not settings["inference_mode"]}))
    capsys.readouterr()
    given = (*words, "--inference-steps", 1, "--adapter", tmp_path / "one")
    output = tmp_path / "out-one"
    other = (*words, "--inference-steps", 1, "--adapter", f"{tmp_path}/two=0.5")
    line = refused("infer", *other, "--output", output)
    assert f"made with adapters {tmp_path}/one=1.0, asked for is {tmp_path}/two=0.5; give" in line
    assert "made with adapters_config_sha256" in refused("infer", *given, "--output", output)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--upsample", 2, "--strength", 1.5), "strength 1.5: give a number from 0 to 1"),
        (("--strength", 0.5), "--strength goes with --upsample"),
        (("--upsample", 60), "megapixels"),
        (("--inference-steps", 0), "--inference-steps"),
        (("--resolution", 100), "--resolution 100: give a multiple of 16"),
        (("--cache", "first-blok"), "did you mean first-block?"),
        (("--cache", "taylorseer=x"), "'x' is no number"),
        (("--adapter", "gone=half"), "'half' is no number"),
        (("--adapter", "gone", "--adapter", "gone=2"), "named twice"),
        (("--adapter", "gone"), "adapter gone: no such file or folder"),
        (("--seed", -1), "a seed is a whole number from 0"),
        (("--upsample", 1e308), "up to 64"),
        (("--attention", "flashy"), "--attention flashy"),
        (("--cache", "taylorseer=0.5"), "whole and above 1"),
        (("--cache", "first-block", "--batch", 2), "give --batch 1"),
        (("--adapter", "gone=nan"), "give a number up to 1e6 as its scale"),
        (("--adapter", "gone=1e300"), "give a number up to 1e6 as its scale"),
    ],
)
def test_a_bad_option_is_named_before_anything_is_loaded(
    hollow_model: Path,
    micro_model: Path,
    grid_file: Callable[..., Path],
    refused: Callable[..., str],
    words: tuple[object, ...],
    said: str,
) -> None:
    for part in ("tokenizer", "tokenizer_2"):
        shutil.copytree(micro_model / part, hollow_model / part, dirs_exist_ok=True)
    assert said in refused("infer", "--examples", grid_file(), "--model", hollow_model, *words)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to offload from")
def test_offloading_without_a_gpu_is_refused(
    hollow_model: Path, grid_file: Callable[..., Path], refused: Callable[..., str]
) -> None:
    words = ("--examples", grid_file(), "--model", hollow_model, "--offload", "model")
    assert "no GPU here" in refused("infer", *words)


def test_an_adapter_of_another_base_of_the_same_shape_is_refused(
    micro_model: Path, tmp_path: Path
) -> None:
    models = load_models(str(micro_model))
    injection.attach(models.transformer, Adapter(rank=2), seed=0)
    mark = {"base_fingerprint": fingerprint("tiny"), "base_model": "tiny"}
    files.save(models.transformer, tmp_path, base="micro", metadata=mark)
    with pytest.raises(UserError, match="made for another base"):
        InContextPipeline.from_pretrained(str(micro_model), adapter=tmp_path)


def test_an_adapter_of_a_merged_base_asks_for_its_lora(
    micro_model: Path,
    grid_file: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:

    models = load_models(str(micro_model))
    injection.attach(models.transformer, Adapter(rank=2), seed=0)
    files.save(models.transformer, tmp_path, base="micro", metadata={"base_lora": "some/lora"})
    words = ("--examples", grid_file(), "--model", micro_model, "--output", tmp_path / "out")
    run(*words, "--resolution", 32, "--adapter", tmp_path)
    assert "LoRA some/lora merged" in capsys.readouterr().out


def test_the_lora_in_the_base_of_an_adapter_is_known_by_its_hash(
    micro_model: Path,
    grid_file: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    refused: Callable[..., str],
) -> None:
    """Under another name it is the same, another file under its name is not: when an adapter is
    used, exported, trained from or resumed."""
    lora = write_lora(micro_model, tmp_path / "lora.safetensors", seed=0)
    elsewhere = Path(shutil.copy(lora, tmp_path / "copy.safetensors"))
    said = [f"model={micro_model}", f"model_lora={lora}"]
    mark = run_folder.base_of(load_run(None, said))
    folder = tmp_path / "adapter"
    folder.mkdir()
    models = load_models(str(micro_model), lora=str(lora))
    injection.attach(models.transformer, Adapter(rank=2, method="lora"), seed=0)
    files.save(models.transformer, folder, base="micro", metadata=mark)
    given = ("--model", micro_model, "--adapter", folder)
    words = ("--examples", grid_file(), *given, "--resolution", 32)
    run(*words, "--model-lora", elsewhere, "--output", tmp_path / "out")
    assert "was trained on" not in capsys.readouterr().out
    run(*words, "--output", tmp_path / "without")
    assert f"the LoRA {lora} merged, here it is none" in capsys.readouterr().out
    InContextPipeline.from_pretrained(micro_model, adapter=folder)
    assert f"the LoRA {lora} merged, here it is none" in caplog.text
    check_start(folder, "lora", 2, str(elsewhere))
    write_lora(micro_model, lora, seed=1)
    capsys.readouterr()
    line = "made for a base with another LoRA merged than"
    assert line in refused("infer", *words, "--model-lora", lora, "--output", tmp_path / "other")
    export = ("export", folder, "--format", "comfyui", "--output", tmp_path / "exported")
    assert line in refused(*export, "--model", micro_model)
    with pytest.raises(UserError, match=line):
        InContextPipeline.from_pretrained(micro_model, adapter=folder, lora=str(lora))
    with pytest.raises(UserError, match="set model_lora"):
        check_start(folder, "lora", 2, str(lora))
    pipe = InContextPipeline.from_pretrained(micro_model, lora=str(lora))
    with pytest.raises(UserError, match=line):
        pipe.load_adapter(folder)


@pytest.mark.processes
def test_an_adapter_names_the_lora_that_was_merged_when_its_run_began(
    micro_model: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    lora = write_lora(micro_model, tmp_path / "lora.safetensors", seed=0)
    before, output = hashlib.sha256(lora.read_bytes()).hexdigest(), tmp_path / "run"
    words = ["train", "--model", micro_model, "--tasks", "depth-to-image", "--rank", 2]
    words += ["--set", f"model_lora={lora}", "--steps", 300, "--output", output]
    words += ["--set", "sample_grids=2"]
    group = processes.Group([*words, "--set", "save_every=1"], processes=1)
    while not list(output.glob("checkpoints/step-*")):
        time.sleep(0.01)
    write_lora(micro_model, lora, seed=1)
    assert group.wait() == 0, group.said[-2000:]
    assert read_metadata(output / "adapter")["base_lora_sha256"] == before
    more = ("--processes", 1, "--steps", 301)
    line = refused("train", "--resume", "--output", output, *more)
    assert "made for a base with another LoRA merged" in line


def refusal(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The last line of a command that ends in exit code 2 after it has loaded weights."""
    with pytest.raises(SystemExit) as ended:
        run(*words)
    assert ended.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def write_lora(model: Path, path: Path, seed: int) -> Path:
    name, random = "proj_out", torch.Generator().manual_seed(seed)
    outputs, inputs = shapes_of(str(model))[name]
    save_file(
        {
            f"transformer.{name}.lora_A.weight": torch.randn(2, inputs, generator=random),
            f"transformer.{name}.lora_B.weight": torch.randn(outputs, 2, generator=random),
        },
        path,
    )
    return path


def test_a_lora_trained_anew_under_its_name_does_not_count_as_the_one_before(
    micro_model: Path,
    grid_file: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output, path = tmp_path / "out", grid_file()
    lora = write_lora(micro_model, tmp_path / "style.safetensors", 1)
    words = ("--examples", path, "--model", micro_model, "--model-lora", lora, "--output", output)
    run(*words)
    record = json.loads((output / "001.json").read_text())
    assert record["model_lora_sha256"] == hashlib.sha256(lora.read_bytes()).hexdigest()
    made = (output / "001.png").stat().st_mtime_ns
    moved = lora.rename(tmp_path / "moved.safetensors")
    run(*words[:4], "--model-lora", moved, "--output", output)  # the same LoRA elsewhere
    assert (output / "001.png").stat().st_mtime_ns == made
    write_lora(micro_model, lora, 2)
    assert "made with model_lora_sha256" in refusal(capsys, *words)
    run(*words, "--overwrite")
    run(*words[:6], "--output", tmp_path / "fresh")
    fresh = Image.open(tmp_path / "fresh" / "001.png").tobytes()
    assert Image.open(output / "001.png").tobytes() == fresh


@pytest.mark.parametrize("kept", [True, False])
def test_a_picture_replaced_meanwhile_is_recorded_as_it_was_read(
    kept: bool,
    micro_model: Path,
    grid_file: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output, path = tmp_path / "out", grid_file()
    load = infer.load

    def load_slowly(*given: Any) -> pipeline.InContextPipeline:
        Image.new("RGB", (32, 32), "green").save(tmp_path / "a.png")
        return load(*given)

    def digest() -> str:
        return hashlib.sha256((tmp_path / "a.png").read_bytes()).hexdigest()

    if not kept:  # as of a list whose pictures are too many
        monkeypatch.setattr(infer, "MOST_PIXELS", 0)
    before = digest()
    monkeypatch.setattr(infer, "load", load_slowly)
    run("--examples", path, "--model", micro_model, "--output", output)
    now = digest()
    rows = json.loads((output / "001.json").read_text())["rows_sha256"]
    assert (rows[0][0], rows[1][0]) == ((before, before) if kept else (now, now))
    monkeypatch.undo()
    words = ("--examples", path, "--model", micro_model, "--output", output)
    if kept:  # the picture is another one by now
        assert "made with rows_sha256" in refusal(capsys, *words)
    else:
        made = (output / "001.png").stat().st_mtime_ns
        run(*words)
        assert (output / "001.png").stat().st_mtime_ns == made


def test_a_lora_replaced_while_it_is_loaded_is_noticed(
    micro_model: Path,
    grid_file: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lora = write_lora(micro_model, tmp_path / "style.safetensors", 1)
    load = infer.load

    def load_slowly(*given: Any) -> pipeline.InContextPipeline:
        write_lora(micro_model, lora, 2)
        return load(*given)

    monkeypatch.setattr(infer, "load", load_slowly)
    output = tmp_path / "out"
    words = ("--examples", grid_file(), "--model", micro_model, "--model-lora", lora)
    assert "a file was replaced" in refusal(capsys, *words, "--output", output)
    assert not names(output)


def test_a_result_that_is_not_finite_is_no_image(
    micro_model: Path,
    grid_file: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In the transformer's result, and where only the decoder leaves the range of numbers."""
    for part, layer in (("transformer", "proj_out.bias"), ("vae", "decoder.conv_out.bias")):
        model = tmp_path / part
        shutil.copytree(micro_model, model)
        (file,) = (model / part).glob("*.safetensors")
        tensors = load_file(file)
        tensors[layer] = torch.full_like(tensors[layer], torch.inf)
        save_file(tensors, file)
        words = ("--examples", grid_file(), "--model", model, "--output", tmp_path / "out")
        line = refusal(capsys, *words)
        assert "grid.json: seed 0: the result is not finite" in line
        assert not names(tmp_path / "out")
