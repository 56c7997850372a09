"""Model folders and hub ids: whole, or refused by name before anything is computed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from hub_cache import COMMIT, in_hub_cache
from hub_server import hub_server, use
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from visualcloze_deft.adapters.metadata import check_base
from visualcloze_deft.adapters.places import adapter_at
from visualcloze_deft.backbones.flux_fill.checks import check_weights
from visualcloze_deft.backbones.flux_fill.files import check_folder
from visualcloze_deft.backbones.flux_fill.loading import (
    load_models,
    load_tokenizers,
    load_transformer,
)
from visualcloze_deft.backbones.model_files import weight_files
from visualcloze_deft.backbones.peft_files import CONFIG, WEIGHTS
from visualcloze_deft.backbones.table import fingerprint
from visualcloze_deft.cli import main
from visualcloze_deft.errors import UserError


@pytest.fixture
def model(micro_model: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(micro_model, tmp_path / "model"))


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (["tokenizer/tokenizer.json"], r"tokenizer/ has no tokenizer.json or merges.txt and vocab"),
        (["tokenizer_2/tokenizer.json", "tokenizer_2/spiece.model"], "tokenizer_2/ has no"),
        (["tokenizer/tokenizer_config.json"], "tokenizer/ has no tokenizer_config.json"),
        (["scheduler/scheduler_config.json"], "no scheduler; expected"),
        (["text_encoder/config.json"], "text_encoder/ has no config.json"),
        (["vae/diffusion_pytorch_model.safetensors"], "vae/ has no .safetensors file"),
    ],
)
def test_a_missing_file_is_named(model: Path, files: list[str], words: str) -> None:
    check_folder(str(model))
    for file in files:
        (model / file).unlink(missing_ok=True)
    with pytest.raises(UserError, match=words):
        check_folder(str(model))


def test_a_missing_shard_is_named(model: Path) -> None:
    part = model / "transformer"
    (whole,) = weight_files(part)
    tensors = load_file(whole)
    whole.unlink()
    names = sorted(tensors)
    shards = {"one.safetensors": names[::2], "two.safetensors": names[1::2]}
    for shard, members in shards.items():
        save_file({name: tensors[name] for name in members}, part / shard)
    index = {"weight_map": {name: shard for shard, names in shards.items() for name in names}}
    (part / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    check_weights(str(model))
    (part / "two.safetensors").unlink()
    with pytest.raises(UserError, match=r"transformer/ has no two\.safetensors"):
        check_folder(str(model))


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "text_encoder_2"])
def test_a_missing_or_cut_tensor_is_named(model: Path, part: str) -> None:
    check_weights(str(model))
    (file,) = weight_files(model / part)
    tensors = load_file(file)
    name = next(name for name in sorted(tensors) if name.endswith(".weight"))
    for change in ("cut", "removed"):
        changed = dict(tensors)
        if change == "removed":
            del changed[name]
        else:
            changed[name] = tensors[name][:-1].clone()
        save_file(changed, file, {"format": "pt"})
        with pytest.raises(UserError, match=rf"{part}/ lack 1 tensors .*{name}"):
            load_models(str(model))


@pytest.mark.parametrize(
    ("part", "setting"),
    [
        ("transformer", "num_layers"),
        ("transformer", "num_single_layers"),
        ("text_encoder", "num_hidden_layers"),
        ("text_encoder_2", "num_layers"),
    ],
)
def test_another_number_of_blocks_is_refused(model: Path, part: str, setting: str) -> None:
    config = model / part / "config.json"
    fields = json.loads(config.read_text())
    for count, words in ((0, "has no place for"), (2, "lack")):
        config.write_text(json.dumps(fields | {setting: count}))
        with pytest.raises(UserError, match=rf"{part}/ .*{words}"):
            check_weights(str(model))


def test_tokenizers_that_are_not_their_encoders_are_refused(model: Path) -> None:
    load_tokenizers(str(model))
    file = model / "tokenizer" / "tokenizer.json"
    fields = json.loads(file.read_text())
    fields["model"]["vocab"] = dict(list(fields["model"]["vocab"].items())[:300])
    fields["model"]["merges"] = []
    file.write_text(json.dumps(fields))
    with pytest.raises(UserError, match=r"tokenizer/ has \d+ tokens, text_encoder/ knows"):
        load_tokenizers(str(model))


@pytest.mark.parametrize(("setting", "value"), [("pad_token", None), ("padding_side", "below")])
def test_a_tokenizer_that_can_read_no_text_is_refused(
    model: Path, setting: str, value: object
) -> None:
    file = model / "tokenizer" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {setting: value}))
    with pytest.raises(UserError, match=r"tokenizer/ cannot be loaded: .*; copy or download it"):
        load_tokenizers(str(model))


def test_damage_is_said_before_a_run_begins(
    model: Path, grid_file: Callable[..., Path], refused: Callable[..., str], tmp_path: Path
) -> None:
    (model / "tokenizer" / "tokenizer.json").unlink()
    out = tmp_path / "out"
    infer = ("infer", "--examples", grid_file(), "--model", model, "--output", out)
    train = ("train", "--model", model, "--tasks", "depth-to-image", "--output", out)
    for words in (infer, (*infer, "--dry-run"), train):
        assert "tokenizer/ has no tokenizer.json" in refused(*words)
    assert not out.exists()


def test_a_hub_id_that_is_not_there_is_refused(refused: Callable[..., str], tmp_path: Path) -> None:
    """Without the hub: what the cache has not, cannot be had."""
    words = ("train", "--tasks", "depth-to-image", "--output", tmp_path / "out")
    line = refused(*words, "--model", "nobody/no-model")
    assert "'nobody/no-model': not in the hub's cache on this machine" in line
    assert not (tmp_path / "out").exists()


def test_a_hub_id_is_what_its_snapshot_holds(
    micro_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loaded from the cache, by its newest revision or by name, with the fingerprint of its files:
    an adapter of another base is refused on it."""
    in_hub_cache(micro_model, "someone/a-model", tmp_path / "cache", monkeypatch)
    here = load_transformer(str(micro_model), dtype=torch.float32).state_dict()
    for name in ("someone/a-model", f"someone/a-model@{COMMIT}"):
        check_weights(name)
        found = load_transformer(name, dtype=torch.float32).state_dict()
        assert all(torch.equal(tensor, here[key]) for key, tensor in found.items())
        assert fingerprint(name) == fingerprint(str(micro_model)) != ""
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    about = {"base_fingerprint": fingerprint(str(micro_model)), "base_model": "someone/a-model"}
    save_file({"x": torch.ones(1)}, adapter / WEIGHTS, about)
    check_base(adapter, "someone/a-model", lora=None)
    save_file({"x": torch.ones(1)}, adapter / WEIGHTS, about | {"base_fingerprint": "0"})
    with pytest.raises(UserError, match="made for another base than 'someone/a-model'"):
        check_base(adapter, "someone/a-model", lora=None)


def test_an_incomplete_snapshot_is_refused(
    micro_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = in_hub_cache(micro_model, "someone/half-a-model", tmp_path / "cache", monkeypatch)
    shutil.rmtree(snapshot / "text_encoder_2")
    with pytest.raises(UserError, match="model 'someone/half-a-model': no text_encoder_2"):
        check_folder("someone/half-a-model")


def test_infer_runs_on_a_hub_id_and_records_its_weights(
    micro_model: Path,
    grid_file: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    in_hub_cache(micro_model, "someone/for-infer", tmp_path / "cache", monkeypatch)
    out = tmp_path / "out"
    words = ["infer", "--examples", grid_file(), "--model", "someone/for-infer", "--output", out]
    main([str(word) for word in (*words, "--inference-steps", 1)])
    record = json.loads((out / "001.json").read_text())
    assert record["model_fingerprint"] == fingerprint(str(micro_model))
    assert record["resolution"] == 32  # as its model_index.json says


def test_a_revision_is_part_of_the_name(
    micro_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    refused: Callable[..., str],
    grid_file: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    in_hub_cache(micro_model, "someone/revised", tmp_path / "cache", monkeypatch)
    out, grid = tmp_path / "out", grid_file()
    words = ["infer", "--examples", grid, "--model", "someone/revised", "--output", out]
    main([str(word) for word in (*words, "--inference-steps", 1, "--revision", COMMIT)])
    assert json.loads((out / "001.json").read_text())["model"] == f"someone/revised@{COMMIT}"
    capsys.readouterr()
    assert "'someone/revised@gone': not in the hub's cache" in refused(*words, "--revision", "gone")
    assert "goes with --model" in refused("train", "--revision", "main")


@pytest.mark.parametrize(
    "command",
    [
        ("train", "--tasks", "depth-to-image"),
        ("plan",),
        ("infer", "--examples", "grid.json"),
        ("eval", "none", "--suite", "scenes"),
        ("export", "adapter", "--format", "comfyui"),
        ("import", "lora.safetensors"),
        ("data", "cache", "--processes", 1),
        ("tasks", "show", "depth-to-image"),
    ],
)
def test_every_command_with_a_model_takes_a_revision(
    micro_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    refused: Callable[..., str],
    grid_file: Callable[..., Path],
    command: tuple[object, ...],
) -> None:
    in_hub_cache(micro_model, "someone/revisions", tmp_path / "cache", monkeypatch)
    grid_file()
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / CONFIG).write_text('{"peft_type": "LORA", "r": 2}')
    for path in ("adapter/adapter_model.safetensors", "lora.safetensors"):
        save_file({"x": torch.ones(1)}, tmp_path / path, {"base_fingerprint": "0"})
    monkeypatch.chdir(tmp_path)
    output = () if command[0] in ("plan", "tasks") else ("--output", "out")
    words = (*command, *output, "--model", "someone/revisions")
    line = refused(*words, "--revision", "gone")
    assert "'someone/revisions@gone'" in line
    assert "not in the hub's cache" in line
    assert not (tmp_path / "out").exists()
    wrong = refused(*command, *output, "--revision", "main")
    assert "--revision main: goes with --model and an id on the hub" in wrong


def test_a_hub_that_is_not_reached_is_asked_once_and_one_line_says_so(
    refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    line = refused("plan", "--model", "nobody/unreached")
    assert "the hub cannot be reached (Connection refused); name a folder here" in line
    assert "--model FOLDER; HF_HUB_OFFLINE=1" in line
    assert len(line) < 300


@pytest.mark.parametrize("place", ["runs/nope", "./nope", "a/b/c", "nope"])
def test_a_path_that_is_not_there_is_not_sought_on_the_hub(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with hub_server() as hub:
        use(hub, monkeypatch)
        with pytest.raises(UserError, match=rf"^adapter {Path(place)}: no such file or folder$"):
            adapter_at(place, dict)
        assert hub.asked == []


def test_what_holds_no_adapter_is_told_from_what_is_not_there(
    refused: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "run.toml").write_text("", encoding="utf-8")
    line = partial(refused, "infer", "--examples", "grid.json", "--adapter")
    assert "no adapter_config.json there; name the folder that holds it" in line(tmp_path)
    assert "run.toml: a file; name an adapter's folder" in line(tmp_path / "run.toml")
    assert "gone: no such file or folder" in line(tmp_path / "gone")
