"""A sample that memory is too small for: tried again in less, else left out; training goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from processes import run
from test_train import arguments, losses

from visualcloze_deft.backbones.flux_fill.loading import load_models
from visualcloze_deft.cli import main
from visualcloze_deft.errors import UserError
from visualcloze_deft.sampling.room import NoRoom, Room, put_back, ran_out

FULL = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has no more\nand so on"


def failing(fails: Callable[[int], bool]) -> None:
    """From now on the VAE's n-th decoding in this process runs out of memory where `fails(n)`."""
    decode, calls = AutoencoderKL.decode, 0

    def stand_in(self: AutoencoderKL, *given: Any, **more: Any) -> Any:
        nonlocal calls
        calls += 1
        if fails(calls):
            raise torch.OutOfMemoryError(FULL)
        return decode(self, *given, **more)

    AutoencoderKL.decode = stand_in


def first_fails(*words: str) -> None:
    failing(lambda number: number == 1)
    main(words)


def second_grid_fails(*words: str) -> None:
    failing(lambda number: number > 1)
    main(words)


def all_fail_in_rank_1(*words: str) -> None:
    failing(lambda _: os.environ["RANK"] == "1")
    main(words)


def never_fails(*words: str) -> None:
    main(words)


def test_memory_that_ran_out_is_known_by_its_errors() -> None:
    with pytest.raises(RuntimeError) as found:
        torch.empty(2**60)
    assert ran_out(found.value)
    assert ran_out(MemoryError())
    assert ran_out(torch.OutOfMemoryError("any words"))
    assert not ran_out(RuntimeError("shapes do not fit"))
    assert not ran_out(ValueError("out of memory"))


def test_room_is_made_once_and_put_back(micro_model: Path) -> None:
    models = load_models(str(micro_model))
    latents = torch.randn(1, 16, 8, 40, generator=torch.Generator().manual_seed(0))
    whole = models.decode_latents(latents)
    tried = []

    def decode() -> torch.Tensor:
        tried.append(models.vae.use_tiling)
        if len(tried) == 1:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return models.decode_latents(latents)

    with put_back(Room(models)) as room:
        tiled = room.attempt(decode)
        assert room.made
    assert tried == [False, True]
    assert tiled.shape == whole.shape
    assert not models.vae.use_tiling
    assert torch.equal(models.decode_latents(latents), whole)


def test_what_fails_in_another_process_fails_here(micro_model: Path) -> None:
    models = load_models(str(micro_model))
    with put_back(Room(models, agree=lambda _: "elsewhere")) as room:
        with pytest.raises(NoRoom, match="elsewhere"):
            room.attempt(lambda: 1)
        assert models.vae.use_tiling


def test_other_mistakes_are_not_tried_again(micro_model: Path) -> None:
    tried = []

    def wrong() -> None:
        tried.append(1)
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="do not fit"):
        Room(load_models(str(micro_model))).attempt(wrong)
    assert len(tried) == 1


def test_where_processes_wait_for_each_other_one_that_fails_ends_the_run(
    micro_model: Path,
) -> None:
    room = Room(load_models(str(micro_model)), split=True)
    with pytest.raises(UserError, match="out of memory while sampling under --zero 3"):
        room.attempt(lambda: torch.empty(2**60), transformer=True)
    assert not room.made


def test_a_sheet_is_made_in_less_memory_where_the_first_try_fails(
    micro_model: Path, tmp_path: Path
) -> None:
    words = [*arguments(micro_model, tmp_path / "run"), "--steps", "2"]
    said = run(words, processes=1, function=first_fails)
    assert "sheet of step 0: memory ran out; made with the encoders in main memory" in said
    usual = [*arguments(micro_model, tmp_path / "usual"), "--steps", "2"]
    run(usual, processes=1, function=never_fails)
    assert losses(tmp_path / "run") == losses(tmp_path / "usual")
    for step in (0, 2):
        sheets = [tmp_path / f / "sheets" / f"step-{step:06d}.png" for f in ("run", "usual")]
        assert sheets[0].read_bytes() == sheets[1].read_bytes()  # strips no wider than a tile


def test_a_sheet_that_one_process_has_no_memory_for_is_left_out_in_all(
    micro_model: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    words = [*arguments(micro_model, output), "--steps", "4", "--set", "sample_every=2"]
    said = run(words, function=all_fail_in_rank_1)
    for step in (0, 2, 4):
        assert f"sheet of step {step}: no memory for" in said
    assert not list((output / "sheets").glob("*.png"))
    assert len(losses(output)) == 4
    assert (output / "adapter").is_dir()
    assert (output / "report.html").is_file()


def test_a_sheet_keeps_the_grids_that_there_is_memory_for(
    micro_model: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    words = [*arguments(micro_model, output), "--steps", "2"]
    said = run(words, processes=1, function=second_grid_fails)
    (line,) = (line for line in said.splitlines() if "sheet of step 0: no memory for" in line)
    assert ("novel-view" in line) != ("depth-to-image" in line)
    assert "sheet of step 2: no memory for depth-to-image, novel-view" in said
    assert Image.open(output / "sheets" / "step-000000.png").width > 0
    assert not (output / "sheets" / "step-000002.png").exists()
    assert json.loads((output / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 2
