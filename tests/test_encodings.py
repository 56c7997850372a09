"""Encodings on disk: the same as encoding, whatever is there, and whatever happens to a file."""

from __future__ import annotations

import multiprocessing
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from visualcloze_deft.adapters import injection
from visualcloze_deft.backbones.embedding_cache import Encodings, Used, digest, entries, fingerprint
from visualcloze_deft.backbones.flux_fill.loading import load_models
from visualcloze_deft.backbones.flux_fill.model import Models
from visualcloze_deft.cli import main
from visualcloze_deft.config.run_settings import Run, load_run, write_run
from visualcloze_deft.errors import UserError
from visualcloze_deft.sampling.encoding import PixelExample, TokenBatch, encode
from visualcloze_deft.training import preparation, resume, run_data, run_folder
from visualcloze_deft.training.cache_latents import encode_all, length_of
from visualcloze_deft.training.checkpoint import Progress
from visualcloze_deft.training.datasets import PixelDataset
from visualcloze_deft.training.objective import GridLoss

TEXTS = ["a red mug", "a dog on a lawn", "a red mug"]


@pytest.fixture(scope="module")
def models(micro_model: Path) -> Models:
    return load_models(str(micro_model))


@pytest.fixture(scope="module")
def run(micro_model: Path) -> Run:
    tasks = "data.tasks=depth-to-image,novel-view"
    return load_run(None, [f"model={micro_model}", tasks, "adapter.rank=4"])


@pytest.fixture(scope="module")
def drawn(run: Run) -> list[PixelExample]:
    draws = PixelDataset(run_data.mixture_of(run))
    found = [draws[index] for index in range(6)]
    return [one for one in found if isinstance(one, PixelExample)]


def keeping(models: Models, folder: Path) -> tuple[Models, Encodings]:
    encodings = Encodings(folder)
    return replace(models, encodings=encodings), encodings


def strips(count: int) -> Tensor:
    return torch.rand(count, 3, 32, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1


def tensors(group: TokenBatch) -> list[Tensor]:
    latents = group.latents
    return [latents.clean, latents.seen, latents.mask, group.noise, *group.text]


def test_what_is_found_is_what_encoding_each_alone_gives(models: Models, tmp_path: Path) -> None:
    alone = [models.encode_text([text]) for text in TEXTS]
    pixels = torch.cat([models.encode_pixels(one) for one in strips(3).split(1)])
    for expected in (Used(found=2, made=7), Used(found=9)):  # of two texts, each twice, 3 strips
        keeper, encodings = keeping(models, tmp_path)
        text, pooled = keeper.encode_text(TEXTS)
        assert torch.equal(text, torch.cat([t5 for t5, _ in alone]))
        assert torch.equal(pooled, torch.cat([clip for _, clip in alone]))
        assert torch.equal(keeper.encode_pixels(strips(3)), pixels)
        assert encodings.used == expected


def test_another_encoder_or_input_has_another_key(models: Models, tmp_path: Path) -> None:
    _, encodings = keeping(models, tmp_path)
    shown = strips(1)[0]
    key = encodings.key(models.vae, shown)
    assert encodings.key(models.vae, shown.reshape(3, 64, 32)) != key
    assert encodings.key(models.vae, shown.bfloat16()) != key
    ids = torch.arange(8)
    assert encodings.key(models.text_encoder, ids) != encodings.key(models.text_encoder_2, ids)


@pytest.mark.parametrize("change", ["one bit of one weight", "dtype", "settings"])
def test_a_fingerprint_tells_a_changed_encoder(
    micro_model: Path, models: Models, change: str
) -> None:
    vae = load_models(str(micro_model)).vae
    assert fingerprint(vae) == fingerprint(models.vae)
    if change == "dtype":
        vae.bfloat16()
    elif change == "settings":
        vae.register_to_config(scaling_factor=0.5)
    else:
        weight = vae.encoder.mid_block.resnets[0].conv1.weight
        weight.data.view(torch.int32)[3, 2, 1, 0] ^= 1
    assert fingerprint(vae) != fingerprint(models.vae)


def test_a_model_elsewhere_on_disk_finds_the_same_entries(
    micro_model: Path, models: Models, tmp_path: Path
) -> None:
    keeping(models, tmp_path / "kept")[0].encode_text(TEXTS)
    copied = shutil.copytree(micro_model, tmp_path / "copied")
    keeper, encodings = keeping(load_models(str(copied)), tmp_path / "kept")
    keeper.encode_text(TEXTS)
    assert encodings.used.made == 0


def test_no_flipped_bit_and_no_cut_goes_unseen(tmp_path: Path) -> None:
    encodings = Encodings(tmp_path)
    encoding = torch.randn(8).bfloat16()
    key = digest("", torch.zeros(1)).hex()
    encodings.write(key, encoding)
    (path,) = entries(tmp_path)
    whole = path.read_bytes()
    damaged = [whole[:end] for end in range(len(whole))]
    for place in range(len(whole)):
        for bit in range(8):
            flipped = bytearray(whole)
            flipped[place] ^= 1 << bit
            damaged.append(bytes(flipped))
    for content in damaged:
        path.write_bytes(content)
        assert encodings.read(key) is None
    assert encodings.used.damaged == len(damaged)
    path.write_bytes(whole)
    found = encodings.read(key)
    assert found is not None
    assert torch.equal(found, encoding)


def test_a_damaged_or_misplaced_entry_is_made_again(models: Models, tmp_path: Path) -> None:
    keeper, _ = keeping(models, tmp_path)
    expected = keeper.encode_pixels(strips(2))
    first, second = entries(tmp_path)
    kept = first.read_bytes(), second.read_bytes()
    first.write_bytes(kept[1])
    second.write_bytes(kept[1][:-1])
    keeper, encodings = keeping(models, tmp_path)
    assert torch.equal(keeper.encode_pixels(strips(2)), expected)
    assert encodings.used == Used(made=2, damaged=2)
    assert (first.read_bytes(), second.read_bytes()) == kept


def write_all(folder: Path, together: object, keys: list[str]) -> None:
    encodings = Encodings(folder)
    together.wait()  # type: ignore[attr-defined]
    for _ in range(20):
        for key in keys:
            encodings.write(key, torch.full((4096,), float(int(key[:4], 16))))


def test_processes_that_write_the_same_entries_at_once_leave_them_whole(tmp_path: Path) -> None:
    keys = [digest(str(k), torch.zeros(1)).hex() for k in range(10)]
    fork = multiprocessing.get_context("fork")
    together = fork.Barrier(3)
    writers = [fork.Process(target=write_all, args=(tmp_path, together, keys)) for _ in range(2)]
    for writer in writers:
        writer.start()
    encodings = Encodings(tmp_path)
    together.wait()
    while any(writer.is_alive() for writer in writers):
        for key in keys:
            encodings.read(key)
    assert [writer.exitcode for writer in writers] == [0, 0]
    for key in keys:
        found = encodings.read(key)
        assert found is not None
        assert (found == int(key[:4], 16)).all()
    assert encodings.used.damaged == 0
    assert len(list(tmp_path.glob("*/*"))) == len(keys)  # nothing else is left


def test_a_full_disk_is_told_once_and_what_was_stored_is_still_found(
    models: Models,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    no_room: Callable[[], AbstractContextManager[None]],
) -> None:
    expected = keeping(models, tmp_path)[0].encode_pixels(strips(1))
    keeper, encodings = keeping(models, tmp_path)
    with no_room():
        assert torch.equal(keeper.encode_pixels(strips(2))[:1], expected)
        keeper.encode_text(TEXTS)
    assert capsys.readouterr().out.count("cannot be written") == 1
    assert encodings.used == Used(found=3, made=5)
    assert len(list(tmp_path.glob("*/*"))) == 1


def test_a_folder_that_cannot_be_made_stops_encoding_ahead_but_not_encoding(
    models: Models, drawn: list[PixelExample], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    keeper, _ = keeping(models, tmp_path / "file" / "kept")
    assert torch.equal(keeper.encode_text(TEXTS)[0], models.encode_text(TEXTS)[0])
    with pytest.raises(UserError, match="nothing more can be stored"):
        encode_all(keeper, drawn, text_only=False)


def test_batches_are_the_same_whatever_part_of_them_is_found(
    models: Models, drawn: list[PixelExample], tmp_path: Path
) -> None:
    keeper, _ = keeping(models, tmp_path)
    cold = encode(keeper, drawn, seed=0)
    stored = sorted(entries(tmp_path))
    for path in stored[::2]:
        path.unlink()
    half = encode(keeper, drawn[2:5], seed=0) + encode(keeper, drawn, seed=0)
    keeper, encodings = keeping(models, tmp_path)
    warm = encode(keeper, drawn, seed=0)
    assert encodings.used.made == 0
    plain = encode(models, drawn, seed=0)
    for one, again, found, never in zip(cold, half[-len(cold) :], warm, plain, strict=True):
        for first, *others in zip(*map(tensors, (one, again, found, never)), strict=True):
            assert torch.equal(first, others[0])
            assert torch.equal(first, others[1])
            torch.testing.assert_close(first, others[2], atol=1e-4, rtol=1e-4)  # its batches round


def losses(models: Models, run: Run, drawn: list[PixelExample]) -> list[float]:
    """Of a new adapter that is trained on one example a step."""
    transformer = deepcopy(models.transformer)
    injection.attach(transformer, run.adapter, seed=0)
    optimiser = torch.optim.AdamW(injection.trainable(transformer).values(), lr=0.01)
    loss_of = GridLoss(transformer, context_weight=1, guidance=1.0)
    found = []
    for one in drawn:
        loss = loss_of(encode(models, [one], seed=0)).mean()
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        found.append(loss.item())
    return found


def test_a_run_of_batches_of_one_has_the_same_losses_with_and_without(
    models: Models, run: Run, drawn: list[PixelExample], tmp_path: Path
) -> None:
    plain = losses(models, run, drawn[:3])
    for _ in ("cold", "warm"):
        keeper, encodings = keeping(models, tmp_path)
        assert losses(keeper, run, drawn[:3]) == plain
    assert encodings.used.made == 0
    assert len(set(plain)) == len(plain)


def test_what_is_encoded_ahead_is_what_training_asks_for(
    micro_model: Path, models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    of_run = ["--model", str(micro_model), "--tasks", "depth-to-image", "--steps", "3"]
    of_run += ["--batch", "2", "--processes", "1"]
    main(["data", "cache", *of_run, "--output", str(tmp_path / "kept")])
    assert "6 examples" in capsys.readouterr().out
    main(["data", "cache", *of_run, "--output", str(tmp_path / "kept")])
    assert ", 0 made" in capsys.readouterr().out
    run = load_run(None, [f"model={micro_model}", "data.tasks=depth-to-image", "batch=2"])
    mixture = run_data.mixture_of(run)
    assert length_of(run.model_copy(update={"steps": 3}), mixture, processes=1) == 6
    draws = PixelDataset(mixture)
    keeper, encodings = keeping(models, tmp_path / "kept")
    for first in (0, 2, 4):
        encode(
            keeper,
            [one for k in (0, 1) if isinstance(one := draws[first + k], PixelExample)],
            seed=0,
        )
    assert encodings.used.made == 0


def test_texts_alone_are_encoded_ahead_where_asked(
    models: Models, drawn: list[PixelExample], tmp_path: Path
) -> None:
    keeper, encodings = keeping(models, tmp_path)
    encode_all(keeper, drawn, text_only=True)
    keeper.encode_text([one.prompt for one in drawn])
    texts = {str(one.prompt) for one in drawn}
    assert encodings.used.made == len(list(entries(tmp_path))) == 2 * len(texts)


def test_a_file_in_place_of_the_folder_is_refused_before_weights_are_read(
    hollow_model: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    (tmp_path / "file").touch()
    words = ["train", "--model", hollow_model, "--output", tmp_path / "run"]
    assert "no folder" in refused(*words, "--set", f"data.embedding_cache={tmp_path / 'file'}")
    assert not (tmp_path / "run").exists()


def test_run_names_a_folder_of_the_run(tmp_path: Path) -> None:
    run = load_run(None, [f"output={tmp_path}", "data.embedding_cache=run"])
    assert run_folder.encodings_folder(run) == tmp_path / run_folder.ENCODINGS
    assert run_folder.encodings_folder(load_run(None)) is None


def test_a_run_may_go_on_with_encodings_or_without(tmp_path: Path) -> None:
    before = load_run(None, [f"output={tmp_path}"])
    write_run(before, tmp_path / run_folder.SETTINGS)
    now = load_run(
        None, [f"output={tmp_path}", "data.embedding_cache=run", "offload_encoders=true"]
    )
    plan = preparation.plan_of(now, run_data.mixture_of(now), processes=1)
    resume.check_resumed(now, Progress(step=2, examples=2, seed=0, global_batch=1), plan, ())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_encoders_that_rest_in_main_memory_give_the_same(micro_model: Path) -> None:
    there = load_models(str(micro_model), device="cuda")
    resting = load_models(str(micro_model), device="cuda", rest="cpu")
    for ours, theirs in zip(resting.encode_text(TEXTS), there.encode_text(TEXTS), strict=True):
        assert ours.device == theirs.device
        assert torch.equal(ours, theirs)
    latents = resting.encode_pixels(strips(1))
    assert torch.equal(latents, there.encode_pixels(strips(1)))
    assert torch.equal(resting.decode_latents(latents), there.decode_latents(latents))
    networks = (resting.vae, resting.text_encoder, resting.text_encoder_2)
    assert {str(one.device) for one in networks} == {"cpu"}
