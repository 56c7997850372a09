"""The held-out loss: of grids that training never sees, the same each time and everywhere."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from PIL import Image

from visualcloze_deft.backbones.flux_fill.loading import load_models
from visualcloze_deft.backbones.flux_fill.model import Models
from visualcloze_deft.config.run_settings import Run, load_run
from visualcloze_deft.diffusion.timesteps import shift
from visualcloze_deft.errors import UserError
from visualcloze_deft.sampling.encoding import PixelExample, draw_noise
from visualcloze_deft.training import run_data, validation
from visualcloze_deft.training.datasets import PixelDataset
from visualcloze_deft.training.objective import GridLoss
from visualcloze_deft.training.validation import ValidationLosses


@pytest.fixture(scope="module")
def models(micro_model: Path) -> Models:
    return load_models(str(micro_model))


def run_on(model: Path, *more: str) -> Run:
    return load_run(None, [f"model={model}", "data.tasks=depth-to-image,novel-view", *more])


def as_drawn(drawn: Sequence[PixelExample | UserError]) -> Sequence[PixelExample]:
    assert all(isinstance(one, PixelExample) for one in drawn)
    return cast(Sequence[PixelExample], drawn)


def measured(
    models: Models, run: Run, own: Sequence[int], *, scheduled_sampling: bool = False
) -> dict[int, ValidationLosses]:
    loss_of = GridLoss(
        models.transformer, context_weight=1, guidance=1.0, scheduled_sampling=scheduled_sampling
    ).eval()
    draws = PixelDataset(run_data.held_out_of(run))
    return validation.losses(loss_of, models, draws, run, own=own, agreed=as_drawn)


def test_the_loss_is_the_same_for_any_number_of_processes(
    models: Models, micro_model: Path
) -> None:
    run = run_on(micro_model)
    alone = measured(models, run, validation.share(5, rank=0, world=1))
    shares = [validation.share(5, rank=rank, world=3) for rank in range(3)]
    assert len({len(own) for own in shares}) == 1  # ZeRO-3 calls the model together
    together = {i: one for own in shares for i, one in measured(models, run, own).items()}
    assert dict(sorted(together.items())) == alone
    assert {one.task for one in alone.values()} == {"depth-to-image", "novel-view"}


def test_measuring_draws_nothing_that_training_would(models: Models, micro_model: Path) -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    measured(models, run_on(micro_model), validation.share(2, rank=0, world=1))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]
    assert random.getstate() == before[2]


def test_the_loss_does_not_depend_on_how_many_times_are_taken_at_once(
    models: Models, micro_model: Path
) -> None:
    own = validation.share(2, rank=0, world=1)
    one, five = (measured(models, run_on(micro_model, f"batch={b}"), own) for b in (1, 5))
    for index in own:
        assert one[index].errors == pytest.approx(five[index].errors, rel=1e-5)


def test_the_models_own_steps_are_training_alone(models: Models, micro_model: Path) -> None:
    run = run_on(micro_model, "scheduled_sampling=0.9")
    own = validation.share(1, rank=0, world=1)
    assert measured(models, run, own, scheduled_sampling=True) == measured(models, run, own)


@pytest.mark.parametrize(
    "settings", ["timestep_sampling=uniform", "timestep_sampling=logit-normal timestep_shift=3"]
)
def test_times_are_quantiles_of_those_that_training_draws(settings: str) -> None:
    run = load_run(None, settings.split())
    drawn = torch.stack(
        [draw_noise((1,), 0, index, run.timestep_sampling)[1] for index in range(4000)]
    )
    found = torch.quantile(shift(drawn, run.timestep_shift), torch.tensor(validation.QUANTILES))
    torch.testing.assert_close(validation.times_of(run), found, atol=0.02, rtol=0)


def test_held_out_scenes_are_not_trained_on(micro_model: Path) -> None:
    run = run_on(micro_model)
    training, held_out = run_data.mixture_of(run), run_data.held_out_of(run)
    trained = {key for index in range(10) for key in training[index].keys}
    assert trained.isdisjoint({k for i in range(10) for k in held_out[validation.FIRST + i].keys})


def test_pictures_are_measured_on_where_some_are_held_out_and_else_refused(
    tmp_path: Path, micro_model: Path, refused: Callable[..., str]
) -> None:
    for role in ("depth", "target"):
        (tmp_path / "data" / role).mkdir(parents=True)
        for number in range(8):
            Image.new("RGB", (32, 32)).save(tmp_path / "data" / role / f"{number}.png")
    words = ["train", "--model", micro_model, "--data", f"folder={tmp_path / 'data'}"]
    words += ["--tasks", "depth-to-image", "--output", tmp_path / "run"]
    said = refused(*words, "--set", "logging.validate_every=5")
    assert "logging.validate_every = 5: nothing of folder=" in said
    assert not (tmp_path / "run").exists()
    fields = [f'data.sources=["folder={tmp_path / "data"}"]', "data.tasks=depth-to-image"]
    held_out = run_data.held_out_of(load_run(None, [*fields, "data.validation_every=4"]))
    assert {key for i in range(20) for key in held_out[i].keys} == {"3", "7"}


def test_why_the_training_loss_is_higher_names_the_settings_of_the_run(micro_model: Path) -> None:
    plain, led = (
        validation.why_training_is_higher(run_on(micro_model, f"scheduled_sampling={share}"))
        for share in (0, 0.6)
    )
    assert "scheduled_sampling" not in plain
    assert "60% of its samples start from a step of the model's own (scheduled_sampling)" in led
    averaged = run_on(micro_model, "ema=0.99", "adapter.dropout=0.1")
    assert "10% dropout" in validation.why_training_is_higher(averaged)
    assert "(ema)" in validation.why_training_is_higher(averaged)
