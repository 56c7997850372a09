"""Learning one thing from a few photos: pairs, hold-out, names, prior preservation, refusals."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import run, vcdeft
from safetensors.torch import load_file
from test_left_out import lines
from test_sources import one_line, paint, real_data, write

from visualcloze_deft.adapters import files
from visualcloze_deft.cli import main
from visualcloze_deft.config.run_settings import Run, config_for, load_run
from visualcloze_deft.data.base import Part
from visualcloze_deft.data.eligible import EligibleItems
from visualcloze_deft.data.mixture import Mixture
from visualcloze_deft.data.sources.photos import MOST, Photos
from visualcloze_deft.data.subject import ANOTHER, PHRASINGS, Named, Naming
from visualcloze_deft.errors import UserError
from visualcloze_deft.training.resume import check_items
from visualcloze_deft.training.run_data import mixture_of
from visualcloze_deft.training.run_folder import describe
from visualcloze_deft.training.subject import CLASS, check_subject

ROLES = ["reference", "target"]
PAGE = Path(__file__).parents[1] / "docs" / "subject.md"


def shade(number: int) -> str:
    return f"rgb({20 * number},0,0)"


def photos(folder: Path, count: int) -> Path:
    """`count` photos, each of a shade of its own."""
    for k in range(count):
        paint(folder / f"IMG {k:02}.png", shade(k), (32, 32))
    return folder


def learning(place: Path, *more: str) -> Run:
    """A run on the photos in a folder, without a hold-out, its texts in all words."""
    plain = ["data.validation_every=0", "data.resolution=32"]
    plain += ["data.recipe.run_length=1", "data.recipe.paraphrase=1"]
    return load_run("subject", [f'data.sources=["photos={place}"]', *plain, *more])


# ---- the source


def test_every_ordered_pair_of_photos_is_an_item_with_the_caption_of_its_target(
    tmp_path: Path,
) -> None:
    for name in ("DSC1.JPG", "b.png", "c d.webp"):
        paint(tmp_path / name)
    write(tmp_path / "b.txt", "on a\n  chair \n")
    source = Photos(tmp_path)
    items = [source.item(k) for k in range(len(source))]
    assert len({item.key for item in items}) == len(items) == 6
    assert Counter(item.texts.get("caption") for item in items) == {None: 4, "on a chair": 2}
    assert all(item.key.endswith("-b") for item in items if item.texts)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "two or more photos of one thing; found nothing"),
        (["a.png"], "two or more photos of one thing; found a.png"),
        (["dog/a.png", "dog/b.png"], "two or more photos of one thing; found dog"),
        (["a.png", "a.jpg"], "a.png: a.jpg has the same stem"),
    ],
)
def test_a_folder_without_two_photos_is_refused(
    tmp_path: Path, names: list[str], message: str
) -> None:
    for name in names:
        paint(tmp_path / name)
    with pytest.raises(UserError, match=message) as raised:
        Photos(tmp_path)
    one_line(raised)


def test_a_photo_that_is_none_is_named_before_anything_is_drawn(tmp_path: Path) -> None:
    write(photos(tmp_path, 2) / "c.jpg", "no picture")
    with pytest.raises(UserError, match=r"c\.jpg: not an image that can be read"):
        Photos(tmp_path)


def test_a_folder_of_many_things_is_refused(tmp_path: Path) -> None:
    for k in range(MOST + 1):
        (tmp_path / f"{k}.png").touch()
    with pytest.raises(UserError, match=f"{MOST + 1} photos; expected at most {MOST}"):
        Photos(tmp_path)


def test_captions_without_a_photo_are_named(tmp_path: Path) -> None:
    write(photos(tmp_path, 2) / "IMG_9.txt", "asleep")
    assert "IMG_9.txt: no photo of that name" in lines(f"photos={tmp_path}")


# ---- hold-out, and what a grid shows


@pytest.mark.parametrize("every", [2, 5, 10])
@pytest.mark.parametrize("count", [3, 4, 9, 30])
def test_a_held_out_photo_is_in_no_training_item_and_some_are_held_out(
    tmp_path: Path, count: int, every: int
) -> None:
    source = Photos(photos(tmp_path, count))
    trained, asked = (Part(source, every=every, held_out=kept) for kept in (False, True))
    kept = set(asked.photos[:, 1].tolist())
    assert len(kept) == max(count // every, 1)
    assert kept | set(asked.photos[:, 0].tolist()) == set(range(count))
    assert set(trained.photos.flatten().tolist()) == set(range(count)) - kept
    assert not kept & set(asked.photos[:, 0].tolist())  # references are those that are trained on


@pytest.mark.parametrize("count", [2, 3, 4, 7])
def test_no_grid_shows_a_photo_of_its_query_twice(tmp_path: Path, count: int) -> None:
    able = EligibleItems(Photos(photos(tmp_path, count)), ROLES)
    for seed in range(50):
        *shown, query = able.choose(3, np.random.default_rng(seed))
        assert len(shown) == (2 if count > 3 else 0)
        assert not np.isin(able.photos[shown], able.photos[query]).any()
        others = list(able.others([query], np.random.default_rng(seed)))
        assert len(others) == (count - 2) * (count - 3)


def test_two_photos_leave_nothing_to_hold_out(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no pair would be left to train on; give 0"):
        mixture_of(learning(photos(tmp_path, 2), "data.validation_every=5"))


@pytest.mark.parametrize("count", [3, 30])
def test_the_shipped_settings_hold_for_few_and_many_photos(tmp_path: Path, count: int) -> None:
    place = photos(tmp_path, count)
    settings = load_run(config_for(None, [f"photos={place}"]), [f'data.sources=["photos={place}"]'])
    for kept in (False, True):
        assert mixture_of(settings, held_out=kept)[0].task == "subject-driven"


# ---- names


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a dog on grass", "a sks dog on grass"),
        ("Dog, asleep", "sks Dog, asleep"),
        ("a hotdog on grass", "sks dog, a hotdog on grass"),
        ("sks in the sun", "sks in the sun"),
    ],
)
def test_a_caption_names_the_subject_once(caption: str, expected: str) -> None:
    naming = Naming(trigger="sks", class_word="dog")
    assert naming.caption(caption) == naming.caption(naming.caption(caption)) == expected


def test_a_photo_without_caption_is_called_in_several_ways(tmp_path: Path) -> None:
    place = photos(tmp_path, 4)
    name = ["subject.trigger=sks", "subject.class_word=dog", "data.recipe.caption_dropout=0"]
    drawn = mixture_of(learning(place, *name, "data.recipe.keep_content=1"))
    said = Counter(drawn[k].content for k in range(60))
    assert set(said) == {phrase.replace("{}", "sks dog") for phrase in PHRASINGS}
    usual = mixture_of(
        learning(place, *name, "data.recipe.keep_content=1", "data.recipe.paraphrase=0")
    )
    assert {usual[k].content for k in range(20)} == {"a photo of sks dog"}


def test_without_a_name_captions_stay_and_nothing_is_made_up(tmp_path: Path) -> None:
    write(photos(tmp_path, 2) / "IMG 01.txt", "on a chair")
    source = Named(Photos(tmp_path), Naming())
    assert [source.item(k).texts for k in range(2)] == [{}, {"caption": "on a chair"}]


def test_a_grid_that_is_written_says_the_words_of_the_command(tmp_path: Path) -> None:
    place, output = photos(tmp_path / "dog", 4), tmp_path / "grids"
    words = f"tasks example subject-driven --resolution 32 --data photos={place} --output {output}"
    main([*words.split(), "--content", "sks dog asleep"])
    (grid,) = json.loads((output / "grid.json").read_text())
    assert grid["content_prompt"] == "sks dog asleep"
    assert [len(row) for row in grid["rows"]] == [2, 2]


def test_a_check_of_photos_names_the_command_that_learns_the_thing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    photos(tmp_path / "dog", 3)
    monkeypatch.chdir(tmp_path)
    main(["data", "check", "photos=dog", "--workers", "0"])
    said = capsys.readouterr().out
    assert said.endswith("\n  vcdeft train --data photos=dog --output runs/dog\n")


# ---- prior preservation


def preserving(place: Path, others: str, *more: str) -> Mixture:
    return mixture_of(learning(place, f"subject.class_data={others}", "seed=3", *more))


def shades(mixture: Mixture, index: int) -> set[tuple[int, ...]]:
    return {cell.getpixel((9, 9)) for row in mixture[index].complete for cell in row}


@pytest.mark.parametrize(("weight", "share"), [("auto", 1 / 2), ("0.25", 1 / 5), ("3", 3 / 4)])
def test_the_weight_of_the_class_is_its_share_of_any_stretch_of_examples(
    tmp_path: Path, weight: str, share: float
) -> None:
    place = photos(tmp_path / "dog", 4)
    drawn = preserving(place, "scenes", f"subject.class_weight={weight}")
    for start in (0, 7, 100):
        taken = sum(drawn.prior.takes(k) for k in range(start, start + 20))
        assert abs(taken - 20 * share) <= 1
    assert [drawn[k].task == CLASS for k in range(6)] == [drawn.prior.takes(k) for k in range(6)]


def test_prior_preservation_leaves_the_examples_of_the_subject_as_they_were(
    tmp_path: Path,
) -> None:
    place = photos(tmp_path / "dog", 5)
    with_class, alone = preserving(place, "scenes"), mixture_of(learning(place, "seed=3"))
    for k in range(12):
        if not with_class.prior.takes(k):
            assert with_class[k] == alone[k]
        assert with_class[k] == preserving(place, "scenes")[k]  # whatever was drawn before


def test_single_pictures_of_the_class_are_paired_with_others_and_said_so(tmp_path: Path) -> None:
    place = photos(tmp_path / "dog", 4)
    for k in range(6):
        paint(tmp_path / "dogs" / "target" / f"{k}.png", f"rgb(0,{30 * k},99)", (32, 32))
    drawn = preserving(place, f"folder={tmp_path / 'dogs'}", "subject.class_word=dog")
    of_class = [k for k in range(40) if drawn.prior.takes(k)]
    for k in of_class:
        example = drawn[k]
        *_, query = [{cell.getpixel((9, 9)) for cell in row} for row in example.complete]
        assert len(query) == 2
        assert all(blue == 99 for _, _, blue in shades(drawn, k))
        assert not example.task_sentence or "not the same one" in example.task_sentence
    assert drawn.prior.mixture.tasks[CLASS].roles == (ANOTHER, "target")
    said = {drawn[k].content for k in of_class} - {""}
    assert said == {phrase.replace("{}", "a dog") for phrase in PHRASINGS}


# ---- refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["subject.trigger=s\x07ks"], "subject.trigger = 's\\x07ks': expected a word or two"),
        (['subject.trigger=" "'], "subject.trigger = ' ': expected a word or two"),
        ([f"subject.class_word={'x' * 61}"], "expected a word or two on one line, up to 60"),
        (["subject.class_weight=2"], "no pictures of the class are there"),
        (["subject.class_weight=0"], "subject.class_weight = 0: "),
        (["subject.class_data=folder=EMPTY"], "EMPTY: expected a table"),
        (["subject.class_data=photos=DOG"], "holds the subject's own photos"),
        (["subject.class_data=dreambooth=ABOVE"], "holds the subject's own photos"),
        (["subject.class_data=nothing=here"], "unknown data source 'nothing'"),
        (["subject.class_data=dreambench-plus=BENCH"], "has 0 pictures of the class"),
    ],
)
def test_what_cannot_be_learned_is_one_line(
    tmp_path: Path, refused: Callable[..., str], settings: list[str], message: str
) -> None:
    place = photos(tmp_path / "dog", 3)
    (tmp_path / "empty").mkdir()
    paint(tmp_path / "bench/images/0.jpg")
    write(tmp_path / "bench/captions/0.txt", "fox\na fox at sea\n")
    places = {
        "EMPTY": tmp_path / "empty",
        "DOG": place,
        "ABOVE": tmp_path,
        "BENCH": tmp_path / "bench",
    }
    for name, folder in places.items():
        settings = [setting.replace(name, str(folder)) for setting in settings]
        message = message.replace(name, str(folder))
    words = [word for setting in settings for word in ("--set", setting)]
    output = tmp_path / "run"
    said = refused("train", "--data", f"photos={place}", "--output", output, *words)
    assert message in said
    assert not output.exists()


def test_a_name_without_photos_is_refused() -> None:
    with pytest.raises(UserError, match="no photos of a subject are trained on; name their folder"):
        check_subject(load_run("tiny", ["subject.trigger=sks"]))


# ---- runs


def test_a_run_does_not_go_on_with_photos_that_came_or_went(tmp_path: Path) -> None:
    place = photos(tmp_path / "dog", 5)
    run = learning(place, "data.validation_every=2")
    describe(run, mixture_of(run), tmp_path / "run")
    check_items(mixture_of(run), tmp_path / "run")
    (place / "another.png").write_bytes(next(place.glob("*.png")).read_bytes())
    with pytest.raises(UserError, match="photos has 30 items, and had 20 when"):
        check_items(mixture_of(run), tmp_path / "run")


@pytest.mark.processes
def test_a_run_with_prior_preservation_goes_on_to_the_same_adapter(
    micro_model: Path, tmp_path: Path
) -> None:
    place = photos(tmp_path / "dog", 5)
    words = f"--model {micro_model} --rank 2 --steps 4 --batch 3 --output {tmp_path / 'whole'}"
    sets = "class_data=scenes trigger=sks".split()
    more = [f"subject.{one}" for one in sets] + ["save_every=2", "data.resolution=32"]
    options = [*words.split(), *(word for one in more for word in ("--set", one))]
    run(["train", "--config", "subject", "--data", f"photos={place}", *options])
    stopped = tmp_path / "stopped"
    shutil.copytree(tmp_path / "whole", stopped)
    shutil.rmtree(stopped / "adapter")
    (last,) = (stopped / "checkpoints").glob("step-*4")
    shutil.rmtree(last)
    run(["train", "--output", stopped, "--resume"])
    expected, found = (
        load_file(folder / "adapter" / files.WEIGHTS) for folder in (tmp_path / "whole", stopped)
    )
    assert all(torch.equal(expected[name], tensor) for name, tensor in found.items())


def commands(page: Path) -> list[str]:
    """The commands in the blocks of a page for a shell."""
    blocks = page.read_text(encoding="utf-8").split("```bash\n")[1:]
    text = "".join(block.partition("```")[0] for block in blocks).replace("\\\n", " ")
    return [line.partition("  #")[0] for line in text.splitlines() if line.startswith("vcdeft")]


@pytest.mark.processes
@real_data
def test_the_page_leads_from_photos_to_an_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its commands as they stand there, with fewer steps."""
    subjects = Path(os.environ["VCDEFT_DATA"]) / "dreambooth" / "dataset"
    shutil.copytree(subjects / "dog", tmp_path / "dog")
    (tmp_path / "dogs").mkdir()
    for name in ("cat", "teapot", "backpack"):
        shutil.copy(subjects / name / "00.jpg", tmp_path / "dogs" / f"{name}.jpg")
    grid = PAGE.read_text(encoding="utf-8").split("```json\n")[1].partition("```")[0]
    write(tmp_path / "dog.json", grid)
    monkeypatch.chdir(tmp_path)
    smaller = {
        "train": "--steps 2 --batch 1 --processes 1 --set sample_grids=0",
        "infer": "--inference-steps 1",
    }
    own = "vcdeft infer --examples dog.json --adapter runs/dog --output own-images"
    for line in [*commands(PAGE), own]:
        _, *words = shlex.split(line)
        done = vcdeft(*words, *smaller.get(words[0], "").split())
        assert done.returncode == 0, done.stderr[-2000:]
    for image in ("dog-images/grid-001.png", "own-images/001.png"):
        assert (tmp_path / image).is_file()
    assert (tmp_path / "runs" / "dog-prior" / "adapter").is_dir()
