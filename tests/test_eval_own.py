"""A user's own pairs as a suite, and images paired with the truths of written grids."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from visualcloze_deft.adapters import files, injection
from visualcloze_deft.backbones.flux_fill.loading import load_models
from visualcloze_deft.cli import main
from visualcloze_deft.config.run_settings import Adapter, parse_run, write_run
from visualcloze_deft.evaluation.own_data import held_out_by, remarks_on
from visualcloze_deft.evaluation.suite_queries import GridSettings
from visualcloze_deft.evaluation.suites import rows_of
from visualcloze_deft.inference.pipeline import InContextPipeline
from visualcloze_deft.task_registry.new_task import write_new_task

pytestmark = pytest.mark.usefixtures("one_thread")
ITEMS, EVERY = 8, 4


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs lit -> unlit; the brightness of a picture tells its item."""
    folder = tmp_path_factory.mktemp("pairs")
    for role, least in (("lit", 100), ("unlit", 0)):
        (folder / role).mkdir()
        for k in range(ITEMS):
            Image.new("RGB", (48, 48), (least + k,) * 3).save(folder / role / f"{k}.png")
    return folder


@pytest.fixture(scope="module")
def trained(micro_model: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of a task of the user's own that held out every fourth pair."""
    run = tmp_path_factory.mktemp("own") / "relight"
    adapter = run / "adapter"
    adapter.mkdir(parents=True)
    models = load_models(str(micro_model))
    injection.attach(models.transformer, Adapter(rank=2, method="para"), seed=3)
    files.save(models.transformer, adapter, base="micro")
    write_new_task("relight", ["lit", "unlit"], adapter / "tasks")
    data = {"sources": [f"folder={pairs}"], "tasks": "relight", "validation_every": EVERY}
    write_run(parse_run({"data": data, "output": str(run)}, where="test"), run / "settings.toml")
    return run


def evaluate(model: Path, *words: object) -> None:
    more = ("--model", model, "--inference-steps", 1, "--encoder", "none")
    main([str(word) for word in ("eval", *words, *more)])


def item_of(path: Path) -> int:
    return int(Image.open(path).convert("RGB").getpixel((0, 0))[0]) % 100  # type: ignore[index]


def test_the_pairs_that_training_left_out_are_asked_below_the_others(
    micro_model: Path, trained: Path, pairs: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    evaluate(micro_model, trained, "--suite", f"folder={pairs}", "--output", output)
    grids = json.loads((output / "grids" / "grid.json").read_text())
    asked = [item_of(output / "grids" / grid["rows"][-1][0]) for grid in grids]
    above = [item_of(output / "grids" / grid["rows"][0][0]) for grid in grids]
    assert asked == [3, 7]
    assert not {3, 7}.intersection(above)
    assert [grid["task"] for grid in grids] == ["relight", "relight"]
    lines = (output / "results.jsonl").read_text().splitlines()
    assert [json.loads(line)["unit"] for line in lines] == ["3", "7"]
    assert "those that training left out" in (output / "table.md").read_text()


def test_the_task_and_the_suite_may_be_named_instead(
    micro_model: Path, trained: Path, pairs: Path, tmp_path: Path
) -> None:
    words = ("--data", f"folder={pairs}", "--tasks", "relight", "--limit", 1)
    evaluate(micro_model, trained, *words, "--against-base", "--output", tmp_path / "a")
    assert (tmp_path / "a" / "retention.csv").is_file()
    folder = trained / "adapter" / "tasks"
    own = shutil.copytree(folder, tmp_path / "own")
    evaluate(micro_model, "none", *words, "--task-folder", own, "--output", tmp_path / "b")
    assert "trained" not in (tmp_path / "b" / "table.md").read_text()


def test_pairs_that_were_trained_on_are_told_so(
    micro_model: Path,
    trained: Path,
    pairs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = shutil.copytree(trained, tmp_path / "run")
    text = (run / "settings.toml").read_text()
    (run / "settings.toml").write_text(text.replace("validation_every = 4", "validation_every = 0"))
    words = ("--suite", f"folder={pairs}", "--limit", 1, "--output", tmp_path / "out")
    evaluate(micro_model, run, *words)
    line = "1 of 1 items were trained on, so that their figures show what the adapter remembers"
    assert line in (tmp_path / "out" / "table.md").read_text()
    said = capsys.readouterr().out
    assert said.index(line) < said.index("| PSNR")
    evaluate(micro_model, run, *words[:2], "--output", tmp_path / "dry", "--dry-run")
    assert f"{ITEMS} of {ITEMS} items were trained on" in capsys.readouterr().out


@pytest.mark.parametrize(("every", "trained_on"), [(2, 2), (3, 2), (8, 0)])
def test_items_of_another_hold_out_are_counted_before_anything_is_generated(
    micro_model: Path,
    trained: Path,
    pairs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    every: int,
    trained_on: int,
) -> None:
    output = tmp_path / "out"
    words = ("--suite", f"folder={pairs}", "--validation-every", every, "--output", output)
    evaluate(micro_model, trained, *words, "--dry-run")
    said = capsys.readouterr().out
    assert not output.exists()
    if trained_on:
        assert f"{trained_on} of {ITEMS // every} items were trained on" in said
        assert f"training held out one in {EVERY}" in said
    else:
        assert "those that training left out" in said


@pytest.mark.parametrize("every", [0, 2])
def test_no_query_is_among_the_rows_above_it(pairs: Path, trained: Path, every: int) -> None:
    making = GridSettings(
        data={"folder": str(pairs)},
        resolution=32,
        rows=ITEMS,
        validation_every=every,
        task_folders=(str(trained / "adapter" / "tasks"),),
    )
    [row] = rows_of("folder", making)
    for k in range(row.count):
        keys = row.make(k).example.keys
        assert len({*keys}) == len(keys) > 1


def test_items_that_one_of_several_runs_was_trained_on_are_not_held_out(
    trained: Path, pairs: Path, tmp_path: Path
) -> None:
    def trained_with(every: int) -> Path:
        run = shutil.copytree(trained, tmp_path / f"every-{every}")
        text = (run / "settings.toml").read_text()
        changed = text.replace(f"validation_every = {EVERY}", f"validation_every = {every}")
        (run / "settings.toml").write_text(changed)
        return run / "adapter"

    spec, four, six, none = f"folder={pairs}", *map(trained_with, (4, 6, 0))
    assert held_out_by([four], spec) == 4
    both = held_out_by([four, six], spec)
    assert both
    kept = [k for k in range(100) if k % both == both - 1]
    assert kept == [k for k in range(100) if k % 4 == 3 and k % 6 == 5]
    assert held_out_by([four, none], spec) == 0

    def remark(every: int) -> str:
        tasks = (str(trained / "adapter" / "tasks"),)
        making = GridSettings(
            data={"folder": str(pairs)}, validation_every=every, task_folders=tasks
        )
        [line] = remarks_on(4, spec, every, rows_of("folder", making))
        return line

    assert "2 of 2 items were trained on" in remark(3)
    assert "those that training left out" in remark(8)


def test_a_pipeline_knows_the_tasks_of_a_run_that_it_loads(
    micro_model: Path, trained: Path, pairs: Path
) -> None:
    pipe = InContextPipeline.from_pretrained(str(micro_model), adapter=trained)
    assert pipe.tasks["relight"].roles == ("lit", "unlit")
    later = InContextPipeline.from_pretrained(str(micro_model))
    assert later.load_adapter(trained) == "relight"
    later.set_progress_bar_config(disable=True)
    cells = [Image.open(pairs / role / "0.png") for role in ("lit", "unlit")]
    [image] = later(rows=[cells, [cells[0], None]], task="relight", num_inference_steps=1)
    assert image.size == (32, 32)


def test_pairs_without_a_task_are_refused(
    micro_model: Path, pairs: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    words = ("eval", "none", "--model", micro_model, "--output", tmp_path / "out")
    line = refused(*words, "--suite", f"folder={pairs}")
    assert "vcdeft tasks new NAME --columns lit,unlit" in line
    assert "needs --data folder=PATH" in refused(*words, "--suite", "folder")
    line = refused(*words, "--suite", f"photos={pairs}")
    assert "vcdeft tasks example subject-driven --data photos=PATH" in line
    photos = tmp_path / "photos"
    shutil.copytree(pairs / "lit", photos)
    line = refused(*words, "--suite", f"folder={photos}", "--tasks", "image-editing/*")
    assert "folder, which has the roles target" in line
    assert "image-editing lacks before" in line
    assert "'vcdeft data check' lists" in line
    assert not (tmp_path / "out").exists()


# ---- images of one command against the truths of another


def test_images_of_infer_are_paired_with_the_truths_of_tasks_example(
    micro_model: Path,
    tmp_path: Path,
    refused: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    grids, made = tmp_path / "grids", tmp_path / "made"
    words = ["--count", "2", "--resolution", "64", "--output", str(grids)]
    main(["tasks", "example", "depth-to-image", *words])
    entries = json.loads((grids / "grid.json").read_text())
    entries[0]["seed"] = [3, 4]
    (grids / "grid.json").write_text(json.dumps(entries))
    words = ["--model", str(micro_model), "--inference-steps", "1", "--resolution", "32"]
    main(["infer", "--examples", str(grids), *words, "--output", str(made)])
    words = ["--images", str(made), "--against", str(grids), "--encoder", "none"]
    main(["eval", *words, "--output", str(tmp_path / "out")])
    lines = [json.loads(x) for x in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [line["unit"] for line in lines] == ["grid-001-seed3", "grid-001-seed4", "grid-002"]
    said = (tmp_path / "out" / "table.md").read_text()
    assert "3 truths were resized" in said
    (grids / "002-22-truth.png").unlink()
    capsys.readouterr()
    assert "grid-002.png: no partner" in refused("eval", *words, "--output", tmp_path / "again")
