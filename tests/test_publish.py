"""A run as a repository of the hub: what is in it, what must not be, and the upload."""

from __future__ import annotations

import getpass
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from hub_server import Hub, Repository, hub_server, use
from huggingface_hub import ModelCard
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from visualcloze_deft.adapters import files, injection, verify
from visualcloze_deft.backbones.peft_files import WEIGHTS, read_metadata
from visualcloze_deft.cli import main
from visualcloze_deft.config.run_settings import Run, Subject, load_run, parse_run, write_run
from visualcloze_deft.errors import UserError
from visualcloze_deft.publishing import bases, privacy
from visualcloze_deft.reporting.contact_sheet import write_preview
from visualcloze_deft.storage.adapter_places import CONFIG
from visualcloze_deft.storage.tensor_headers import copy_with_texts
from visualcloze_deft.training import run_data, run_folder

Refused = Callable[..., str]
TASK = """
summary = "A street at night."
group = "relighting"
instruction = "From the {day} to the {target}."
content = ""
[columns]
day = "street by day"
target = "street by night"
"""


def settings(place: Path, model: Path) -> Run:
    """Of a run on a person's own task and pictures, with paths wherever there can be one."""
    for role in ("day", "target"):
        (place / "photos" / role).mkdir(parents=True)
        for k in range(2):
            Image.new("RGB", (32, 32), "red").save(place / "photos" / role / f"{k}.png")
    (place / "own").mkdir()
    (place / "own/relight.toml").write_text(TASK)
    data = {"sources": [f"folder={place / 'photos'}"], "tasks": "relight", "resolution": 32}
    data["task_folders"] = [str(place / "own")]
    options = {"wandb": {"entity": "our-lab", "dir": str(place)}}
    return parse_run(
        {
            "model": str(model),
            "output": str(place / "run"),
            "data": data,
            "adapter": {"rank": 3},
            "logging": {"tracker_options": options},
        },
        where="test",
    )


def write_adapter(run: Run, folder: Path) -> None:
    transformer = FluxTransformer2DModel.from_pretrained(run.model, subfolder="transformer")
    injection.attach(transformer, run.adapter, seed=0)
    torch.manual_seed(1)
    for parameter in injection.trainable(transformer).values():
        parameter.data += 0.2 * torch.randn_like(parameter)
    told = run_folder.adapter_metadata(run, 4, attention="native", base=run_folder.base_of(run)) | {
        "layers": f"those of {folder.parent / 'before'}"
    }
    folder.mkdir()
    files.save(transformer, folder, base=run.model, metadata=told)
    shutil.copytree(folder.parent / "tasks", folder / "tasks")


@pytest.fixture(scope="module")
def trained(micro_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder as `vcdeft train` leaves it."""
    run = settings(tmp_path_factory.mktemp("trained"), micro_model)
    folder = Path(run.output)
    run_folder.describe(run, run_data.mixture_of(run), folder)
    write_adapter(run, folder / "adapter")
    step: dict[str, Any] = {"step": 4, "examples": 8, "seconds": 1.0, "loss": 0.5}
    run_folder.append_line(folder / "metrics.jsonl", step | {"tasks": {"relight": 0.5}})
    for at, loss in ((0, 0.75), (4, 0.25)):
        line = {"step": at, "loss": loss, "tasks": {"relight": loss}, "times": {}}
        run_folder.append_line(folder / "evaluation.jsonl", line)
    (folder / "sheets").mkdir()
    sheet = Image.new("RGB", (2000, 400), "blue")
    write_preview(sheet, folder / "sheets/step-000004.png", of=f"a run in {folder}")
    return folder


def publish(run: Path, *more: object, repo: str = "me/relight") -> None:
    main(["publish", str(run), "--repo", repo, *map(str, more)])


@pytest.fixture(scope="module")
def published(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a dry run writes, of all formats."""
    folder = tmp_path_factory.mktemp("published") / "me" / "relight"
    kinds = [word for kind in ("diffusers", "comfyui", "kohya") for word in ("--format", kind)]
    publish(trained, "--dry-run", folder, "--with-pictures", *kinds)
    return folder


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained, tmp_path / "run")


# ---- what is in it


def test_it_holds_the_adapter_its_tasks_a_lora_for_each_tool_and_a_card(published: Path) -> None:
    found = {p.relative_to(published).as_posix() for p in published.rglob("*") if p.is_file()}
    assert found == {
        "README.md",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "adapter/tasks/relight.toml",
        "pytorch_lora_weights.safetensors",
        "comfyui/relight.safetensors",
        "kohya/relight.safetensors",
        "images/samples.jpg",
    }


def test_the_published_adapter_is_the_runs(
    trained: Path, published: Path, micro_model: Path
) -> None:
    before, after = (load_file(p / "adapter" / WEIGHTS) for p in (trained, published))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    answers = []
    for folder in (trained, published):
        model = FluxTransformer2DModel.from_pretrained(micro_model, subfolder="transformer")
        files.load(model, folder / "adapter")
        answers.append(verify.answer(model, 1.0))
    assert torch.equal(*answers)
    told, public = (read_metadata(place / "adapter") for place in (trained, published))
    changed = {"base_model": "micro", "layers": "those of before"}
    assert public == told | changed


def test_the_card_says_what_the_run_was(published: Path) -> None:
    card = ModelCard.load(published / "README.md")
    assert card.data.license == "other"
    assert card.data.base_model is None
    assert card.data.pipeline_tag == "image-to-image"
    for words in (
        "DEFT adapter of rank 3 for micro",
        "| `relight` | A street at night. | 100% |",
        "| all | 0.750 | 0.250 |",
        "| data | folder |",
        "4, 8 examples in all",
        '"rows": [["example-day.png", "example-target.png"],',
        "From the street by day [IMAGE1] to the street by night [IMAGE2].",
        "images/samples.jpg",
    ):
        assert words in card.text
    with Image.open(published / "images/samples.jpg") as sheet:
        assert sheet.size == (1600, 320)


def test_the_card_and_the_headers_of_a_subject_name_it_and_count_its_class(
    copied: Path, tmp_path: Path
) -> None:
    run = load_run(str(copied / "settings.toml"))
    subject = Subject(trigger="sks", class_word="dog", class_data="dreambooth=x", class_weight=0.25)
    run = run.model_copy(update={"subject": subject})
    write_run(run, copied / "settings.toml")
    shutil.rmtree(copied / "adapter")
    write_adapter(run, copied / "adapter")
    publish(copied, "--dry-run", tmp_path / "out")
    text = ModelCard.load(tmp_path / "out/README.md").text
    assert "| `relight` | A street at night. | 80% |" in text
    assert "| prior preservation | dreambooth, 20% of the examples |" in text
    assert "the subject is called `sks dog`" in text
    with safe_open(tmp_path / "out/comfyui/relight.safetensors", "pt") as file:
        assert file.metadata()["modelspec.trigger_phrase"] == "sks"


def test_a_base_on_the_hub_is_named_with_its_licence() -> None:
    fill = bases.public_base("black-forest-labs/FLUX.1-Fill-dev@abc")
    assert (fill.hub, fill.licence.name) == (bases.FILL, "flux-1-dev-non-commercial-license")
    assert bases.public_base("tiny").licence.identifier == "apache-2.0"
    assert bases.public_base("/somewhere/flux", bases.FILL) == fill
    assert bases.public_base("me/other").licence.identifier == "other"


def test_the_base_of_the_card_and_of_all_files_is_the_id_that_is_given(
    trained: Path, tmp_path: Path
) -> None:
    publish(trained, "--dry-run", tmp_path / "new", "--base", bases.FILL, "--format", "diffusers")
    card = ModelCard.load(tmp_path / "new/README.md")
    assert card.data.base_model == bases.FILL
    assert card.data.to_dict()["base_model_relation"] == "adapter"
    assert card.data.license_name == "flux-1-dev-non-commercial-license"
    fields = json.loads((tmp_path / "new/adapter" / CONFIG).read_text())
    assert fields["base_model_name_or_path"] == bases.FILL
    assert not (tmp_path / "new/comfyui").exists()


def test_the_cards_lines_for_diffusers_run(
    published: Path, micro_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (published / "README.md").read_text(), re.DOTALL)
    for name in ("example-day", "example-target", "query-day"):
        Image.new("RGB", (32, 32), "red").save(tmp_path / f"{name}.png")
    for theirs, here in (
        ('"PATH_OF_THE_BASE"', repr(str(micro_model))),
        ("resolution=384, torch_dtype=torch.bfloat16", "resolution=32"),
        ("pipe.enable_model_cpu_offload()\n", ""),
        ('"me/relight"', repr(str(published))),
        ("num_inference_steps=30", "num_inference_steps=1, upsampling_height=32"),
    ):
        assert theirs in code
        code = code.replace(theirs, here)
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert (tmp_path / "made.png").is_file()


def test_figures_are_those_of_the_evaluations_own_table(
    trained: Path,
    micro_model: Path,
    tmp_path: Path,
    refused: Refused,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["--model", str(micro_model), "--suite", "scenes", "--tasks", "image-to-depth"]
    words += ["--limit", "2", "--inference-steps", "1", "--encoder", "none", "--against-base"]
    for adapter, output in ((trained, "own"), ("none", "base")):
        more = words if adapter != "none" else words[:-1]
        main(["eval", str(adapter), *more, "--output", str(tmp_path / output)])
    given = ("--dry-run", tmp_path / "new", "--format", "kohya")
    publish(trained, *given, "--evaluation", tmp_path / "own")
    card = (tmp_path / "new/README.md").read_text()
    rows = [
        line
        for line in (tmp_path / "own/table.md").read_text().splitlines()
        if line.startswith("| image-to-depth | ") and " with " not in line and "< 0" not in line
    ]
    compared = [row for row in rows if row.count("|") == 7]
    assert compared
    assert all(row in card for row in compared)
    assert "2 images of 2 grids" in card
    assert "Validation loss" in card
    assert not (tmp_path / "new/images").exists()
    capsys.readouterr()
    line = refused("publish", trained, "--repo", "a/b", *given, "--evaluation", tmp_path / "base")
    assert "of the base alone" in line
    spoiled = tmp_path / "own/settings.json"
    told = json.loads(spoiled.read_text())
    told["made"]["adapters_sha256"] = [["0" * 64, 1.0]]
    spoiled.write_text(json.dumps(told))
    line = refused("publish", trained, "--repo", "a/b", *given, "--evaluation", tmp_path / "own")
    assert "of another adapter" in line


# ---- what must not be in it


def test_no_path_and_no_option_of_a_tracker_is_in_any_file(
    trained: Path, published: Path, micro_model: Path
) -> None:
    private = [str(trained.parent), str(micro_model.parent), str(Path.home()), "our-lab"]
    for path in published.rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        assert not [word for word in private if word.encode() in content], path


@pytest.mark.parametrize(
    "words",
    [
        "/home/anna/flux",
        "~/flux",
        r"C:\Users\anna",
        "../data",
        "hf_" + "a" * 34,
        "https://me:word@host/a",
        "file:///a",
    ],
)
def test_words_of_a_task_that_tell_of_a_machine_are_refused(
    copied: Path, tmp_path: Path, refused: Refused, words: str
) -> None:
    task = copied / "adapter/tasks/relight.toml"
    task.write_text(TASK.replace('"A street at night."', f"'like {words}'"))
    line = refused("publish", copied, "--repo", "me/new", "--dry-run", tmp_path / "new")
    assert "adapter/tasks/relight.toml would hold" in line
    assert not (tmp_path / "new").exists()


def test_a_header_that_tells_of_a_machine_is_refused(
    copied: Path, tmp_path: Path, refused: Refused
) -> None:
    file = copied / "adapter" / WEIGHTS
    copy_with_texts(file, tmp_path / "other", read_metadata(file.parent) | {"note": "of /mnt/x"})
    shutil.move(tmp_path / "other", file)
    line = refused("publish", copied, "--repo", "me/new", "--dry-run", tmp_path / "new")
    assert f"adapter/{WEIGHTS} would hold a path of a machine, '/mnt/x'" in line


@pytest.mark.parametrize(
    "text",
    [
        "https://huggingface.co/a/b",
        "day/night and 1/2/3",
        "ComfyUI/models/loras",
        "<b>a</b>",
        r".*blocks\\.\\d+\\.(attn|ff)",
        "a ratio of 3:4, on / off",
    ],
)
def test_words_that_tell_of_no_machine_are_let_through(text: str) -> None:
    assert list(privacy.private_in(text, privacy.names_here())) == []


def test_the_name_of_who_is_logged_in_is_found_but_not_in_its_own_repository(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LOGNAME", "anna7")
    assert getpass.getuser() == "anna7"
    found = list(privacy.private_in("by anna7.", privacy.names_here()))
    assert found == [("a name of this machine or its user", "anna7")]
    assert not list(privacy.private_in("by anna7.", privacy.names_here(but=["anna7", "a"])))


def test_a_user_without_a_name_publishes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 2**31 - 7)
    assert privacy.user_here() == ""
    assert len(privacy.names_here()) <= 1


# ---- the folder of a dry run


def test_a_dry_run_replaces_the_one_before_unless_its_card_was_edited(
    trained: Path, tmp_path: Path, refused: Refused
) -> None:
    new = tmp_path / "new"
    publish(trained, "--dry-run", new, "--format", "diffusers", "--with-pictures")
    publish(trained, "--dry-run", new, "--format", "kohya")
    names = {path.name for path in new.iterdir()}
    assert names == {"README.md", "adapter", "kohya"}
    card = new / "README.md"
    card.write_text(card.read_text().replace("# relight", "# My adapter"))
    line = refused("publish", trained, "--repo", "me/relight", "--dry-run", new)
    assert "edited since" in line
    assert "# My adapter" in card.read_text()


def test_a_dry_run_writes_only_beside_and_into_its_folder(trained: Path, tmp_path: Path) -> None:
    """In a home whose parent is somebody else's, nothing can be written above it."""
    heard: list[str] = []
    listening = True

    def hear(event: str, told: tuple[object, ...]) -> None:
        if listening and event == "tempfile.mkdtemp" and "vcdeft-" in str(told[0]):
            heard.append(os.path.abspath(str(told[0])))

    sys.addaudithook(hear)  # which stays, deaf
    publish(trained, "--dry-run", tmp_path / "home" / "look")
    listening = False
    assert heard
    assert all(Path(place).is_relative_to(tmp_path) for place in heard)


def test_a_folder_of_somebody_elses_stays(trained: Path, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "project").mkdir()
    (tmp_path / "project/README.md").write_text("mine")
    line = refused("publish", trained, "--repo", "me/a", "--dry-run", tmp_path / "project")
    assert "not written by vcdeft publish" in line
    line = refused("publish", trained, "--repo", "me/a", "--dry-run", trained)
    assert "no dry run of vcdeft publish" in line


def test_a_run_that_cannot_be_published_is_told(
    copied: Path, tmp_path: Path, refused: Refused
) -> None:
    def line(run: Path, *more: object) -> str:
        given = ("--repo", "me/new", "--dry-run", tmp_path / "new", *more)
        said = refused("publish", run, *given)
        assert not (tmp_path / "new").exists()
        return said

    assert "no run there" in line(tmp_path)
    assert "--base x: no id on the hub" in line(copied, "--base", "x")
    assert "no evaluation there" in line(copied, "--evaluation", tmp_path)
    further = {"step": 6, "examples": 12, "seconds": 1.0, "loss": 0.5, "tasks": {}}
    before = (copied / "metrics.jsonl").read_bytes()
    run_folder.append_line(copied / "metrics.jsonl", further)
    assert "its adapter is of step 4, and the run has gone on to step 6; finish it" in line(copied)
    (copied / "metrics.jsonl").write_bytes(before)
    (copied / "adapter" / CONFIG).rename(copied / "elsewhere.json")
    assert "finish it with 'vcdeft train" in line(copied)


# ---- the upload


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with hub_server() as found:
        use(found, monkeypatch)
        yield found


def test_an_upload_holds_what_the_dry_run_holds(hub: Hub, trained: Path, published: Path) -> None:
    kinds = [word for kind in ("diffusers", "comfyui", "kohya") for word in ("--format", kind)]
    publish(trained, "--private", "--with-pictures", *kinds)
    repository = hub.repos["me/relight"]
    assert repository.private
    assert repository.commits == ["DEFT adapter of rank 3, 4 steps"]
    expected = {p.relative_to(published).as_posix() for p in published.rglob("*") if p.is_file()}
    assert set(repository.files) == expected
    for name, content in repository.files.items():
        assert content == (published / name).read_bytes(), name


def test_what_else_is_in_the_repository_stays(
    hub: Hub, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = Repository(files={"README.md": b"old", "notes.txt": b"mine"}, commits=["first"])
    hub.repos["our-lab/grids"] = before
    publish(trained, "--format", "kohya", repo="our-lab/grids")
    assert before.files["notes.txt"] == b"mine"
    assert before.files["README.md"] != b"old"
    assert len(before.commits) == 2
    assert "what else was there stays" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("token", "repo", "message"),
    [
        (None, "me/new", "no token; 'hf auth login' stores one"),
        ("hf_wrong", "me/new", "the hub does not know the token"),
        ("right", "you/new", "the token is of me, who can write under me, our-lab"),
        ("right", "new", "expected OWNER/NAME"),
        ("right", "me/a b", "expected OWNER/NAME"),
        ("right", "me/open", "is there already, open to all"),
    ],
)
def test_what_the_hub_would_refuse_is_told_before_the_run_is_read(
    hub: Hub,
    refused: Refused,
    monkeypatch: pytest.MonkeyPatch,
    token: str | None,
    repo: str,
    message: str,
) -> None:
    hub.repos["me/open"] = Repository()
    if token != "right":
        use(hub, monkeypatch, token=token)
    assert message in refused("publish", "no-run-there", "--repo", repo, "--private")
    assert not [line for line in hub.asked if not line.startswith("GET")]


def test_faults_on_the_way_are_one_line(
    hub: Hub, trained: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    given = ("publish", trained, "--repo", "me/new", "--format", "kohya")
    hub.writes = False
    assert "this token may not write there" in refused(*given)
    hub.writes, hub.breaks = True, "/objects/batch"
    assert "a fault of the server" in refused(*given)
    hub.breaks = "/commit/"
    assert "a fault of the server" in refused(*given)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refused(*given)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "http://127.0.0.1:9 cannot be reached" in refused(*given)


def test_a_base_that_is_built_in_has_no_other_name() -> None:
    with pytest.raises(UserError, match="leave --base"):
        bases.public_base("tiny", bases.FILL)
