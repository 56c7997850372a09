"""A checkpoint is there whole or not at all, and a damaged one costs no more than itself."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from visualcloze_deft.errors import UserError
from visualcloze_deft.training.checkpoint import MOMENTS, PROGRESS, Progress, newest, publish, save

ADAPTER = "adapter_model.safetensors"


def progress(step: int) -> Progress:
    return Progress(step=step, examples=8 * step, seed=3, global_batch=8)


def moments(step: int) -> dict[str, torch.Tensor]:
    return {"a.exp_avg": torch.full((2, 3), float(step)), "b.exp_avg": torch.arange(4.0)}


def saved(folder: Path, *steps: int) -> list[Path]:
    return [
        save(
            folder,
            progress(step),
            moments(step),
            lambda at: write(at / ADAPTER, b"weights"),
            keep=2,
        )
        for step in steps
    ]


def write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def test_what_is_saved_is_what_is_read(tmp_path: Path) -> None:
    [folder] = saved(tmp_path, 5)
    found, warnings = newest(tmp_path)
    assert warnings == []
    assert found.folder == folder
    assert found.progress == progress(5)
    assert (found.folder / ADAPTER).read_bytes() == b"weights"
    read = found.moments()
    assert set(read) == set(moments(5))
    assert all(torch.equal(read[name], tensor) for name, tensor in moments(5).items())


def test_the_newest_two_are_kept(tmp_path: Path) -> None:
    folders = saved(tmp_path, 1, 9, 10)
    assert sorted(tmp_path.iterdir()) == folders[1:]
    assert newest(tmp_path)[0].progress == progress(10)


def test_newest_goes_by_number_also_beyond_a_million_steps(tmp_path: Path) -> None:
    saved(tmp_path, 999_998, 999_999, 1_000_000)
    assert newest(tmp_path)[0].progress == progress(1_000_000)


@pytest.mark.parametrize("name", [MOMENTS, PROGRESS, ADAPTER])
@pytest.mark.parametrize(
    "damage",
    [
        Path.unlink,
        lambda path: write(path, b""),
        lambda path: write(path, path.read_bytes()[:-5]),
        lambda path: write(path, bytes(path.stat().st_size)),
        lambda path: write(path, b"null"),
        lambda path: write(path, b"[]"),
        lambda path: (path.unlink(), os.mkfifo(path)),
    ],
    ids=["gone", "empty", "cut", "zeros", "null", "list", "pipe"],
)
def test_a_damaged_newest_gives_way_to_an_older_one_with_a_warning(
    tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    older, last = saved(tmp_path, 1, 2)
    damage(last / name)
    found, [warning] = newest(tmp_path)
    assert found.folder == older
    assert found.progress == progress(1)
    assert str(last) in warning
    assert "\n" not in warning


def test_what_was_just_saved_stays_beside_damaged_ones_of_higher_numbers(tmp_path: Path) -> None:
    for folder in saved(tmp_path, 8, 9):
        (folder / MOMENTS).unlink()
    (last,) = saved(tmp_path, 5)
    assert newest(tmp_path)[0].folder == last


@pytest.mark.parametrize("steps", [(), (1, 2)], ids=["none", "all damaged"])
def test_without_a_good_checkpoint_the_folder_is_named(
    tmp_path: Path, steps: tuple[int, ...]
) -> None:
    for folder in saved(tmp_path, *steps):
        (folder / MOMENTS).unlink()
    words = r"no good checkpoint.*2 damaged" if steps else "no checkpoint"
    with pytest.raises(UserError, match=words) as raised:
        newest(tmp_path)
    assert str(tmp_path) in str(raised.value)


def test_a_folder_that_is_not_there_has_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint"):
        newest(tmp_path / "gone")


def interrupted(folder: Path) -> None:
    write(folder / ADAPTER, b"half")
    raise KeyboardInterrupt


def test_an_interrupted_save_leaves_no_checkpoint_and_does_not_disturb_the_next(
    tmp_path: Path,
) -> None:
    saved(tmp_path, 1)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, progress(2), moments(2), interrupted, keep=2)
    assert newest(tmp_path)[0].progress == progress(1)
    saved(tmp_path, 2)
    found, warnings = newest(tmp_path)
    assert (found.progress, warnings) == (progress(2), [])
    assert (found.folder / ADAPTER).read_bytes() == b"weights"


def test_a_step_can_be_saved_again(tmp_path: Path) -> None:
    saved(tmp_path, 2)
    [folder] = saved(tmp_path, 2)
    assert sorted(tmp_path.iterdir()) == [folder]
    assert newest(tmp_path)[0].progress == progress(2)


def test_publish_replaces_a_folder_and_all_that_it_held(tmp_path: Path) -> None:
    final, staging = tmp_path / "adapter", tmp_path / ".adapter.part"
    for folder, name in ((final, "old"), (staging, "new")):
        folder.mkdir()
        write(folder / name, b"")
    publish(staging, final)
    assert [path.name for path in tmp_path.rglob("*")] == ["adapter", "new"]


def test_no_flipped_bit_of_the_progress_is_read_as_another_one(tmp_path: Path) -> None:
    """Spaces may become others; what is said stays, or the checkpoint is damaged."""
    (folder,) = saved(tmp_path, 5)
    file = folder / PROGRESS
    content = file.read_bytes()
    for place in range(len(content)):
        for bit in range(8):
            changed = bytearray(content)
            changed[place] ^= 1 << bit
            file.write_bytes(changed)
            try:
                found, _ = newest(tmp_path)
            except UserError:
                continue
            assert found.progress == progress(5)


def test_what_others_may_read_is_what_the_umask_says(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        (folder,) = saved(tmp_path, 5)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o640}
