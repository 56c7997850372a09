"""What the system refuses and parsers find wrong is one line with exit code 2, for every command; a
mistake of ours stays a traceback."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from PIL import Image
from safetensors import SafetensorError

from visualcloze_deft.adapters import files, injection
from visualcloze_deft.backbones import lora_files
from visualcloze_deft.backbones.flux_fill.layers import FLUX_LAYERS
from visualcloze_deft.backbones.flux_fill.loading import load_models
from visualcloze_deft.backbones.flux_fill.sizes import flux
from visualcloze_deft.backbones.peft_files import CONFIG, WEIGHTS
from visualcloze_deft.cli import main
from visualcloze_deft.cli.app import cli
from visualcloze_deft.comparison.records import Measured, read_measured, write_measured
from visualcloze_deft.config import patterns
from visualcloze_deft.config.patterns import matching
from visualcloze_deft.config.run_settings import Adapter, Run, load_run, write_run
from visualcloze_deft.data.index import Indexed, Row, index
from visualcloze_deft.errors import MOST, UserError, reading
from visualcloze_deft.inference.grid_reading import read_requests
from visualcloze_deft.inference.upsampling import Upsampling
from visualcloze_deft.planning import sizes
from visualcloze_deft.reporting import plots
from visualcloze_deft.reporting.bar_charts import draw_bars
from visualcloze_deft.reporting.contact_sheet import image_metadata
from visualcloze_deft.reporting.plots import svg_of
from visualcloze_deft.reporting.statistics import Figure
from visualcloze_deft.storage.jsonl import EvaluationLine, StepLine, read_lines
from visualcloze_deft.storage.text_files import DEEPEST, parse_json
from visualcloze_deft.task_registry.files import load_tasks
from visualcloze_deft.training import deepspeed_settings, report, resume, run_folder
from visualcloze_deft.training.checkpoint import PROGRESS, Progress, newest, save

Refused = Callable[..., str]
NoRoom = Callable[[], AbstractContextManager[None]]

DIGITS = "9" * 5000
DEEP = "[" * 200 + "]" * 200


def message(call: Callable[[], object]) -> str:
    """The message of the `UserError` that `call` raises: one short line."""
    with pytest.raises(UserError) as raised:
        call()
    said = str(raised.value)
    assert len(said) <= MOST
    assert said.isprintable()
    return said


# ---- one place for what nothing else has named


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "a.png"), "a.png: No space left"),
        (OSError(errno.EMFILE, "Too many open files", b"caf\xe9"), "caf\\udce9: Too many open"),
        (OSError(errno.EXDEV, "Invalid cross-device link", "a", None, "b"), "a -> b: Invalid"),
        (OSError(errno.EIO, "Input/output error"), "Input/output error"),
        (OSError("broken data stream\nwhen reading"), "broken data stream"),
        (MemoryError(), "out of memory"),
        (UnicodeEncodeError("utf-8", "\udce9", 0, 1, "surrogates not allowed"), "can't encode"),
        (json.JSONDecodeError("Expecting value", "x", 0), "Expecting value"),
        (SafetensorError("header too large"), "header too large"),
        (UserError("a\nb " + "x" * 1000), "a b x"),
        (click.UsageError("x" * 1000 + "\x1b[31m"), "xxx"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_a_command_meets_is_one_line(
    refused: Refused, monkeypatch: pytest.MonkeyPatch, error: Exception, words: str
) -> None:
    def meet() -> None:
        raise error

    monkeypatch.setitem(cli.commands, "meet", click.command("meet")(meet))
    line = refused("meet")
    assert words in line
    assert len(line) <= 400
    assert line.isprintable()


@pytest.mark.parametrize(
    "error", [ZeroDivisionError(), RecursionError(), KeyError("a"), TypeError()]
)
def test_a_mistake_of_ours_stays_a_traceback(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def meet() -> None:
        raise error

    monkeypatch.setitem(cli.commands, "meet", click.command("meet")(meet))
    with pytest.raises(type(error)):
        main(["meet"])


def test_a_reader_names_its_file_and_leaves_mistakes_of_users_as_they_are() -> None:
    for error, words in (
        (RecursionError(), "a.json: broken (nested too deeply)"),
        (MemoryError(), "a.json: broken (larger than the memory here)"),
        (KeyError("rows"), "a.json: broken ('rows' is missing)"),
        (OverflowError("too large"), "a.json: broken (too large)"),
        (UserError("as it is"), "as it is"),
    ):
        with pytest.raises(UserError) as raised, reading("a.json", "broken"):
            raise error
        assert str(raised.value) == words
    with pytest.raises(AssertionError), reading("a.json"):  # an invariant of ours
        raise AssertionError


def test_a_name_too_long_for_the_system_is_named(refused: Refused) -> None:
    assert "File name too long" in refused("report", "x" * 5000)


@pytest.mark.parametrize("words", [["tasks", "list"], ["--help"], ["tasks", "list", "--json"]])
def test_a_full_device_for_standard_output_is_one_line(words: list[str]) -> None:
    with open("/dev/full", "w") as full:
        ended = subprocess.run(
            [sys.executable, "-m", "visualcloze_deft", *words],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert ended.returncode == 2
    assert ended.stderr == "vcdeft: standard output: No space left on device\n"


def test_a_closed_pipe_ends_a_command_without_a_word() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    ended = subprocess.run(
        [sys.executable, "-m", "visualcloze_deft", "tasks", "list"],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (1, "")


# ---- full disks


def test_pictures_and_grids_appear_whole_or_not_at_all(
    refused: Refused, no_room: NoRoom, tmp_path: Path
) -> None:
    for words in (
        ("tasks", "preview", "depth-to-image", "--count", "1", "--output", tmp_path / "a.png"),
        ("data", "preview", "scenes", "--count", "1", "--output", tmp_path / "b.png"),
        ("tasks", "example", "depth-to-image", "--output", tmp_path / "grids"),
    ):
        with no_room():
            line = refused(*words)
        assert "cannot be written (File too large)" in line
        assert str(tmp_path) in line
    assert [path for path in tmp_path.rglob("*") if not path.is_dir()] == []
    main(["tasks", "example", "depth-to-image", "--output", str(tmp_path / "grids")])


def test_an_evaluation_that_finds_no_room_leaves_nothing_half_made(
    refused: Refused, no_room: NoRoom, tmp_path: Path
) -> None:
    words = "eval none --suite scenes --tasks depth-to-image --limit 1 --encoder none"
    words += " --inference-steps 1"
    with no_room():
        line = refused(*words.split(), "--output", tmp_path / "out")
    assert "cannot be written (File too large)" in line
    left = [path.name for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert left == [".lock"]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("adapters") / "deft", Adapter(rank=2))


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("adapters") / "lora", Adapter(method="lora", rank=2))


def saved(folder: Path, settings: Adapter) -> Path:
    transformer = load_models("tiny").transformer
    injection.attach(transformer, settings, seed=0)
    for parameter in injection.trainable(transformer).values():
        torch.nn.init.normal_(parameter)
    folder.mkdir()
    files.save(transformer, folder, base="tiny")
    return folder


@pytest.mark.parametrize("kind", ["peft", "diffusers", "merged"])
def test_an_export_that_finds_no_room_leaves_nothing(
    refused: Refused, no_room: NoRoom, adapter: Path, tmp_path: Path, kind: str
) -> None:
    with no_room():
        line = refused(
            "export",
            adapter,
            "--format",
            kind,
            "--output",
            tmp_path / "x.safetensors",
            "--no-verify",
        )
    assert "cannot be written" in line
    assert list(tmp_path.iterdir()) == []


def test_numbers_too_large_for_the_precision_of_an_export_are_refused(
    refused: Refused, adapter: Path, tmp_path: Path
) -> None:
    words = ["export", adapter, "--format", "diffusers", "--output", tmp_path / "x.safetensors"]
    assert "too large for torch.float16" in refused(
        *words, "--scale", "1e6", "--dtype", "float16", "--no-verify"
    )


# ---- settings


@pytest.mark.parametrize(
    "override",
    [
        "steps=true",
        "zero=true",
        "gradient_checkpointing=true",
        "optimiser.lr=true",
        "optimiser.betas=[true, 0.9]",
        "data.weights={novel-view = true}",
        "data.recipe.examples=[1, true]",
        "data.validation_every=true",
        "model=true",
        f"steps={DIGITS}",
        "steps=0x" + "f" * 5000,
        "steps=1" + "0" * 100,
        "adapter.alpha=1" + "0" * 30,
        "adapter.rank=1" + "0" * 30,
        "save_every=9999999999",
        "timeout=1e300",
        "optimiser.lr=1e300",
        "data.weights={novel-view = 1e300}",
        "steps=5\nseed=3",
        "output=a\nb",
        'output="a\\u0000b"',
        f"data.weights={DEEP}",
        "adapter.target_modules=(",
        "adapter.target_modules=" + "(" * 5000,
        "adapter.target_modules=a{99999999999}",
        "deepspeed.zero_optimization=5",
        f"{DIGITS}=1",
    ],
    ids=lambda text: text[:40],
)
def test_a_setting_that_nobody_means_is_refused(override: str) -> None:
    message(lambda: load_run(None, [override]))


def test_a_setting_may_still_be_switched_written_in_lines_or_large() -> None:
    run = load_run(
        None, ["compile=true", "data.sources=[\n'scenes'\n]", "steps=1e6", "timeout=1e9"]
    )
    assert (run.compile, run.data.sources, run.steps) == (True, ("scenes",), 10**6)


@pytest.mark.parametrize(
    "words",
    [
        ["train", "--zero", DIGITS],
        ["train", "--gradient-checkpointing", DIGITS],
        ["train", "--steps", DIGITS],
        ["train", "--lr", "1e400"],
        ["plan", "--memory", f"{DIGITS}GB"],
        ["plan", "--grid", f"3x{DIGITS}"],
        ["infer", "--examples", "g.json", "--images-per-grid", "1000000000000"],
        ["infer", "--examples", "g.json", "--inference-steps", "1000000000000"],
        ["infer", "--examples", "g.json", "--cache", "taylorseer=inf"],
        ["tasks", "example", "depth-to-image", "--count", "1000000000000"],
        ["tasks", "preview", "depth-to-image", "--seed", "-1"],
        ["data", "preview", "scenes", "--seed", "-1"],
        ["data", "check", f"scenes={DIGITS}"],
        ["data", "check", "scenes=99999999999999999999"],
        ["data", "check", f"subject={DIGITS}"],
        ["eval", "none", "--suite", "scenes", "--limit", "1000000000000", "--output", "o"],
    ],
    ids=lambda words: " ".join(words)[:40],
)
def test_a_number_that_nobody_means_is_refused(refused: Refused, words: list[str]) -> None:
    line = refused(*words)
    assert len(line) <= 400


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (
            "zero_optimization.stage3_max_live_parameter=1",
            "did you mean stage3_max_live_parameters",
        ),
        ("zero_optimization.offload_optimizer.pin_memry=true", "did you mean pin_memory"),
        ("zero_optimization.reduce_bucket_size='x'", "reduce_bucket_size = 'x': input should be"),
        ("zero_optimization.reduce_bucket_size=true", "true and false are no numbers"),
        ("zero_optimization.reduce_bucket_size=1e30", "no number of 64 bits"),
        (
            "zero_optimization.offload_optimizer=5",
            "deepspeed.zero_optimization.offload_optimizer = 5",
        ),
        ("prescale_gradient=true", "did you mean prescale_gradients"),
        ("prescale_gradients='x'", "give a value like its default, False"),
        ("steps_per_print=true", "deepspeed.steps_per_print"),
        ("flops_profiler=5", "DeepSpeed does not take these settings"),
        ("flops_profiler.enabld=true", "unknown setting 'deepspeed.flops_profiler.enabld'"),
        ("comms_logger.verbos=true", "did you mean verbose"),
        ("communication_data_type='fp3'", "DeepSpeed does not take these settings"),
        ("sparse_attention={}", "has been removed"),
        ("foo=1", "unknown setting 'deepspeed.foo'"),
    ],
)
def test_what_deepspeed_does_not_know_is_refused(override: str, words: str) -> None:
    run = load_run(None, [f"deepspeed.{override}"])
    assert words in message(lambda: deepspeed_settings.check(run))


def test_what_deepspeed_knows_is_taken(refused: Refused) -> None:
    known = [
        "zero_optimization.stage3_max_live_parameters=100000000",
        "zero_optimization.offload_optimizer.pin_memory=true",
        "zero_optimization.overlap_comm=true",
        "flops_profiler.enabled=true",
        "activation_checkpointing.partition_activations=true",
        "comms_logger.enabled=true",
        "tensorboard.enabled=true",
        "csv_monitor.enabled=true",
        "aio.block_size=1048576",
        "communication_data_type='fp32'",
        "wall_clock_breakdown=true",
        "steps_per_print=5",
    ]
    deepspeed_settings.check(load_run(None, [f"deepspeed.{one}" for one in known]))
    assert "unknown setting" in refused("plan", "--set", "deepspeed.foo=1", "--grid", "2x2")


# ---- regular expressions


def test_a_pattern_that_never_ends_is_given_up(
    monkeypatch: pytest.MonkeyPatch, adapter: Path, lora: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr(patterns, "PATIENCE", 0.7)
    began = time.monotonic()
    endless = "(" * 3 + "[a-z_.0-9]+" + ")+" * 3 + "!"
    model = flux({})
    names = list(model.linear)
    assert "takes more than 1 s" in message(lambda: matching("it", endless, names))
    settings = Adapter(target_modules=endless)
    assert "adapter.target_modules" in message(
        lambda: sizes.adapted_layers(model, settings, FLUX_LAYERS)
    )
    transformer = load_models("tiny").transformer
    assert "adapter.target_modules" in message(
        lambda: injection.attach(transformer, settings, seed=0)
    )
    for folder, name, value in (
        (adapter, "target_modules", endless),
        (adapter, "exclude_modules", endless),
        (lora, "alpha_pattern", {endless: 4}),
    ):
        odd = changed(folder, tmp_path / name, {name: value})
        assert CONFIG in message(lambda odd=odd: files.load(transformer, odd))
    shapes = {name: (outputs, inputs) for name, (inputs, outputs) in model.linear.items()}
    odd = changed(lora, tmp_path / "read", {"rank_pattern": {endless: 4}})
    assert "its settings" in message(lambda: lora_files.read(odd / WEIGHTS, shapes=shapes))
    assert time.monotonic() - began < 60


def test_a_pattern_matches_as_ever() -> None:
    names = ["transformer_blocks.0.attn.to_q", "proj_out", "norm"]
    assert matching("it", r".*\.to_[qk]|proj_out", names) == names[:2]
    assert matching("it", "proj_out", names) == ["proj_out"]  # matched in this process


def changed(folder: Path, place: Path, fields: dict[str, Any]) -> Path:
    """A copy of an adapter whose settings say `fields`, too."""
    shutil.copytree(folder, place)
    before = json.loads((place / CONFIG).read_text())
    (place / CONFIG).write_text(json.dumps(before | fields))
    return place


# ---- settings files of models and adapters


@pytest.fixture(scope="module")
def transformer() -> Any:
    return load_models("tiny").transformer


@pytest.mark.parametrize(
    "fields",
    [
        {"r": "x"},
        {"r": True},
        {"r": None},
        {"r": [2]},
        {"r": 2.5},
        {"r": 10**30},
        {"r": 100_000},
        {"alpha": "2"},
        {"alpha": 10**400},
        {"alpha": True},
        {"deft_dropout": "x"},
        {"target_modules": 5},
        {"target_modules": [5]},
        {"target_modules": {"a": 1}},
        {"target_modules": "("},
        {"layers_to_transform": "x"},
        {"decomposition_method": []},
        {"para": "yes"},
        {"peft_type": ["DEFT"]},
        {"bias": "x"},
        {"task_type": {"a": 1}, "init_weights": 3},
        {"modules_to_save": [[]]},
    ],
    ids=str,
)
def test_an_adapters_settings_of_another_kind_are_refused(
    transformer: Any, adapter: Path, tmp_path: Path, fields: dict[str, Any]
) -> None:
    odd = changed(adapter, tmp_path / "odd", fields)
    assert str(tmp_path) in message(lambda: files.load(transformer, odd))
    files.load(transformer, adapter)  # the transformer is as it was
    injection.detach(transformer)


@pytest.mark.parametrize(
    "text", ["", "[]", "null", DEEP, "[" * 100_000, f'{{"r": {DIGITS}}}', "\0"]
)
def test_an_adapters_settings_that_are_no_object_are_refused(
    transformer: Any, adapter: Path, tmp_path: Path, text: str
) -> None:
    odd = changed(adapter, tmp_path / "odd", {})
    (odd / CONFIG).write_text(text)
    assert CONFIG in message(lambda: files.load(transformer, odd))


@pytest.mark.parametrize(
    ("file", "fields"),
    [
        ("transformer/config.json", {"num_layers": "x"}),
        ("transformer/config.json", {"num_layers": True}),
        ("transformer/config.json", {"num_layers": 10**9}),
        ("transformer/config.json", {"num_attention_heads": [4]}),
        ("transformer/config.json", {"num_attention_heads": 10**400}),
        ("transformer/config.json", {"axes_dims_rope": None}),
        ("transformer/config.json", {"axes_dims_rope": [8, 28]}),
        ("transformer/config.json", {"guidance_embeds": "no"}),
        ("text_encoder/config.json", {"hidden_size": "x"}),
        ("text_encoder/config.json", {"hidden_size": None}),
        ("text_encoder/config.json", {"layer_norm_eps": {"a": 1}}),
        ("text_encoder/config.json", {"hidden_act": []}),
        ("text_encoder_2/config.json", {"d_model": 64.0}),
        ("text_encoder_2/config.json", {"model_type": "llama"}),
        ("text_encoder_2/config.json", {"feed_forward_proj": 5}),
        ("text_encoder_2/config.json", {"vocab_size": "360"}),
        ("vae/config.json", {"block_out_channels": 16}),
        ("vae/config.json", {"block_out_channels": [16, "x"]}),
        ("vae/config.json", {"scaling_factor": "x"}),
        ("vae/config.json", {"scaling_factor": 0}),
        ("vae/config.json", {"shift_factor": None}),
        ("vae/config.json", {"down_block_types": [5]}),
        ("scheduler/scheduler_config.json", {"base_shift": "x"}),
        ("scheduler/scheduler_config.json", {"max_image_seq_len": 256}),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": True}),
        ("tokenizer/tokenizer_config.json", {"model_max_length": "x"}),
        ("tokenizer/tokenizer_config.json", {"model_max_length": 100_000}),
        ("tokenizer_2/tokenizer_config.json", {"model_max_length": True}),
        ("tokenizer/tokenizer.json", {"model": 5}),
        ("tokenizer_2/tokenizer.json", {"decoder": []}),
        ("model_index.json", {"resolution": "large"}),
        ("model_index.json", {"resolution": True}),
    ],
    ids=str,
)
def test_a_models_settings_of_another_kind_are_refused(
    micro_model: Path, tmp_path: Path, file: str, fields: dict[str, Any]
) -> None:
    model = copied(micro_model, tmp_path / "model")
    before = json.loads((model / file).read_text()) if (model / file).is_file() else {}
    (model / file).write_text(json.dumps(before | fields))
    message(lambda: load_models(str(model)))


def copied(model: Path, place: Path) -> Path:
    """A model folder whose settings are its own, and whose weights are links."""
    shutil.copytree(model, place, ignore=shutil.ignore_patterns("*.safetensors"))
    for weights in model.rglob("*.safetensors"):
        (place / weights.relative_to(model)).symlink_to(weights)
    return place


@pytest.mark.parametrize("text", ["", "[]", "5", DEEP, "[" * 100_000, "{", "\udcff"])
def test_settings_of_a_model_that_are_no_object_are_refused(
    micro_model: Path, tmp_path: Path, text: str
) -> None:
    for file in ("transformer/config.json", "scheduler/scheduler_config.json", "model_index.json"):
        model = copied(micro_model, tmp_path / file.replace("/", "-"))
        (model / file).write_text(text, errors="surrogateescape")
        assert file in message(lambda model=model: load_models(str(model)))


# ---- what is nested, and what PNG files say


@pytest.mark.parametrize("depth", [DEEPEST + 1, 200, 900, 5000, 100_000])
def test_what_is_nested_deeply_is_refused_however_deep(tmp_path: Path, depth: int) -> None:
    text = "[" * depth + "]" * depth
    assert "nested too deeply" in message(lambda: parse_json("a.json", text))
    assert parse_json("a.json", "[" * DEEPEST + "]" * DEEPEST)
    (tmp_path / "grid.json").write_text(f'{{"rows": {text}}}')
    (tmp_path / "run.toml").write_text(f"a = {text}")
    message(lambda: read_requests(tmp_path / "grid.json", load_tasks()))
    message(lambda: load_run(str(tmp_path / "run.toml")))


def test_a_hexadecimal_number_of_thousands_of_digits_is_refused_in_a_task_file(
    refused: Refused, tmp_path: Path
) -> None:
    (tmp_path / "a.toml").write_text(f"summary = 0x{'f' * 5000}")
    assert "not valid TOML" in refused("tasks", "check", tmp_path / "a.toml")


def test_an_upsampled_side_that_no_picture_has_is_refused() -> None:
    for side in (10**400, 10**9, -1):
        message(lambda side=side: Upsampling(width=side))


@pytest.mark.parametrize("text", ["[" * 100_000, DEEP, "5", "{", f'{{"a": {DIGITS}}}'])
def test_a_picture_that_says_anything_else_is_no_result_of_ours(tmp_path: Path, text: str) -> None:
    from PIL import PngImagePlugin

    told = PngImagePlugin.PngInfo()
    told.add_itxt("vcdeft", text)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=told)
    assert image_metadata(tmp_path / "a.png") == {}


# ---- lines and records that are read again

STEP: dict[str, Any] = {
    "step": 1, "examples": 4, "seconds": 1.0, "loss": 0.5, "tasks": {"depth": 0.5},
}  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    write_run(Run(output=str(folder)), folder / run_folder.SETTINGS)
    return folder


@pytest.mark.parametrize(
    "odd",
    [
        json.dumps(STEP | {"step": "x"}),
        json.dumps(STEP | {"step": True}),
        json.dumps(STEP | {"loss": float("nan")}),
        json.dumps(STEP | {"loss": [1]}),
        json.dumps(STEP | {"tasks": ["depth"]}),
        json.dumps(STEP | {"tasks": {"depth": "x"}}),
        json.dumps(STEP | {"norms": 5}),
        json.dumps(STEP | {"memory": "much"}),
        json.dumps({"step": 1}),
        '{"step": 1, "lo',
        "[]",
        "null",
        "",
        DEEP,
        "[" * 100_000,
        f'{{"step": {DIGITS}}}',
        "\0\0\0",
    ],
    ids=lambda text: text[:40],
)
def test_an_odd_line_is_named_and_a_cut_last_one_left_out(
    refused: Refused, run: Path, odd: str
) -> None:
    good = json.dumps(STEP)
    (run / run_folder.METRICS).write_text(f"{good}\n{odd}\n{good}\n")
    assert f"{run_folder.METRICS}, line 2: " in refused("report", run)
    assert "line 2: " in refused("plan", "--run", run, "--grid", "2x2")
    (run / run_folder.METRICS).write_text(f"{good}\n{good[:20]}")
    assert read_lines(run / run_folder.METRICS, StepLine) == [STEP]
    main(["report", str(run)])
    resume.keep_lines_until(run, 1)  # as a resumed run does
    assert (run / run_folder.METRICS).read_text() == f"{good}\n"


def test_odd_lines_of_evaluations_and_odd_versions_are_named(refused: Refused, run: Path) -> None:
    (run / run_folder.METRICS).write_text(json.dumps(STEP) + "\n")
    line = {"step": 1, "loss": None, "tasks": {}, "times": {"0.5": None}}
    (run / run_folder.EVALUATION).write_text(json.dumps(line) + "\n")
    assert read_lines(run / run_folder.EVALUATION, EvaluationLine) == [line]
    report.write_report(run)
    (run / run_folder.EVALUATION).write_text(json.dumps(line | {"times": [0.5]}) + "\n")
    assert "evaluation.jsonl, line 1: times = [0.5]" in refused("report", run)
    (run / run_folder.EVALUATION).unlink()
    (run / run_folder.VERSIONS).write_text('{"attention": 5}')
    assert "versions.json" in refused("report", run)
    (run / run_folder.VERSIONS).unlink()
    (run / "sheets").mkdir()
    (run / "sheets" / "step-000001.png").write_text("no picture")
    assert "step-000001.png" in refused("report", run)


@pytest.mark.parametrize(
    "fields",
    [{"errors": ["x"]}, {"errors": 5}, {"psnr": [1.0]}, {"seconds": True}, {"asked": []}],
    ids=str,
)
def test_figures_of_another_kind_are_not_taken(tmp_path: Path, fields: dict[str, Any]) -> None:
    path, wanted = tmp_path / "a.json", {"grids": 2}
    assert read_measured(path, wanted) is None
    measured = Measured(errors=(0.5, float("nan")), psnr=(20.0, float("inf")), seconds=1.0)
    write_measured(path, measured, wanted)
    assert str(read_measured(path, wanted)) == str(measured)
    assert read_measured(path, {"grids": 3}) is None
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    assert "remove it" in message(lambda: read_measured(path, wanted))


@pytest.mark.parametrize("fields", [{"step": "x"}, {"explained": 5}, {"norms": "odd"}, {"more": 1}])
def test_a_checkpoint_whose_progress_is_of_another_kind_is_damaged(
    tmp_path: Path, fields: dict[str, Any]
) -> None:
    progress = Progress(step=1, examples=1, seed=0, global_batch=1)
    at = save(tmp_path, progress, {"a": torch.zeros(1)}, lambda folder: None, keep=2)
    assert newest(tmp_path)[0].progress == progress
    told = json.loads((at / PROGRESS).read_text())
    del told["checksum"]  # as older checkpoints, which have none
    (at / PROGRESS).write_text(json.dumps(told | fields))
    assert "no good checkpoint" in message(lambda: newest(tmp_path))
    (at / PROGRESS).write_text("[" * 100_000)
    assert "no good checkpoint" in message(lambda: newest(tmp_path))


def test_a_damaged_index_names_its_item(tmp_path: Path) -> None:
    table = index(
        lambda: [Row(key="a", paths={"target": "a.png"})], key=lambda: "k", cache=tmp_path
    )
    (file,) = tmp_path.glob("*.arrow")
    whole = file.read_bytes()
    file.write_bytes(whole.replace(b"{}", b"{["))
    assert "its index is damaged" in message(lambda: Indexed("folder", tmp_path, table).item(0))


# ---- names in pictures


@pytest.mark.parametrize(
    "name", ["$x_", "a$b$c", r"\frac{", "_hidden", "^", "$\\undefined$", "caf\udce9"]
)
def test_a_name_in_a_picture_is_no_formula(name: str) -> None:
    bar = Figure(mean=1.0, low=0.5, high=1.5, count=3)
    svg_of(draw_bars(f"{name}, more is better", {name: bar}, {}))
    lines = [STEP | {"step": k, "tasks": {name: 0.35, "a": 0.4, "b": 0.3}} for k in (1, 2, 3)]
    drawn = plots.picture("by task", "", lambda axes: report.draw_tasks(axes, lines))
    plain = [STEP | {"step": k, "tasks": {"a": 0.4, "b": 0.3}} for k in (1, 2, 3)]
    few = plots.picture("by task", "", lambda axes: report.draw_tasks(axes, plain))
    assert drawn.count("legend_1") == few.count("legend_1") == 1
    assert drawn.count('id="text_') == few.count('id="text_') + 1  # the name stands in the legend


def test_what_a_library_logs_is_short_and_plain(caplog: pytest.LogCaptureFixture) -> None:
    main(["--help"])
    try:
        logging.getLogger("a_library").warning("ignored: %s", "\x1b[31m\n" + "x" * 10_000)
    finally:
        logging.setLogRecordFactory(logging.LogRecord)
    (line,) = caplog.messages
    assert line.startswith("ignored: ")
    assert len(line) < MOST
    assert line.isprintable()
