"""`vcdeft compare`: matched methods, the same examples, what is resumed, and figures that hold."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import tomli_w
from PIL import Image
from processes import run, vcdeft
from safetensors.torch import load_file
from scipy import stats

from visualcloze_deft.adapters import files, injection
from visualcloze_deft.backbones.flux_fill.loading import load_models
from visualcloze_deft.cli import main
from visualcloze_deft.comparison import compare
from visualcloze_deft.comparison.changes import MARKED, Compared, line_of
from visualcloze_deft.comparison.measure import place_of, psnr, query_sets, questions
from visualcloze_deft.comparison.plots import fields as fields_of
from visualcloze_deft.comparison.records import Measured
from visualcloze_deft.comparison.report import (
    CSV,
    REPORT,
    RESULTS,
    SAMPLES,
    TABLE,
    read_results,
    write_reports,
)
from visualcloze_deft.comparison.trainings import Training, trainings
from visualcloze_deft.config.comparison import Comparison, load_comparison, write_comparison
from visualcloze_deft.config.run_settings import load_run, write_run
from visualcloze_deft.evaluation.metrics import fidelity
from visualcloze_deft.paths import CONFIGS
from visualcloze_deft.reporting.random_effects import estimate, holm
from visualcloze_deft.storage import jsonl
from visualcloze_deft.training import run_data, run_folder

Refused = Callable[..., str]
METHODS = ("deft", "deft-relaxed", "para", "lora")


def fields(model: Path, output: Path) -> dict[str, Any]:
    """A small comparison that works."""
    return {
        "output": str(output),
        "rank": 4,
        "seeds": [0, 1],
        "run": {
            "model": str(model),
            "steps": 3,
            "batch": 2,
            "processes": 1,
            "save_every": 1,
            "data": {"tasks": "image-to-normals,colourisation"},
            "logging": {"trackers": []},
        },
        "new": {"tasks": "image-to-normals,colourisation"},
        "old": {"tasks": "depth-to-image"},
        "evaluate": {"grids": 3, "steps": 2},
    }


@pytest.fixture
def comparison_file(micro_model: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes `fields` as a comparison file, with `a.b=value` on top."""

    def write(**more: object) -> Path:
        path = tmp_path / "comparison.toml"
        path.write_text(tomli_w.dumps(fields(micro_model, tmp_path / "out") | more))
        return path

    return write


def planned(path: Path, *more: str) -> list[Training]:
    return trainings(load_comparison(str(path), more))


# ---- what is compared


def test_parameters_are_counted_as_the_attached_adapters_have_them(
    comparison_file: Callable[..., Path], micro_model: Path
) -> None:
    for training in planned(comparison_file(seeds=[0])):
        transformer = load_models(str(micro_model)).transformer
        injection.attach(transformer, training.run.adapter, seed=0)
        trained = sum(p.numel() for p in injection.trainable(transformer).values())
        assert training.parameters == trained


@pytest.mark.parametrize("rank", [1, 3, 4, 7])
@pytest.mark.parametrize("first", METHODS)
def test_no_other_rank_is_nearer_in_parameters(
    comparison_file: Callable[..., Path], first: str, rank: int
) -> None:
    methods = [first, *(method for method in METHODS if method != first)]
    found = planned(comparison_file(methods=methods, rank=rank, seeds=[0], match=["parameters"]))
    budget = found[0].parameters
    assert (found[0].method, found[0].rank) == (first, rank)
    for training in found:
        each = training.parameters // training.rank
        off = abs(training.parameters - budget)
        others = [r for r in (training.rank - 1, training.rank + 1) if r]
        assert all(off <= abs(r * each - budget) for r in others)
    by_method = {training.method: training.rank for training in found}
    assert by_method["deft"] == by_method["deft-relaxed"] == by_method["lora"]


def test_matched_by_rank_all_have_it_and_a_training_that_both_share_is_done_once(
    comparison_file: Callable[..., Path],
) -> None:
    found = planned(comparison_file(seeds=[5]))
    assert {t.rank for t in found if "rank" in t.matches} == {4}
    for match in ("rank", "parameters"):
        assert sorted(t.method for t in found if match in t.matches) == sorted(METHODS)
    assert len(found) == len({t.name for t in found}) == 5  # PaRa alone needs another rank


def test_every_method_sees_the_same_examples_in_the_same_order(
    comparison_file: Callable[..., Path],
) -> None:
    seen: dict[int, set[str]] = {}
    for training in planned(comparison_file()):
        mixture = run_data.mixture_of(training.run)
        drawn = [mixture[k] for k in range(6)]
        told = [(one.task, one.keys, one.hidden, one.task_sentence, one.content) for one in drawn]
        shown = [cell.tobytes() for cell in drawn[0].complete[-1]]
        run_of = training.run.model_dump(exclude={"adapter", "optimiser", "output"})
        seen.setdefault(training.seed, set()).add(repr((told, shown, run_of)))
    assert [len(orders) for orders in seen.values()] == [1, 1]
    assert seen[0] != seen[1]


def test_what_is_asked_is_never_trained_on_and_no_query_twice(
    comparison_file: Callable[..., Path],
) -> None:
    comparison = load_comparison(str(comparison_file()))
    found = trainings(comparison)
    seeds = {source.seed for one in found for source in run_data.mixture_of(one.run).sources}
    assert seeds == {0, 1}
    for one in query_sets(comparison, found[0].run):
        assert seeds.isdisjoint({source.seed for source in one.mixture.sources})
        grids = questions(one.mixture, one.task, 5)
        again = questions(one.mixture, one.task, 3)
        assert [grid.keys for grid in again] == [
            grid.keys for grid in questions(one.mixture, one.task, 3)
        ]
        queries = [grid.keys[-1] for grid in grids]
        assert len(set(queries)) == 5
        assert all(len(set(grid.keys)) == 2 for grid in grids)


@pytest.mark.parametrize(
    ("new", "old", "said"),
    [
        ("colourisation", "image-to-normals", "old.tasks names image-to-normals, which is trained"),
        ("canny-to-image", "depth-to-image", "new.tasks names canny-to-image, which is not"),
    ],
)
def test_new_tasks_are_trained_and_old_ones_are_not(
    comparison_file: Callable[..., Path], refused: Refused, new: str, old: str, said: str
) -> None:
    path = comparison_file(new={"tasks": new}, old={"tasks": old})
    assert said in refused("compare", path, "--dry-run")


def test_where_items_share_pictures_none_is_asked_twice_or_shown_above_its_question() -> None:
    run = load_run(None, ['data.sources=["subject=1"]', "data.tasks=subject-driven"])
    mixture = run_data.mixture_of(run)
    grids = questions(mixture, mixture.tasks["subject-driven"], 12)
    targets = [grid.complete[-1][-1].tobytes() for grid in grids]
    assert len(grids) == len(set(targets)) == 4  # pictures, of which 12 pairs are made
    for grid, target in zip(grids, targets, strict=True):
        assert target not in {picture.tobytes() for picture in grid.complete[0]}


def test_a_new_subject_is_asked_in_other_pictures_than_it_is_learned_from() -> None:
    comparison = load_comparison("compare-subject")
    run_of = trainings(comparison)[0].run
    mixture = run_data.mixture_of(run_of)
    assert sum(len(source) for source in mixture.sources) == 12  # ordered pairs of four pictures
    (new,) = (one for one in query_sets(comparison, run_of) if one.group == "new")
    shown = [mixture[k].rows for k in range(12)]
    learned = {cell.tobytes() for rows in shown for row in rows for cell in row if cell}
    assert len(learned) == 4
    targets = [example.rows[-1][-1] for example in questions(new.mixture, new.task, 12)]
    assert len({cell.tobytes() for cell in targets if cell}) == 12
    assert learned.isdisjoint({cell.tobytes() for cell in targets if cell})


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("compare-*.toml")), ids=lambda path: path.stem)
def test_a_shipped_comparison_is_found_by_name_and_asks_for_all_methods(path: Path) -> None:
    comparison = load_comparison(path.stem)
    assert comparison == load_comparison(str(path))
    assert comparison.methods == METHODS
    assert comparison.match == ("rank", "parameters")


# ---- what is refused


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ('methods=["deft","dora"]', "methods.1 = 'dora'"),
        ('methods=["deft","deft"]', "one stands there twice"),
        ("methods=[]", "methods = []"),
        ('match=["size"]', "match.0 = 'size'"),
        ("seeds=[]", "seeds = []"),
        ("seeds=[1,1]", "one stands there twice"),
        ("seeds=[1000003]", "the seed of the scenes that are asked"),
        ("rank=0", "rank = 0"),
        ("ranks=4", "unknown setting 'ranks'; did you mean rank"),
        ("new.task=x", "unknown setting 'new.task'; did you mean new.tasks"),
        ("new.tasks=depht-to-image", "did you mean depth-to-image"),
        ("old.tasks=colourisation", "colourisation is both new and old"),
        ("evaluate.grids=1", "evaluate.grids = 1"),
        ("run.step=3", "unknown setting 'step'; did you mean steps"),
        ("run.seed=3", "run.seed is decided by 'seeds'"),
        ("run.adapter.rank=3", "run.adapter.rank is decided by 'rank'"),
        ("run.optimiser.lr=0", "optimiser.lr = 0"),
        ("run.optimiser.warmup=9", "longer than the 3 steps"),
        ("run.model=nothing", "unknown model 'nothing'"),
        ("run.data.tasks=novel-vew", "did you mean novel-view"),
        ("method.lora.steps=9", "method.lora.steps: methods differ in settings of optimiser"),
        ("method.lora.adapter.rank=9", "method.lora.adapter.rank is decided by 'rank'"),
        ("method.lora.optimiser.lr=0", "optimiser.lr = 0"),
        ("method.dora.optimiser.lr=1", "method.dora"),
        ("rank=20", "para would have rank 41"),
        ("rank=33", "would have rank 33: larger than"),
        ('run.data.sources=["subject"]', "no data source has all its roles"),
        ('new.sources=["folder=/no/where"]', "/no/where: no such"),
        ("base=nothing", "run file 'nothing': no such file"),
    ],
)
def test_a_comparison_that_cannot_work_is_refused_before_anything_is_written(
    comparison_file: Callable[..., Path], refused: Refused, tmp_path: Path, more: str, said: str
) -> None:
    assert said in refused("compare", comparison_file(), "--set", more)
    assert not (tmp_path / "out" / "runs").exists()


def test_files_and_folders_that_are_something_else_are_named(
    comparison_file: Callable[..., Path], refused: Refused, tmp_path: Path
) -> None:
    assert "no such file" in refused("compare", tmp_path / "gone.toml")
    assert "did you mean compare-scenes" in refused("compare", "compare-scene")
    assert "did you mean tiny" in refused("train", "--config", "tinny")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "letter.txt").write_text("dear")
    said = refused("compare", comparison_file())
    assert "holds 'letter.txt' and no comparison" in said


def test_more_grids_than_are_held_out_are_not_asked(
    comparison_file: Callable[..., Path], refused: Refused
) -> None:
    path = comparison_file(new={"tasks": "subject-driven", "sources": ["subject=1"]})
    path_words = ["--set", "run.data.tasks=subject-driven"]
    said = refused("compare", path, *path_words, "--set", "evaluate.grids=5")
    assert "evaluate.grids = 5: subject has 4 held-out items for subject-driven" in said


def test_data_that_is_trained_on_is_not_asked(
    comparison_file: Callable[..., Path], refused: Refused
) -> None:
    words = ["--set", 'run.data.sources=["subject"]', "--set", "run.data.tasks=subject-driven"]
    path = comparison_file(new={"tasks": "subject-driven"}, old={"tasks": "depth-to-image"})
    assert "new: nothing of subject is held out" in refused("compare", path, *words)
    for spelled in ("subject", "subject=0"):
        path = comparison_file(new={"tasks": "subject-driven", "sources": [spelled]})
        said = refused("compare", path, *words)
        assert f"new.sources names {spelled}, which is trained on" in said


def test_a_place_is_known_however_it_is_spelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "photos").mkdir()
    monkeypatch.chdir(tmp_path)
    spelled = ("photos", "photos/", "./photos", "photos@train", str(tmp_path / "photos"))
    assert len({place_of(f"graph200k={one}") for one in spelled}) == 1
    assert place_of("graph200k=photos@test") != place_of("graph200k=photos")
    assert place_of("subject=0/views") != place_of("subject=0")


# ---- figures


@pytest.mark.parametrize("by", ["grids", "seeds"])
def test_where_one_thing_alone_varies_it_is_students_test_of_its_means(by: str) -> None:
    values = np.random.default_rng(1).normal(0.5, 1, 12)
    whole = np.tile(values, (3, 1)) if by == "grids" else np.tile(values[:, None], (1, 40))
    found, expected = estimate(whole), stats.ttest_1samp(values, 0)
    assert (found.seeds, found.grids, found.count) == (*whole.shape, whole.size)
    assert found.mean == pytest.approx(values.mean())
    assert found.p == pytest.approx(expected.pvalue)
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval()))


@pytest.mark.parametrize("seeds", [1, 2, 3, 5])
@pytest.mark.parametrize("spread", [(0.0, 1.0, 1.0), (1.0, 0.0, 0.1), (0.2, 0.5, 1.0)])
def test_intervals_miss_the_truth_no_oftener_than_they_say(
    seeds: int, spread: tuple[float, float, float]
) -> None:
    of_seeds, of_grids, of_both = (0.0 if seeds == 1 else spread[0], *spread[1:])
    rng = np.random.default_rng(0)
    missed = 0
    for _ in range(600):
        one = rng.normal(2, of_seeds, (seeds, 1)) + rng.normal(0, of_grids, 24)
        found = estimate(one + rng.normal(0, of_both, (seeds, 24)))
        missed += not found.low <= 2 <= found.high
    assert 0.002 < missed / 600 < 0.08  # 0.05 and three deviations; careful, but not blind


def test_pairing_finds_a_small_difference_between_what_varies_much() -> None:
    rng = np.random.default_rng(0)
    of_grids = rng.normal(0, 5.0, 30)
    one = of_grids + rng.normal(0, 0.05, (3, 30))
    other = of_grids + 0.1 + rng.normal(0, 0.05, (3, 30))
    assert estimate(other).p > 0.05
    paired = estimate(other - one)
    assert paired.p < 0.01
    assert paired.agree == 3
    assert 0.05 < paired.low < paired.high < 0.15


def test_a_constant_difference_has_an_interval_of_no_width_and_none_no_significance() -> None:
    same = estimate(np.full((2, 5), 0.7))
    assert (same.low, same.high, same.p) == (pytest.approx(0.7), pytest.approx(0.7), 0)
    assert estimate(np.zeros((2, 5))).p == 1
    assert estimate(np.array([[1.0, np.nan]])).p == 1


def test_adjusted_p_are_never_smaller_and_keep_their_order() -> None:
    p = np.random.default_rng(0).uniform(0, 0.3, 6).tolist()
    adjusted = holm(p)
    assert all(after >= before for before, after in zip(p, adjusted, strict=True))
    in_order = np.array(adjusted)[np.argsort(p)]
    assert (np.diff(in_order) >= 0).all()
    assert in_order[0] < in_order[-1] < 1
    assert adjusted[int(np.argmin(p))] == pytest.approx(min(1, 6 * min(p)))


def test_psnr_of_a_grid_is_the_mean_of_what_an_evaluation_measures() -> None:
    black, grey = (Image.new("RGB", (8, 8), (value,) * 3) for value in (0, 16))
    assert psnr([grey], [black]) == fidelity.psnr(grey, black)
    both = [fidelity.psnr(grey, black), fidelity.psnr(black, black)]
    assert psnr([grey, black], [black, black]) == pytest.approx(np.mean(both))


def made(
    training: Training, seed: int, *, grids: int = 6, apart: float = 0.0, **groups: float
) -> list[Compared]:
    """Figures of a training, drawn. apart: how much more DEFT changes. groups: the change of each
    that was asked."""
    rng = np.random.default_rng([seed, training.seed, METHODS.index(training.method)])

    def figures(shift: float) -> Measured:
        return Measured(
            errors=tuple(rng.uniform(0.1, 0.5, grids) * (1 - shift / 10)),
            psnr=tuple(rng.normal(20 + shift, 1, grids)),
            seconds=1.0,
        )

    changes = groups or {"new": 2.0, "old": -1.0}
    tasks = {"colourisation": "new", "image-to-normals": "new", "depth-to-image": "old"}
    return [
        Compared(
            training=training,
            group=group,
            task=task,
            before=figures(0),
            after=figures(changes[group] + apart * (training.method == "deft")),
        )
        for task, group in tasks.items()
        if group in changes
    ]


def reported(path: Path, output: Path, *more: str, **drawn: Any) -> tuple[str, str]:
    """Table and page of drawn figures of a comparison."""
    output.mkdir()
    found = planned(path, *more)
    for training in found:
        training.folder.mkdir(parents=True, exist_ok=True)
        line = {"step": 1, "loss": 1.0, "seconds": 60.0, "examples": 1, "tasks": {}}
        run_folder.append_line(training.folder / run_folder.METRICS, line)
    (output / compare.SETTINGS).write_text("")
    write_reports([one for training in found for one in made(training, 3, **drawn)], output)
    return (output / TABLE).read_text(), (output / REPORT).read_text()


def test_without_old_tasks_a_report_is_of_gain_alone(
    comparison_file: Callable[..., Path], tmp_path: Path
) -> None:
    for methods in ('["deft","lora"]', '["deft"]'):
        place = tmp_path / str(len(methods))
        table, page = reported(comparison_file(), place, f"methods={methods}", new=2.0)
        assert table.startswith("### Gain\n")
        assert "retention" not in table + page
        assert ("### Methods in pairs" in table) == ("lora" in methods)
        assert page.count("<svg") == 2


def test_one_seed_is_said_and_gives_no_interval_that_looks_as_over_seeds(
    comparison_file: Callable[..., Path], tmp_path: Path
) -> None:
    table, page = reported(comparison_file(), tmp_path / "one", "seeds=[0]", grids=24, new=2.0)
    said = "One seed: no spread between trainings is known."
    assert said in table
    assert said in page
    assert "other seeds" not in table
    assert "seeds that agree" not in table
    assert " (grids +" in table
    assert " *" not in table
    assert "1 seed x 2 tasks x 24 grids" in table


def test_a_difference_over_few_grids_is_not_marked(
    comparison_file: Callable[..., Path], tmp_path: Path
) -> None:
    words = ('methods=["deft","para"]', 'match=["rank"]')
    few, many = (
        reported(comparison_file(), tmp_path / str(grids), *words, grids=grids, apart=7.0)[0]
        for grids in (MARKED - 1, MARKED)
    )
    assert " *, 2 of 2 |" not in few
    assert f"none over fewer than {MARKED} grids" in few
    assert " *, 2 of 2 |" in many
    assert "fewer than" not in many


def test_matches_of_the_same_trainings_have_one_chart(
    comparison_file: Callable[..., Path],
) -> None:
    path = comparison_file()
    lines = [line_of(one) for training in planned(path) for one in made(training, 3)]
    assert [*fields_of(lines)] == ["rank", "parameters"]  # PaRa has two ranks
    without = [line for line in lines if line["method"] != "para"]
    ((match, entered),) = fields_of(without).items()
    assert match == "rank and parameters"
    assert [method for method, _ in entered] == ["deft", "deft-relaxed", "lora"]


def test_a_comparison_without_old_tasks_is_written_as_it_was_read(
    comparison_file: Callable[..., Path], micro_model: Path, tmp_path: Path
) -> None:
    path = tmp_path / "gain.toml"
    own = fields(micro_model, tmp_path / "out")
    del own["old"]
    path.write_text(tomli_w.dumps(own))
    comparison = load_comparison(str(path))
    write_comparison(comparison, tmp_path / "again.toml")
    assert load_comparison(str(tmp_path / "again.toml")) == comparison
    asked = query_sets(comparison, trainings(comparison)[0].run)
    assert {one.group for one in asked} == {"new"}


def test_the_report_holds_what_the_results_say(
    comparison_file: Callable[..., Path], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    output.mkdir()
    found = planned(comparison_file())
    for training in found:
        training.folder.mkdir(parents=True)
        for step in (1, 2, 3):
            line = {"step": step, "loss": 1 / step, "seconds": 60.0, "examples": 1, "tasks": {}}
            run_folder.append_line(training.folder / run_folder.METRICS, line)
    (output / compare.SETTINGS).write_text("rank = 4 # <settings>")
    write_reports([one for training in found for one in made(training, 3)], output)

    lines = read_results(output / RESULTS)
    assert len(lines) == 5 * 2 * 3  # four methods and PaRa's other rank, seeds, tasks
    table, page = (output / TABLE).read_text(), (output / REPORT).read_text()
    figures = list(csv.DictReader((output / CSV).read_text().splitlines()))
    for match in ("rank", "parameters"):
        for method in METHODS:
            own = [x for x in lines if match in x["matches"] and x["method"] == method]
            for group, word in (("new", "gain"), ("old", "retention")):
                of = [line for line in own if line["group"] == group]
                mean = np.mean([line["psnr_after"] - line["psnr_before"] for line in of])
                (row,) = (
                    one
                    for one in figures
                    if match in one["match"].split(" and ")
                    and (one["method"], one["change_of"]) == (method, word)
                    and (one["measure"], one["task"], one["minus"]) == ("PSNR", "", "")
                )
                assert float(row["mean"]) == pytest.approx(mean, abs=1e-4)
                assert float(row["low"]) < mean < float(row["high"])
                assert (row["seeds"], row["grids"]) == ("2", "6")
                assert f"{mean:+.2f} (" in table
                assert f"{mean:+.2f} (" in page
    pairs = [one for one in figures if one["minus"]]
    for other, matches in (("para", {"rank", "parameters"}), ("lora", {"rank and parameters"})):
        pair = [one for one in pairs if (one["method"], one["minus"]) == ("deft", other)]
        assert len(pair) == len(matches) * 2 * 2
        assert {one["match"] for one in pair} == matches
    assert all(float(one["p"]) <= float(one["p_holm"]) for one in pairs)
    deft, lora = (
        np.mean(
            [
                line["psnr_after"] - line["psnr_before"]
                for line in lines
                if (line["method"], line["group"]) == (method, "new")
            ]
        )
        for method in ("deft", "lora")
    )
    assert float(pair[0]["mean"]) == pytest.approx(deft - lora, abs=1e-4)
    assert "2 seeds x 2 tasks x 6 grids" in table
    assert "10 trainings of 3 steps, 30 minutes" in table
    assert "&lt;settings&gt;" in page
    assert page.count("<svg") == 2
    assert 'src="http' not in page


# ---- real trainings


def train_all(path: Path, *more: str) -> None:
    """What `vcdeft compare` starts, forked."""
    for training in planned(path, *more):
        training.folder.mkdir(parents=True)
        settings = training.folder.parent / f"{training.name}.toml"
        write_run(training.run, settings)
        run(["train", "--config", settings], processes=1)
        settings.unlink()


@pytest.mark.processes
def test_what_is_finished_is_not_done_again(
    comparison_file: Callable[..., Path],
    tmp_path: Path,
    refused: Refused,
    capsys: pytest.CaptureFixture[str],
) -> None:
    few = ["--set", 'methods=["deft","lora"]', "--set", "seeds=[0]"]
    path, output = comparison_file(), tmp_path / "out"
    train_all(path, *few[1::2])
    main(["compare", str(path), *few])
    assert "| rank and parameters | deft | 4 |" in capsys.readouterr().out
    losses = [
        [line["loss"] for line in jsonl.read_lines(output / "runs" / name / run_folder.METRICS)]
        for name in ("deft-r4-s0", "lora-r4-s0")
    ]
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-5)  # both start as the base
    assert losses[0][-1] != losses[1][-1]

    told = (output / RESULTS).read_bytes()
    lost = output / "evaluations" / "lora-r4-s0" / "new-colourisation.json"
    before = {file: file.stat().st_mtime_ns for file in output.glob("evaluations/*/*.json")}
    figures = json.loads(lost.read_text())
    with Image.open(output / SAMPLES) as sheet:
        assert sheet.width > 5 * 144  # a condition, the base, two methods and the truth
        shown = sheet.tobytes()
    (output / "evaluations" / "lora-r4-s0" / "samples" / "new-colourisation-1-0.png").unlink()
    main(["compare", str(path), *few, "--dry-run"])
    said = capsys.readouterr().out
    assert "0 of 2 trainings to do" in said
    assert "1 of 9 times a task to measure" in said
    main(["compare", str(path), *few])
    again = {file: file.stat().st_mtime_ns for file in output.glob("evaluations/*/*.json")}
    assert [file for file in again if again[file] != before[file]] == [lost]
    assert json.loads(lost.read_text()) | {"seconds": 0} == figures | {"seconds": 0}
    with Image.open(output / SAMPLES) as sheet:
        assert sheet.tobytes() == shown
    assert "data:image/jpeg" in (output / REPORT).read_text()
    assert not list(output.glob("runs/*/sheets"))  # trainings of a comparison make none

    base = json.loads((output / "evaluations" / "base" / "new-colourisation.json").read_text())
    assert base["psnr"] != figures["psnr"]
    assert base["errors"] != figures["errors"]
    assert len(base["psnr"]) == len(base["errors"]) == 3
    assert told.count(b"\n") == (output / RESULTS).read_bytes().count(b"\n") == 2 * 3

    capsys.readouterr()  # bars
    said = refused("compare", path, *few, "--set", "run.steps=4")
    assert "deft-r4-s0 was trained with steps = 3, now it is 4" in said
    said = refused("compare", path, *few, "--set", "method.lora.optimiser.lr=0.5")
    assert "lora-r4-s0 was trained with optimiser.lr = 0.0001, now it is 0.5" in said


@pytest.mark.processes
def test_a_comparison_that_is_killed_goes_on_where_it_stopped(
    comparison_file: Callable[..., Path], tmp_path: Path
) -> None:
    path = comparison_file(methods=["deft", "lora"], match=["rank"], seeds=[0])
    words = ["compare", path, "--set", "run.steps=30", "--output"]
    whole, output = tmp_path / "whole", tmp_path / "killed"
    done = vcdeft(*words, whole)
    assert done.returncode == 0, done.stderr[-2000:]

    command = [sys.executable, "-m", "visualcloze_deft", *map(str, words), str(output)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    second = output / "runs" / "lora-r4-s0" / "checkpoints" / "step-000005"
    until = time.monotonic() + 200
    while not second.exists():
        assert time.monotonic() < until
        assert process.poll() is None
        time.sleep(0.02)
    first = (output / "runs" / "deft-r4-s0" / "adapter" / files.WEIGHTS).stat().st_mtime_ns
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.communicate(timeout=10)  # which ends with the last process that could write there
    assert children
    assert not (output / RESULTS).exists()

    again = vcdeft(*words, output)
    assert again.returncode == 0, again.stderr[-2000:]
    for name in ("deft-r4-s0", "lora-r4-s0"):
        one, other = (
            load_file(folder / "runs" / name / "adapter" / files.WEIGHTS)
            for folder in (whole, output)
        )
        assert all(one[key].equal(other[key]) for key in one)
    adapter = output / "runs" / "deft-r4-s0" / "adapter" / files.WEIGHTS
    assert adapter.stat().st_mtime_ns == first
    told = [
        [line["of_grids"] for line in read_results(folder / RESULTS)] for folder in (whole, output)
    ]
    assert told[0] == told[1]


def test_a_comparison_is_written_as_it_was_read(
    comparison_file: Callable[..., Path], tmp_path: Path
) -> None:
    comparison = load_comparison(str(comparison_file()))
    assert isinstance(comparison, Comparison)
    write_comparison(comparison, tmp_path / "again.toml")
    assert load_comparison(str(tmp_path / "again.toml")) == comparison
