"""`vcdeft data caption` writes the model's own words where the source reads them, and leaves what a
person wrote alone."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hub_cache import COMMIT, in_hub_cache
from PIL import Image
from test_folder_layouts import CAPTIONS, LAYOUTS, PAIRS, put
from tiny_captioner import write_captioner
from transformers import AutoModelForImageTextToText, AutoProcessor

from visualcloze_deft.cli import main
from visualcloze_deft.data.annotation.caption_models import (
    MOST_TOKENS,
    PROMPT,
    load_captioner,
    whole_sentences,
)
from visualcloze_deft.data.sources.folder import Folder
from visualcloze_deft.data.sources.scenes import Scenes

Refused = Callable[..., str]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_captioner(tmp_path_factory.mktemp("models") / "llava")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return write_photos(tmp_path / "photos", 3)


def write_photos(root: Path, count: int) -> Path:
    root.mkdir()
    scenes = Scenes(size=48, seed=3)
    for k in range(count):
        scenes.item(k).image("target").save(root / f"{k}.png")
    return root


def caption(folder: Path, model: Path | str, *options: str) -> int:
    try:
        main(["data", "caption", f"folder={folder}", "--model", str(model), *options])
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def texts(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted(folder.glob("*.txt"))}


def test_a_caption_is_the_models_own_greedy_answer(photos: Path, model: Path) -> None:
    processor = AutoProcessor.from_pretrained(model)
    network = AutoModelForImageTextToText.from_pretrained(model)
    picture = Image.open(photos / "1.png")
    asked = processor(
        images=picture, text=f"user: <image>{PROMPT} assistant: ", return_tensors="pt"
    )
    with torch.no_grad():
        answer = network.generate(**asked, do_sample=False, max_new_tokens=MOST_TOKENS)[0]
    said = processor.decode(answer[asked["input_ids"].shape[1] :], skip_special_tokens=True)
    assert caption(photos, model) == 0
    assert texts(photos)["1.txt"] == whole_sentences(said) + "\n"
    assert len({*texts(photos).values()}) == 3
    assert [Folder(photos).item(k).texts["caption"] for k in range(3)] == [
        text.strip() for text in texts(photos).values()
    ]


def test_captions_hang_on_the_prompt_and_not_on_the_batch(photos: Path, model: Path) -> None:
    pictures = [Folder(photos).item(k).image("target") for k in range(3)]
    asked, other = (
        load_captioner(str(model), prompt=prompt, device="cpu") for prompt in (None, "Colours?")
    )
    together = asked.captions(pictures)
    assert [asked.captions([picture])[0] for picture in pictures] == together
    assert other.captions(pictures) != together


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_caption_is_written_where_the_source_reads_it(
    tmp_path: Path, model: Path, layout: str
) -> None:
    LAYOUTS[layout](tmp_path, PAIRS, dict.fromkeys(CAPTIONS, ""))
    for path in tmp_path.rglob("*.txt"):
        path.unlink()
    assert caption(tmp_path, model) == 0
    source = Folder(tmp_path)
    assert len({source.item(k).texts["caption"] for k in range(3)}) == 3
    before = {path: path.read_text() for path in tmp_path.rglob("*.txt")}
    assert len(before) == 3
    assert caption(tmp_path, model) == 0
    assert before == {path: path.read_text() for path in tmp_path.rglob("*.txt")}


def test_what_a_person_wrote_stays_and_a_second_command_makes_what_lacks(
    photos: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    caption(photos, model)
    first = texts(photos)
    put(photos / "0.txt", "my dog")
    (photos / "1.txt").unlink()
    put(photos / "2.txt", "")  # emptied on purpose
    capsys.readouterr()
    assert caption(photos, model, "--batch", "1") == 0
    assert "1 captions made, 2 were there" in capsys.readouterr().out
    assert texts(photos) == {"0.txt": "my dog", "1.txt": first["1.txt"], "2.txt": ""}
    assert caption(photos, model, "--overwrite") == 0
    assert texts(photos) == first


def test_texts_of_a_table_stay_where_they_are(
    photos: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"target": "0.png", "caption": "mine"}, {"target": "1.png"}, {"target": "1.png"}]
    put(photos / "rows.jsonl", "\n".join(map(json.dumps, rows)))
    assert caption(photos, model, "--overwrite") == 0
    assert "1 captions made, 1 were there" in capsys.readouterr().out
    assert [*texts(photos)] == ["1.txt"]


def test_an_output_folder_gets_all_captions_and_holds_nothing_else(
    photos: Path,
    model: Path,
    tmp_path: Path,
    refused: Refused,
    capsys: pytest.CaptureFixture[str],
) -> None:
    put(photos / "0.txt", "mine")
    assert caption(photos, model, "--output", str(photos / "caption")) == 0
    assert [*texts(photos / "caption")] == ["0.txt", "1.txt", "2.txt"]
    assert texts(photos) == {"0.txt": "mine"}
    assert Folder(photos).item(0).texts["caption"] == "mine"
    assert Folder(photos).item(1).texts["caption"] + "\n" == texts(photos / "caption")["1.txt"]
    put(tmp_path / "other" / "notes.md", "mine")
    words = ["data", "caption", f"folder={photos}", "--model", str(model)]
    capsys.readouterr()
    assert "holds 'notes.md'" in refused(*words, "--output", str(tmp_path / "other"))


def test_a_broken_picture_leaves_the_others_their_captions(
    photos: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(photos / "1.png", b"")
    assert caption(photos, model, "--batch", "3") == 1
    shown = capsys.readouterr()
    assert "broken: 1: " in shown.err
    assert "1.png: an empty file" in shown.err
    assert [*texts(photos)] == ["0.txt", "2.txt"]


def test_a_model_that_cannot_caption_is_one_line_and_nothing_is_written(
    photos: Path, model: Path, tmp_path: Path, refused: Refused
) -> None:
    def line(place: Path | str) -> str:
        said = refused("data", "caption", f"folder={photos}", "--model", str(place))
        assert [path.name for path in sorted(photos.iterdir())] == ["0.png", "1.png", "2.png"]
        return said

    assert "no such folder" in line("nowhere")
    assert "no config.json" in line(photos)
    spoiled = shutil.copytree(model, tmp_path / "spoiled")
    config = json.loads((spoiled / "config.json").read_text())
    put(spoiled / "config.json", json.dumps({**config, "model_type": "dpt"}))
    assert "model_type 'dpt', which gives no text" in line(spoiled)
    put(spoiled / "config.json", json.dumps(config))
    put(spoiled / "chat_template.jinja", "{{ messages[0]['content'] + 1 }}")
    assert "takes no image and question" in line(spoiled)
    (spoiled / "tokenizer.json").unlink()
    assert "cannot be loaded" in line(spoiled)
    (spoiled / "model.safetensors").rename(spoiled / "pytorch_model.bin")
    assert "no *.safetensors" in line(spoiled)
    assert "folder=PATH alone" in refused("data", "caption", "scenes", "--model", str(model))


def test_a_source_without_targets_has_nothing_to_caption(
    tmp_path: Path, model: Path, refused: Refused
) -> None:
    for role in ("lit", "unlit"):
        (tmp_path / role).mkdir()
        write_photos(tmp_path / role / "x", 0)
        Image.new("RGB", (8, 8)).save(tmp_path / role / "0.png")
    said = refused("data", "caption", f"folder={tmp_path}", "--model", str(model))
    assert "no item has a target" in said


def test_a_revision_of_a_hub_id_stands_behind_it(
    photos: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_hub_cache(model, "someone/words", tmp_path / "cache", monkeypatch)
    assert caption(photos, f"someone/words@{COMMIT}") == 0
    there = texts(photos)
    assert caption(photos, model, "--overwrite") == 0
    assert texts(photos) == there


@pytest.mark.processes
def test_a_killed_command_goes_on(tmp_path: Path, model: Path) -> None:
    photos = write_photos(tmp_path / "photos", 40)
    whole = shutil.copytree(photos, tmp_path / "whole")
    words = ["data", "caption", f"folder={photos}", "--model", str(model), "--batch", "1"]
    command = subprocess.Popen([sys.executable, "-m", "visualcloze_deft", *words])
    while not texts(photos):
        time.sleep(0.01)
        assert command.poll() is None
    command.send_signal(signal.SIGKILL)
    command.wait()
    there = texts(photos)
    assert 0 < len(there) < 40
    put(photos / ".39.txt.1-ab.part", "half")
    assert caption(photos, model) == 0
    assert caption(whole, model) == 0
    assert texts(photos) == texts(whole)
    assert there.items() <= texts(photos).items()
    assert not [*photos.glob(".*")]
