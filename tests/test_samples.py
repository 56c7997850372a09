"""Samples while a run trains: which grids, the base beside the adapter, and training as without."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from processes import run
from test_train import adapter_of, arguments, losses

from visualcloze_deft.adapters import injection
from visualcloze_deft.backbones.flux_fill.loading import load_models
from visualcloze_deft.backbones.flux_fill.model import Models
from visualcloze_deft.config.run_settings import Adapter, Run, load_run
from visualcloze_deft.data.queries import query_of
from visualcloze_deft.reporting.contact_sheet import draw_grid
from visualcloze_deft.sampling.encoding import NEAREST, TokenBatch, encode, in_pixels
from visualcloze_deft.sampling.room import Room
from visualcloze_deft.storage.step_names import by_step, step_name, step_of
from visualcloze_deft.training import run_data
from visualcloze_deft.training.console import WINDOW, Console, RunningMean
from visualcloze_deft.training.sample_sheets import (
    CELL,
    WIDTH,
    Sample,
    answer,
    sample_page,
    sheet_of,
)
from visualcloze_deft.training.samples import AT_MOST, grids_shown
from visualcloze_deft.training.step import exact_weights


@pytest.fixture(scope="module")
def models(micro_model: Path) -> Models:
    return load_models(str(micro_model))


def run_on(model: Path, tasks: str) -> Run:
    return load_run(None, [f"model={model}", f"data.tasks={tasks}"])


def test_few_tasks_have_several_grids_and_many_tasks_share_a_sheet(micro_model: Path) -> None:
    for tasks, each in (("depth-to-image", AT_MOST), ("all", 1)):
        grids = grids_shown(run_data.mixture_of(run_on(micro_model, tasks)), 6)
        of_task = {one.task: [g for g in grids if g.task == one.task] for one in grids}
        assert len(grids) <= 6
        assert {len(own) for own in of_task.values()} == {each}
        assert all(len({g.keys[-1] for g in own}) == each for own in of_task.values())
    assert not grids_shown(run_data.mixture_of(run_on(micro_model, "depth-to-image")), 0)


def test_no_grid_asks_twice_for_an_item_of_few(micro_model: Path) -> None:
    fields = [f"model={micro_model}", 'data.sources=["subject"]', "data.tasks=subject-driven"]
    mixture = run_data.mixture_of(load_run(None, fields))
    queries = [grid.keys[-1] for grid in grids_shown(mixture, 12)]
    assert len(queries) == len(set(queries)) == AT_MOST


@pytest.mark.parametrize("method", ["deft", "para", "lora"])
def test_without_its_adapter_a_model_answers_as_the_base_and_with_it_as_before(
    models: Models, micro_model: Path, method: str
) -> None:
    mixture = run_data.mixture_of(run_on(micro_model, "depth-to-image"))
    example = query_of(mixture, mixture.tasks["depth-to-image"], index=0)

    def answered() -> bytes:
        return answer(models, example, Room(models))[0].tobytes()

    base = answered()
    try:
        injection.attach(
            models.transformer, Adapter.model_validate({"method": method, "rank": 4}), seed=0
        )
        trained = injection.trainable(models.transformer)
        with torch.no_grad():
            for parameter in trained.values():
                parameter.add_(torch.randn_like(parameter))
        adapted = answered()
        with injection.without_adapter(models.transformer):
            assert answered() == base
            assert list(injection.trainable(models.transformer)) == list(trained)
        assert answered() == adapted != base
    finally:
        injection.detach(models.transformer)


def test_a_page_shows_base_adapter_and_truth_at_one_size(micro_model: Path) -> None:
    mixture = run_data.mixture_of(run_on(micro_model, "depth-to-image"))
    example = query_of(mixture, mixture.tasks["depth-to-image"], index=0)
    roles = mixture.tasks["depth-to-image"].roles
    small, large = (Image.new("RGB", (side, side), "red") for side in (16, 512))
    made = {"base": [small], "adapter": [large]}
    page = sample_page(Sample(example=example, roles=roles, made=made))
    none = sample_page(Sample(example=example, roles=roles, made={"base": None, "adapter": None}))
    assert page.size == none.size
    assert page.width == draw_grid([[small] * 4], cell=CELL).width


def test_a_sheet_is_no_wider_than_a_page_shows_in_full_size(micro_model: Path) -> None:
    mixture = run_data.mixture_of(run_on(micro_model, "depth-to-image"))
    example = query_of(mixture, mixture.tasks["depth-to-image"], index=0)
    roles = mixture.tasks["depth-to-image"].roles
    picture = [Image.new("RGB", (16, 16), "red")]
    for made in ({"base": picture}, {"base": picture, "adapter": picture}):
        one = Sample(example=example, roles=roles, made=made)
        for count in (1, 2, 5, 12):
            sheet = sheet_of([one] * count, title="Step 0")
            assert sheet.width <= WIDTH
            assert sheet.width // sample_page(one).width == min(2, -(-count // 2))


def test_what_steps_name_is_in_their_order_and_other_files_are_none_of_it(tmp_path: Path) -> None:
    steps = [0, 999_999, 1_000_000]
    for name in (*map(step_name, steps), "step-x", "step-0000007", "step-٣", "step-"):
        (tmp_path / f"{name}.png").touch()
    assert [step_of(path) for path in by_step(tmp_path, ".png")] == steps
    assert not by_step(tmp_path)


def test_a_run_samples_the_base_first_once_and_trains_as_without_samples(
    micro_model: Path, tmp_path: Path
) -> None:
    output, bare = tmp_path / "run", tmp_path / "bare"
    run([*arguments(micro_model, output), "--set", "sample_every=2", "--steps", "4"], processes=1)
    run([*arguments(micro_model, bare), "--set", "sample_grids=0", "--steps", "4"], processes=1)
    assert losses(output) == losses(bare)
    assert all(torch.equal(adapter_of(bare)[n], t) for n, t in adapter_of(output).items())
    assert not (bare / "sheets").exists()
    sheets = sorted((output / "sheets").glob("*.png"))
    assert [sheet.stem for sheet in sheets] == ["step-000000", "step-000002", "step-000004"]
    first, second, last = (Image.open(sheet) for sheet in sheets)
    assert first.width < second.width == last.width  # no column of the adapter yet

    base = sorted((output / "sheets" / "base").iterdir())
    assert [path.name for path in base] == ["depth-to-image-0-0.png", "novel-view-0-0.png"]
    kept, spoiled = base
    before, pictures = kept.stat().st_mtime_ns, [Image.open(path).tobytes() for path in base]
    spoiled.write_bytes(b"spoiled")
    shown = sheets[-1].read_bytes()
    sheets[-1].unlink()
    run(["train", "--output", output, "--resume"], processes=1)
    assert kept.stat().st_mtime_ns == before
    assert [Image.open(path).tobytes() for path in base] == pictures
    assert sheets[-1].read_bytes() == shown


def test_the_loss_without_scheduled_samples_counts_all_times_alike(
    models: Models, micro_model: Path
) -> None:
    mixture = run_data.mixture_of(run_on(micro_model, "depth-to-image"))
    one = in_pixels(query_of(mixture, mixture.tasks["depth-to-image"], index=0))
    (group,) = encode(models, [one], seed=0)
    count, chance = 4000, 0.6
    t = torch.rand(count, generator=torch.Generator().manual_seed(0))
    led = (torch.rand(count, generator=torch.Generator().manual_seed(1)) < chance) & (t > NEAREST)
    many = TokenBatch(
        indices=tuple(range(count)),
        latents=group.latents,
        noise=group.noise,
        t=t,
        start=torch.where(led, 1.0, t),
        text=group.text,
    )
    weights = torch.tensor([*exact_weights([many], chance).values()])
    assert not weights[led].any()
    for some in (t < NEAREST, (t > NEAREST) & (t < 0.5), t > 0.5):
        assert weights[some].mean() == pytest.approx(1, abs=0.1)


def test_the_time_that_is_left_counts_steps_and_what_lies_between() -> None:
    fields = ["steps=100", "sample_every=10", "logging.validate_every=50", "save_every=25"]
    console = Console(load_run(None, fields), first=False)
    with console.shown(0):
        console.step(40, {"loss": 1.0, "seconds": 2.0})
    assert console.left(40) == 60 * 2
    console.spent = {"sheet": 7.0, "validation": 5.0, "save": 1.0}
    assert console.left(40) == 60 * 2 + 6 * 7 + 2 * 5 + 3 * 1


def test_a_running_mean_forgets_and_passes_over_what_is_not_finite() -> None:
    found = RunningMean()
    found.add(float("nan"))
    for _ in range(WINDOW):
        found.add(9.0)
    for _ in range(WINDOW):
        found.add(1.0, weight=3.0)
    assert found.mean == 1
    found.add(53.0, weight=3.0)
    assert found.mean == pytest.approx(1 + 52 / WINDOW)
