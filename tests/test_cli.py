"""The command line: a mistake ends in exit code 2 and one line that names it, before the work."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from visualcloze_deft.adapters.files import CONFIG, WEIGHTS
from visualcloze_deft.cli import main
from visualcloze_deft.config.run_settings import Run, write_run
from visualcloze_deft.reporting.contact_sheet import metadata_text

GridFile = Callable[..., Path]
Refused = Callable[..., str]


# ---- commands and options


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "no such command 'trian'; did you mean train?"),
        (["xyz"], "no such command 'xyz'; known: "),
        (["tasks", "lst"], "no such command 'lst'; did you mean list?"),
        (["train", "--rnk", "4"], "--rnk"),
        (["train", "--rank", "many"], "'many' is not a valid integer"),
        (["train", "--rank"], "--rank"),
        (["train", "extra"], "extra"),
        (["infer"], "--examples"),
        (["infer", "--examples", "g.json", "--inference-steps", "0"], "--inference-steps"),
        (["infer", "--examples", "g.json", "--resolution", "8"], "--resolution"),
        (["tasks", "preview"], "NAME"),
        (["--verison"], "--verison"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistyped_command_or_option_is_named(
    refused: Refused, arguments: list[str], message: str
) -> None:
    assert message in refused(*arguments)


def test_help_is_no_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--help"])
    assert "train" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["tasks"]], ids=["vcdeft", "vcdeft tasks"])
def test_without_a_command_the_help_is_shown(
    capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert "".join(capsys.readouterr()).startswith("Usage: ")


# ---- train


@pytest.fixture
def train(refused: Refused, tmp_path: Path) -> Callable[..., str]:
    """Runs a `vcdeft train` that must be refused, and must not leave a run folder behind."""
    output = tmp_path / "run"

    def run(*arguments: object) -> str:
        line = refused("train", "--output", output, "--processes", 1, *arguments)
        assert not output.exists()
        return line

    return run


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "dept-to-image"], "unknown task 'dept-to-image'; did you mean depth-to-image"),
        (["--tasks", ","], "no task named"),
        (["--method", "dept"], "adapter.method = 'dept': input should be 'deft', 'deft-relaxed'"),
        (["--rank", "0"], "adapter.rank = 0"),
        (
            ["--set", "offload=parameters"],
            "offload 'parameters' with --zero 2: give --zero 3",
        ),
        (["--zero", "4"], "zero = 4: input should be 0, 1, 2, 3 or 'auto'"),
        (["--steps", "-5"], "steps = -5"),
        (["--batch", "0"], "batch = 0"),
        (["--lr", "0"], "optimiser.lr = 0"),
        (
            ["--steps", "20", "--set", "optimiser.warmup=21"],
            "optimiser.warmup = 21: longer than the 20 steps",
        ),
        (["--zero", "3", "--set", "compile=true"], "compile is not for ZeRO-3"),
        (["--allow-change", "lr"], "--allow-change goes with --resume"),
        (["--resume", "--dry-run"], "--dry-run starts a run of its own"),
        (["--lr", "nan"], "optimiser.lr = nan"),
        (["--seed", "-1"], "seed = -1"),
        (["--resolution", "100"], "data.resolution = 100"),
        (
            ["--set", "optimiser.lrr=1"],
            "unknown setting 'optimiser.lrr'; did you mean optimiser.lr",
        ),
        (
            ["--set", "learning_rate=1"],
            "--set: unknown setting 'learning_rate'; did you mean optimis",
        ),
        (["--set", "lerning_rate=1"], "did you mean optimiser.lr (--lr)?"),
        (["--set", "batch_size=1"], "did you mean batch?"),
        (["--set", "epochs=3"], "did you mean steps?"),
        (["--set", "rnak=3"], "did you mean adapter.rank (--rank)?"),
        (
            ["--set", "optimizer.lr=1"],
            "--set: unknown setting 'optimizer'; did you mean optimiser?",
        ),
        (["--set", "xyz=1"], "unknown setting 'xyz'; 'vcdeft train --help'"),
        (["--config", "tiny-photos", "--set", "batch=abc"], "vcdeft: --set: batch = 'abc': input"),
        (["--config", "tiny", "--batch", "0"], "vcdeft: --batch: batch = 0"),
        (["--batch", "4", "--set", "batch=0"], "vcdeft: --set: batch = 0"),
        (["--set", "save_every"], "--set 'save_every': expected NAME=VALUE"),
        (["--set", "save_every=often"], "save_every = 'often'"),
        (["--set", f"save_every={'9' * 5000}"], "save_every = '999"),
        (["--set", "data.validation_every=1"], "data.validation_every = 1"),
        (["--data", "scenes=3", "--set", "data.validation_every=4"], "scenes has 3 items"),
        (["--set", "adapter.target_modules=("], "no regular expression"),
        (["--config", "x" * 300], "no such file, and no shipped one"),
        (["--set", "data.weights.dept=1"], "data.weights names 'dept'"),
        (["--set", "data.task_folders=['gone']"], "task folder gone: no such folder"),
        (["--config", "tinny"], "run file 'tinny': no such file, and no shipped one; did you mean"),
        (["--model", "tinny"], "unknown model 'tinny'"),
        (["--model", "./gone"], "unknown model './gone'"),
        (["--data", "secnes"], "unknown data source 'secnes'; did you mean scenes"),
        (["--data", "scenes=0"], "scenes=0: the number of scenes must be"),
        (["--data", "graph200k"], "data source 'graph200k' needs a path: graph200k=PATH"),
        (["--tasks", "novel-view", "--data", "scenes=many"], "scenes=many"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_run_that_cannot_work_is_refused(
    train: Callable[..., str], arguments: list[str], message: str
) -> None:
    assert message in train(*arguments)


@pytest.mark.parametrize("name", ["folder", "graph200k", "dreambooth", "dreambench-plus", "insdet"])
def test_data_that_is_not_there_or_laid_out_otherwise_is_named(
    train: Callable[..., str], tmp_path: Path, name: str
) -> None:
    missing, other = tmp_path / "gone", tmp_path / "other"
    (other / "deep" / "er").mkdir(parents=True)
    assert f"{missing}: " in train("--data", f"{name}={missing}")
    line = train("--data", f"{name}={other}")
    assert str(other) in line
    assert "expected" in line or "no such file" in line


def test_a_path_of_any_letters_is_a_path(train: Callable[..., str]) -> None:
    for path in ("/gone/é", "/gone/😀", "/gone/a b", '/gone/"quoted"', "/gone/back\\slash"):
        assert f"vcdeft: {path}: no such" in train("--data", f"folder={path}")


@pytest.mark.parametrize("output", ["2024", "2024-01-31", "true", "1e3"])
def test_an_output_folder_may_be_called_anything(refused: Refused, output: str) -> None:
    assert "graph200k" in refused("train", "--output", output, "--data", "graph200k")


def test_data_without_the_roles_of_a_task_is_named(
    train: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "data" / "target").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "data" / "target" / "a.png")
    data = f"folder={tmp_path / 'data'}"
    line = train("--data", data, "--tasks", "depth-to-image")
    assert "task depth-to-image: no data source has all its roles (folder lacks depth)" in line


def test_data_without_any_task_is_named(train: Callable[..., str], tmp_path: Path) -> None:
    for role in ("one", "two"):
        (tmp_path / "data" / role).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "data" / role / "a.png")
    line = train("--data", f"folder={tmp_path / 'data'}")
    assert "no task can be made from" in line
    assert "folder has the roles one, two" in line


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps =", "not valid TOML"),
        ("stepps = 5", "unknown setting 'stepps'; did you mean steps"),
        ("steps = 'x'", "steps = 'x'"),
        ("[adapter]\nranks = 4", "unknown setting 'adapter.ranks'; did you mean adapter.rank"),
    ],
)
def test_a_bad_run_file_is_named(
    train: Callable[..., str], tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "run.toml"
    path.write_text(text)
    line = train("--config", path)
    assert f"vcdeft: {path}: " in line
    assert message in line


def test_a_broken_task_file_is_named(train: Callable[..., str], tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("summary =")
    assert f"{path}: not valid TOML" in train("--set", f"data.task_folders=['{tmp_path}']")


def test_a_model_folder_without_its_parts_is_named(
    train: Callable[..., str], hollow_model: Path
) -> None:
    shutil.rmtree(hollow_model / "vae")
    assert f"model folder {hollow_model}: no vae" in train("--model", hollow_model)


def test_a_model_folder_with_a_broken_index_is_named(
    train: Callable[..., str], hollow_model: Path
) -> None:
    for content in ("{", "[]", '{"resolution": "large"}'):
        (hollow_model / "model_index.json").write_text(content)
        assert f"{hollow_model / 'model_index.json'}: " in train("--model", hollow_model)


def test_an_output_that_is_a_file_is_named(refused: Refused, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("")
    for output in (path, path / "run"):
        assert f"output {output}: not writable" in refused("train", "--output", output)


def test_an_output_that_holds_another_run_is_left_alone(refused: Refused, tmp_path: Path) -> None:
    settings = tmp_path / "settings.toml"
    write_run(Run(steps=3), settings)
    before = settings.read_bytes()
    for saved in ("adapter", "checkpoints/step-000002"):
        (tmp_path / saved).mkdir(parents=True)
        line = refused("train", "--output", tmp_path)
        assert f"output {tmp_path} holds another run; go on with --resume" in line
        assert settings.read_bytes() == before
        shutil.rmtree(tmp_path / saved)


def test_resuming_without_a_checkpoint_is_refused(
    train: Callable[..., str], refused: Refused, tmp_path: Path
) -> None:
    assert "--resume: no checkpoint in" in train("--resume")
    write_run(Run(), tmp_path / "settings.toml")
    (tmp_path / "checkpoints" / "step-000200").mkdir(parents=True)
    line = refused("train", "--resume", "--output", tmp_path)
    assert f"no good checkpoint in {tmp_path / 'checkpoints'} (1 damaged)" in line


# ---- infer


@pytest.fixture
def infer(refused: Refused, grid_file: GridFile, hollow_model: Path) -> Callable[..., str]:
    """Runs a `vcdeft infer` of a good grid with a model that cannot be loaded."""

    def run(*arguments: object) -> str:
        output = hollow_model.parent / "out"
        common = ("--examples", grid_file(), "--model", hollow_model, "--output", output)
        return refused("infer", *common, *arguments)

    return run


def adapter(folder: Path, config: Any = None, **changes: object) -> Path:
    """An adapter folder in peft's format; `config` or `changes` make it a bad one."""
    folder.mkdir()
    good = {"peft_type": "DEFT", "r": 2, "target_modules": ["to_q"], **changes}
    text = json.dumps(good) if config is None else config
    (folder / CONFIG).write_text(text)
    save_file({"base_model.model.to_q.deft_P": torch.zeros(4, 2)}, folder / WEIGHTS)
    return folder


def test_a_model_that_cannot_be_loaded_is_named(infer: Callable[..., str]) -> None:
    assert "hollow" in infer()


def test_a_good_adapter_is_not_what_is_complained_about(
    infer: Callable[..., str], tmp_path: Path
) -> None:
    assert "hollow" in infer("--adapter", adapter(tmp_path / "good"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", CONFIG),
        ("{}", "peft_type None"),
        ('{"peft_type": "IA3"}', "peft_type 'IA3'; DEFT (with PaRa) and LORA are known"),
        ('{"peft_type": "DEFT", "decomposition_method": "svd"}', "decomposition_method"),
    ],
)
def test_an_adapter_of_another_kind_is_named_before_the_model_is_loaded(
    infer: Callable[..., str], tmp_path: Path, config: str, message: str
) -> None:
    folder = adapter(tmp_path / "odd", config)
    line = infer("--adapter", folder)
    assert str(folder) in line
    assert message in line


def test_a_missing_adapter_is_named_before_the_model_is_loaded(
    infer: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for name, fault in {"gone": "no such file", "empty": f"no {CONFIG}", "file": "a file"}.items():
        assert f"adapter {tmp_path / name}: {fault}" in infer("--adapter", tmp_path / name)


@pytest.mark.parametrize("damage", ["gone", "empty", "cut"])
def test_damaged_adapter_weights_are_named_before_the_model_is_loaded(
    infer: Callable[..., str], tmp_path: Path, damage: str
) -> None:
    folder = adapter(tmp_path / "damaged")
    weights = folder / WEIGHTS
    content = weights.read_bytes()
    weights.unlink()
    if damage != "gone":
        weights.write_bytes(content[:-8] if damage == "cut" else b"")
    line = infer("--adapter", folder)
    assert str(folder) in line
    assert WEIGHTS in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task-folder", "gone"], "task folder gone: no such folder"),
        (["--model", "tinny"], "unknown model 'tinny'"),
        (["--seed", str(2**70)], "seed"),
        (["--seed", "many"], "--seed"),
        (["--guidance", "nan"], "--guidance nan"),
        (["--resolution", "100"], "--resolution 100: give a multiple of 16"),
        (["--model-lora", "/gone/lora.safetensors"], "LoRA '/gone/lora.safetensors'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_bad_option_of_infer_is_named(
    infer: Callable[..., str], arguments: list[str], message: str
) -> None:
    assert message in infer(*arguments)


def test_a_picture_of_a_grid_that_is_a_pipe_is_not_waited_for(
    refused: Refused, grid_file: GridFile, hollow_model: Path, tmp_path: Path
) -> None:
    grids = grid_file()
    (grids.parent / "a.png").unlink()
    os.mkfifo(grids.parent / "a.png")
    words = ("infer", "--examples", grids, "--model", hollow_model, "--dry-run")
    assert "a.png: a pipe or a device" in refused(*words, "--output", tmp_path / "out")


def test_an_output_that_is_a_link_to_itself_is_named(
    infer: Callable[..., str], refused: Refused, tmp_path: Path
) -> None:
    (tmp_path / "loop").symlink_to("loop")
    assert f"{tmp_path / 'loop'}" in infer("--output", tmp_path / "loop")
    assert f"{tmp_path / 'loop'}" in refused("train", "--dry-run", "--output", tmp_path / "loop")


def test_weights_that_are_a_pipe_are_not_waited_for(
    infer: Callable[..., str], refused: Refused, tmp_path: Path
) -> None:
    folder = adapter(tmp_path / "piped")
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)
    assert WEIGHTS in infer("--adapter", folder)
    output = tmp_path / "lora.safetensors"
    assert WEIGHTS in refused("export", folder, "--format", "kohya", "--output", output)
    assert WEIGHTS in refused("infer", "--examples", "g", "--model-lora", folder / WEIGHTS)


def test_an_unwritable_output_is_named_before_the_model_is_loaded(
    infer: Callable[..., str], tmp_path: Path
) -> None:
    path = tmp_path / "file"
    path.write_text("")
    for output in (path, path / "deep"):
        assert f"output {output}: not writable" in infer("--output", output)


# ---- tasks


@pytest.mark.parametrize("command", ["preview", "example"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dept-to-image"], "unknown task 'dept-to-image'; did you mean depth-to-image"),
        (["novel-view", "--task-folder", "gone"], "task folder gone: no such folder"),
        (["novel-view", "--data", "graph200k=gone"], "gone: no such folder"),
        (["novel-view", "--data", "secnes"], "unknown data source 'secnes'"),
        (["novel-view", "--seed", "-1"], "seed"),
        (["novel-view", "--resolution", "100"], "resolution = 100"),
        (["novel-view", "--resolution", "8"], "--resolution"),
        (["novel-view", "--count", "0"], "--count"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_bad_preview_or_example_is_refused(
    refused: Refused, tmp_path: Path, command: str, arguments: list[str], message: str
) -> None:
    output = tmp_path / "sheet.png"
    assert message in refused("tasks", command, *arguments, "--output", output)
    assert not output.exists()


@pytest.mark.parametrize("name", ["gone/sheet.png", "sheet", "sheet.xyz", ".", "file/sheet.png"])
def test_a_preview_that_cannot_be_written_is_named(
    refused: Refused, tmp_path: Path, name: str
) -> None:
    (tmp_path / "file").write_text("")
    output = tmp_path / name
    line = refused("tasks", "preview", "novel-view", "--count", 1, "--output", output)
    assert str(output) in line


@pytest.mark.parametrize(
    "command", [["tasks", "preview", "novel-view", "--count", "1"], ["data", "preview", "scenes=2"]]
)
def test_a_preview_takes_the_place_of_previews_alone(
    refused: Refused, tmp_path: Path, command: list[str]
) -> None:
    """A photo stays, a broken link, a folder, and an image that `vcdeft infer` has made."""
    output, words = tmp_path / "x.png", [*command, "--output", str(tmp_path / "x.png")]
    main(words)
    main([*words, "--seed", "3"])
    drawn = output.read_bytes()
    photo, made = tmp_path / "photo.png", tmp_path / "made.png"
    Image.new("RGB", (8, 8)).save(photo)
    Image.new("RGB", (8, 8)).save(made, pnginfo=metadata_text({"rows_sha256": []}))
    (tmp_path / "link.png").symlink_to("gone.png")

    def state(path: Path) -> tuple[int, ...]:  # but for when it was last read
        found = path.lstat()
        return found.st_ino, found.st_mode, found.st_size, found.st_mtime_ns

    for path in (photo, made, tmp_path / "link.png"):
        before = state(path)
        line = refused(*command, "--output", path)
        assert "already there, and no preview of vcdeft; give --overwrite" in line
        assert state(path) == before
    main([*command, "--seed", "3", "--output", str(photo), "--overwrite"])
    assert photo.read_bytes() == drawn
    assert not list(tmp_path.glob(".*"))


def test_an_example_that_cannot_be_written_is_named(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file", tmp_path / "file" / "deep"):
        assert str(output) in refused("tasks", "example", "novel-view", "--output", output)


def test_grids_that_were_written_are_left_alone(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "grid.json").write_text("mine")
    assert "holds grids already" in refused("tasks", "example", "novel-view", "--output", tmp_path)
    assert (tmp_path / "grid.json").read_text() == "mine"


def test_a_listing_with_a_missing_folder_is_refused(refused: Refused) -> None:
    assert "task folder gone: no such folder" in refused("tasks", "list", "--task-folder", "gone")


def test_a_written_example_is_a_good_grid_file(
    refused: Refused, tmp_path: Path, hollow_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["tasks", "example", "object-insertion", "--output", str(tmp_path / "grids")])
    examples = tmp_path / "grids" / "grid.json"
    assert capsys.readouterr().out == f"{examples}\n"
    output = tmp_path / "out"
    line = refused("infer", "--examples", examples, "--model", hollow_model, "--output", output)
    assert "hollow" in line
