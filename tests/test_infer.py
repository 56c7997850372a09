"""`vcdeft infer`: what it writes is enough to make the same images again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from visualcloze_deft.cli import main


def run(*words: object) -> None:
    main([str(word) for word in ("infer", *words, "--steps", 1)])


def test_the_record_of_an_image_makes_it_again(
    micro_model: Path, grid_file: Callable[..., Path], tmp_path: Path
) -> None:
    output, again = tmp_path / "out", tmp_path / "again"
    path = grid_file(content_prompt="a red ball", seed=7)
    run("--examples", path, "--model", micro_model, "--output", output, "--resolution", 32)
    assert {p.name for p in output.iterdir()} == {"001.png", "001-sheet.png", "001.json"}
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


def test_a_second_call_keeps_what_the_first_one_wrote(
    micro_model: Path, grid_file: Callable[..., Path], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    row = ["a.png", "b.png"]
    path = grid_file([{"rows": [row, ["a.png", None]]}, {"rows": [row, [None, None]]}])
    words = ("--examples", path, "--model", micro_model, "--output", output, "--resolution", 32)
    run(*words)
    first = {p.name: p.read_bytes() for p in output.iterdir()}
    assert set(first) >= {"001.png", "002-1.png", "002-2.png"}
    run(*words, "--seed", 5)
    assert {p.name for p in output.iterdir()} - set(first) >= {"003.png", "004-1.png", "004-2.png"}
    assert all((output / name).read_bytes() == content for name, content in first.items())
    assert Image.open(output / "003.png").size == (32, 32)


def test_pictures_that_lie_in_the_output_folder_stay(
    micro_model: Path, grid_file: Callable[..., Path], tmp_path: Path
) -> None:
    path = grid_file(rows=[["001.png", None]])
    (tmp_path / "a.png").rename(tmp_path / "001.png")
    before = (tmp_path / "001.png").read_bytes()
    words = ("--examples", path, "--model", micro_model, "--resolution", 32)
    run(*words, "--output", tmp_path)
    assert (tmp_path / "001.png").read_bytes() == before
    assert (tmp_path / "002.png").is_file()


def test_an_adapter_of_another_base_of_the_same_shape_is_refused(
    micro_model: Path, tmp_path: Path
) -> None:
    from visualcloze_deft import InContextPipeline, adapters
    from visualcloze_deft.errors import UserError
    from visualcloze_deft.modelfolder import fingerprint
    from visualcloze_deft.models import load_models
    from visualcloze_deft.settings import Adapter

    models = load_models(str(micro_model))
    adapters.attach(models.transformer, Adapter(rank=2), seed=0)
    mark = {"base_fingerprint": fingerprint("tiny"), "base_model": "tiny"}
    adapters.save(models.transformer, tmp_path, base="micro", metadata=mark)
    with pytest.raises(UserError, match="made for another base"):
        InContextPipeline.from_pretrained(str(micro_model), adapter=tmp_path)


def test_an_adapter_of_a_merged_base_asks_for_its_lora(
    micro_model: Path,
    grid_file: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from visualcloze_deft import adapters
    from visualcloze_deft.models import load_models
    from visualcloze_deft.settings import Adapter

    models = load_models(str(micro_model))
    adapters.attach(models.transformer, Adapter(rank=2), seed=0)
    adapters.save(models.transformer, tmp_path, base="micro", metadata={"base_lora": "some/lora"})
    words = ("--examples", grid_file(), "--model", micro_model, "--output", tmp_path / "out")
    run(*words, "--resolution", 32, "--adapter", tmp_path)
    assert "LoRA some/lora merged" in capsys.readouterr().out
