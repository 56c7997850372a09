"""Roles computed by a model: the same picture wherever it is asked for, made once, and honest
about what could not be made."""

from __future__ import annotations

import json
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_cache import COMMIT, in_hub_cache
from PIL import Image
from torch.utils.data import DataLoader
from transformers import (
    AutoImageProcessor,
    DepthAnythingConfig,
    Dinov2Config,
    DPTConfig,
    DPTForDepthEstimation,
    GLPNConfig,
    SegformerConfig,
    SegformerForSemanticSegmentation,
)
from transformers.models.dpt.image_processing_pil_dpt import DPTImageProcessorPil
from transformers.models.segformer.image_processing_pil_segformer import SegformerImageProcessorPil

from visualcloze_deft.cli import main
from visualcloze_deft.config.run_settings import load_run
from visualcloze_deft.data.annotation.models import (
    ANNOTATORS,
    check_model,
    colour,
    computed,
    nearness,
    normals,
)
from visualcloze_deft.data.annotation.source import Annotated, annotate
from visualcloze_deft.data.sources.folder import Folder
from visualcloze_deft.data.sources.scenes import Scenes
from visualcloze_deft.errors import UserError
from visualcloze_deft.training.run_data import mixture_of

Refused = Callable[..., str]
LABELS = ("Background", "cat", "dog")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def depth_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_depth_model(tmp_path_factory.mktemp("models") / "dpt")


def write_depth_model(folder: Path) -> Path:
    """A random DPT in the format of the hub."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}
    config = DPTConfig(
        **sizes,
        intermediate_size=16,
        image_size=32,
        patch_size=8,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
        initializer_range=0.3,
    )
    DPTForDepthEstimation(config).save_pretrained(folder)
    DPTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def segment_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random SegFormer of three labels in the format of the hub."""
    torch.manual_seed(9)  # all labels occur
    folder = tmp_path_factory.mktemp("models") / "segformer"
    config = SegformerConfig(
        depths=[1, 1, 1, 1],
        hidden_sizes=[8, 8, 8, 8],
        num_attention_heads=[1, 1, 1, 1],
        mlp_ratios=[1, 1, 1, 1],
        decoder_hidden_size=8,
        initializer_range=0.5,
        id2label=dict(enumerate(LABELS)),
        label2id={label: k for k, label in enumerate(LABELS)},
    )
    SegformerForSemanticSegmentation(config).save_pretrained(folder)
    SegformerImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Six photos of scenes, and nothing else of them."""
    return write_photos(tmp_path / "photos", 6)


def write_photos(root: Path, count: int) -> Path:
    (root / "target").mkdir(parents=True)
    scenes = Scenes(size=48, seed=3)
    for k in range(count):
        photo = scenes.item(k).image("target").crop((0, 0, 48, 40))
        photo.save(root / "target" / f"{k}.png")
    return root


def same(one: Image.Image, other: Image.Image) -> bool:
    return one.mode == other.mode and np.array_equal(np.array(one), np.array(other))


# ---- what is computed


def test_every_role_is_a_picture_of_the_size_of_its_target(
    photos: Path, depth_model: Path, segment_model: Path
) -> None:
    item = Annotated(Folder(photos), all_roles(depth_model, segment_model)).item(0)
    assert set(item.images) == {"target", *ANNOTATORS}
    for role in item.images:
        image = item.image(role)
        assert (image.mode, image.size) == ("RGB", (48, 40))
        assert len(image.getcolors(10_000)) > 1


def all_roles(depth_model: Path, segment_model: Path) -> dict[str, str]:
    models = {"depth-estimation": depth_model, "image-segmentation": segment_model}
    return {role: str(models[one.pipeline]) for role, one in ANNOTATORS.items()}


def test_depth_is_the_models_own_from_black_to_white(photos: Path, depth_model: Path) -> None:
    item = Annotated(Folder(photos), {"depth": str(depth_model)}).item(0)
    seen = AutoImageProcessor.from_pretrained(depth_model)(
        item.image("target"), return_tensors="pt"
    )
    model = DPTForDepthEstimation.from_pretrained(depth_model)
    with torch.no_grad():
        depth = model(**seen).predicted_depth[None]
    depth = torch.nn.functional.interpolate(depth, (40, 48), mode="bicubic", align_corners=False)
    expected = 255 * ((depth - depth.min()) / (depth.max() - depth.min()))[0, 0].numpy()
    found = np.array(item.image("depth"), float)
    assert (found == found[..., :1]).all()
    assert np.abs(found[..., 0] - expected).max() <= 0.51


@pytest.mark.parametrize(
    ("config", "first"),
    [
        (DPTConfig(), 0),  # MiDaS: nearness
        (DepthAnythingConfig(), 0),
        (DepthAnythingConfig(depth_estimation_type="metric"), 1),
        (DPTConfig(backbone_config=Dinov2Config()), 1),
        (GLPNConfig(), 1),
    ],
    ids=["dpt", "depth-anything", "depth-anything metric", "dpt on dinov2", "glpn"],
)
def test_near_is_bright_whatever_the_model_measures(config: object, first: float) -> None:
    found = {"predicted_depth": torch.tensor([[3.0, 5.0, 7.0]])}
    assert nearness(found, config).tolist() == [[first, 0.5, 1 - first]]


def test_a_revision_of_a_hub_id_stands_behind_it(
    photos: Path, depth_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_hub_cache(depth_model, "someone/depths", tmp_path / "cache", monkeypatch)
    photo = Image.open(photos / "target" / "0.png").convert("RGB")
    place = f"someone/depths@{COMMIT}"
    check_model("depth", place)
    there = computed("depth", place, "cpu", photo)
    assert same(there, computed("depth", str(depth_model), "cpu", photo))
    with pytest.raises(UserError, match="not from the hub"):
        check_model("depth", "someone/depths@gone")


def test_depth_of_one_distance_is_black_not_an_error() -> None:
    assert not nearness({"predicted_depth": torch.ones(2, 2)}, DPTConfig()).any()


def test_normals_lie_in_the_axes_of_scenes() -> None:
    scenes = Scenes(size=64, seed=1)
    for index in range(8):
        item = scenes.item(index)
        near = np.array(item.image("depth"), np.float32)[..., 0] / 255
        found = normals(near)
        exact = np.array(item.image("normal"), np.float32) / 127.5 - 1
        assert np.allclose(np.linalg.norm(found, axis=-1), 1, atol=1e-5)
        assert np.mean((found * exact).sum(-1)) > 0.85
        right, up = (
            np.corrcoef(found[..., k].ravel(), exact[..., k].ravel())[0, 1] for k in (0, 1)
        )
        assert min(right, up) > 0.3


def test_segments_have_the_colour_of_the_label_the_model_gives(
    photos: Path, segment_model: Path
) -> None:
    places = dict.fromkeys(("segmentation", "uniformer", "mask"), str(segment_model))
    item = Annotated(Folder(photos), places).item(0)
    processor = AutoImageProcessor.from_pretrained(segment_model)
    model = SegformerForSemanticSegmentation.from_pretrained(segment_model)
    with torch.no_grad():
        seen = model(**processor(item.image("target"), return_tensors="pt"))
    (found,) = processor.post_process_semantic_segmentation(seen, target_sizes=[(40, 48)])
    colours = np.array([colour(k + 1) for k in range(len(LABELS))], np.uint8)
    assert len(np.unique(found)) > 1
    for role in ("segmentation", "uniformer"):
        assert np.array_equal(np.array(item.image(role)), colours[found])
    mask = np.array(item.image("mask"))
    assert np.array_equal(mask, np.repeat((found.numpy() > 0)[..., None] * np.uint8(255), 3, -1))


def test_a_thousand_labels_have_a_thousand_colours() -> None:
    assert len({colour(k) for k in range(1000)}) == 1000


@pytest.mark.parametrize("size", [(2, 2), (3, 50), (50, 3), (300, 200)])
def test_pictures_of_any_size_keep_it(
    size: tuple[int, int], depth_model: Path, segment_model: Path
) -> None:
    photo = Image.radial_gradient("L").resize(size).convert("RGB")
    for role, model in all_roles(depth_model, segment_model).items():
        assert computed(role, model, "cpu", photo).size == size


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1)])
def test_a_line_of_pixels_is_refused(size: tuple[int, int], depth_model: Path) -> None:
    with pytest.raises(UserError, match=f"{size[0]} x {size[1]} pixels: too small"):
        computed("normal", str(depth_model), "cpu", Image.new("RGB", size))


# ---- the source


def test_targets_alone_serve_tasks_of_a_computed_role(
    photos: Path, depth_model: Path, tmp_path: Path, refused: Refused
) -> None:
    words = ["tasks", "preview", "depth-to-image", "--data", f"folder={photos}"]
    words += ["--output", str(tmp_path / "sheet.png")]
    assert "folder has the roles target" in refused(*words)
    main([*words, "--annotate", f"depth={depth_model}"])
    assert (tmp_path / "sheet.png").is_file()
    words[1], words[-1] = "example", str(tmp_path / "grids")
    main([*words, "--annotate", f"depth={depth_model}"])
    assert (tmp_path / "grids" / "grid.json").is_file()


def test_roles_that_a_source_has_stay_its_own(photos: Path, depth_model: Path) -> None:
    (photos / "depth").mkdir()
    Image.new("RGB", (48, 40), "red").save(photos / "depth" / "2.png")
    Image.new("RGB", (48, 40)).save(photos / "depth" / "lone.png")
    Image.new("RGB", (48, 40)).save(photos / "target" / "lone.png")
    (photos / "before").mkdir()
    Image.new("RGB", (48, 40)).save(photos / "before" / "2.png")
    source = Annotated(Folder(photos), {"depth": str(depth_model)})
    assert source.roles == {"target", "depth", "before"}
    assert source.item(2).image("depth").getpixel((0, 0)) == (255, 0, 0)
    check_kinds(source)


def check_kinds(source: Annotated) -> None:
    """Every index stands once, in order, under the roles that its item has."""
    assert sorted(k for part in source.kinds.values() for k in part) == list(range(len(source)))
    for roles, indices in source.kinds.items():
        assert list(indices) == sorted(indices)
        assert all(set(source.item(k).images) == roles for k in indices)


def test_items_without_a_target_get_nothing(photos: Path, depth_model: Path) -> None:
    rows = [{"target": "target/0.png"}, {"before": "target/1.png", "edited": "target/2.png"}]
    (photos / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = Annotated(Folder(photos), {"depth": str(depth_model)})
    assert set(source.item(1).images) == {"before", "edited"}
    check_kinds(source)


def test_a_reading_process_sees_the_same_picture_and_is_sent_no_model(
    photos: Path, depth_model: Path
) -> None:
    source = Annotated(Folder(photos), {"depth": str(depth_model)})
    here = [np.array(source.item(k).image("depth")) for k in range(len(source))]
    assert len(pickle.dumps(source)) < 10_000
    loader = DataLoader(Depths(source), batch_size=None, num_workers=1)
    assert all(np.array_equal(*pair) for pair in zip(loader, here, strict=True))


class Depths:
    """The depth of each item, for a loader."""

    def __init__(self, source: Annotated) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> np.ndarray:
        return np.array(self.source.item(index).image("depth"))


def test_loading_a_model_leaves_the_random_state(photos: Path, depth_model: Path) -> None:
    copied = shutil.copytree(depth_model, photos / ".model")
    before = torch.get_rng_state()
    Annotated(Folder(photos), {"depth": str(copied)}).item(0).image("depth")
    assert torch.equal(torch.get_rng_state(), before)


# ---- the folder


def test_what_was_written_is_what_is_computed(
    photos: Path, depth_model: Path, segment_model: Path, tmp_path: Path
) -> None:
    models = all_roles(depth_model, segment_model)
    pairs = [f"--annotate={role}={place}" for role, place in models.items()]
    main(["data", "annotate", f"folder={photos}", "--output", str(tmp_path / "maps"), *pairs])
    stored = Annotated(Folder(photos), dict.fromkeys(models, str(tmp_path / "maps")))
    flying = Annotated(Folder(photos), models)
    check_kinds(stored)
    for index in range(len(stored)):
        for role in models:
            assert same(stored.item(index).image(role), flying.item(index).image(role))


def test_examples_are_the_same_from_a_folder_also_where_items_are_held_out(
    photos: Path, depth_model: Path, tmp_path: Path
) -> None:
    maps = tmp_path / "maps"
    annotate(Folder(photos), {"depth": str(depth_model)}, maps, spec="folder")
    found = []
    for place in (depth_model, maps):
        words = [f"data.sources=['folder={photos}']", f"data.annotate.depth={place}"]
        words += ["data.tasks=image-to-depth", "data.validation_every=2", "data.resolution=32"]
        for held_out in (False, True):
            mixture = mixture_of(load_run(None, words), held_out=held_out)
            rows = [row for k in range(4) for row in mixture[k].rows]
            found.append([np.array(image).tobytes() for row in rows for image in row])
    assert found[:2] == found[2:]


@pytest.mark.processes
def test_a_killed_command_goes_on_where_it_stopped(
    depth_model: Path, tmp_path: Path, refused: Refused, capsys: pytest.CaptureFixture[str]
) -> None:
    photos, maps, whole = (
        write_photos(tmp_path / "many", 60),
        tmp_path / "maps",
        tmp_path / "whole",
    )
    words = ["data", "annotate", f"folder={photos}", "--annotate", f"depth={depth_model}"]
    killed = subprocess.Popen(
        [sys.executable, "-m", "visualcloze_deft", *words, "--output", maps],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while len([*maps.glob("depth/*.png")]) < 5 and killed.poll() is None:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    before = {path: path.stat().st_mtime_ns for path in maps.glob("depth/*.png")}
    assert 5 <= len(before) < 60
    use = ["tasks", "preview", "depth-to-image", "--data", f"folder={photos}"]
    assert "not finished; give the same" in refused(*use, "--annotate", f"depth={maps}")

    (maps / "depth" / ".000059.png.1-0.part").write_bytes(b"killed within a write")
    main([*words, "--output", str(maps)])
    said = f"{60 - len(before)} pictures made, {len(before)} were there"
    assert said in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in before} == before
    main([*words, "--output", str(whole)])
    assert contents(maps).keys() == contents(whole).keys()
    for path in maps.glob("depth/*.png"):  # another process may round the other way
        made, again = (
            np.array(Image.open(f)).astype(int) for f in (path, whole / "depth" / path.name)
        )
        assert abs(made - again).max() <= 1


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_role_can_join_later(photos: Path, depth_model: Path, tmp_path: Path) -> None:
    models = {"depth": str(depth_model), "normal": str(depth_model)}
    for role, model in models.items():
        written = annotate(Folder(photos), {role: model}, tmp_path / "maps", spec="folder")
        assert (written.made, written.kept) == (6, 0)
    stored = Annotated(Folder(photos), dict.fromkeys(models, str(tmp_path / "maps")))
    assert stored.roles == {"target", *models}


def test_a_broken_picture_is_named_and_its_item_lacks_the_role(
    photos: Path, depth_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "target" / "3.png").write_bytes(b"not a picture")
    words = ["data", "annotate", f"folder={photos}", "--output", str(tmp_path / "maps")]
    with pytest.raises(SystemExit) as ended:
        main([*words, "--annotate", f"depth={depth_model}"])
    assert ended.value.code == 1
    said = capsys.readouterr()
    assert "5 pictures made" in said.out
    assert "broken: 3: " in said.err
    stored = Annotated(Folder(photos), {"depth": str(tmp_path / "maps")})
    check_kinds(stored)
    assert "depth" not in stored.item(3).images
    assert stored.item(4).image("depth").size == (48, 40)

    Scenes(size=48).item(0).image("target").save(photos / "target" / "3.png")
    written = annotate(Folder(photos), {"depth": str(depth_model)}, tmp_path / "maps", spec="x")
    assert (written.made, written.kept, written.broken) == (1, 5, ())
    assert "depth" in Annotated(Folder(photos), stored.places).item(3).images


def test_a_folder_serves_its_own_source_alone(
    photos: Path, depth_model: Path, tmp_path: Path
) -> None:
    maps = tmp_path / "maps"
    annotate(Folder(photos), {"depth": str(depth_model)}, maps, spec=f"folder={photos}")
    other = Folder(write_photos(tmp_path / "other", 7))
    for use in (
        lambda: Annotated(other, {"depth": str(maps)}),
        lambda: annotate(other, {"depth": str(depth_model)}, maps, spec="other"),
    ):
        with pytest.raises(UserError, match=r"of folder=.* with 6 items, not of .* with 7"):
            use()
    words = [f"data.sources=['folder={photos}', 'folder={tmp_path / 'other'}']"]
    run = load_run(None, [*words, "data.tasks=image-to-depth", f"data.annotate.depth={maps}"])
    assert ["depth" in source.roles for source in mixture_of(run).sources] == [True, False]


# ---- mistakes


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("depth", "'depth': expected ROLE=PLACE"),
        ("dept=x/y", "'dept': no model computes this role, data must bring it; did you mean depth"),
        (
            "openpose=x/y",
            "data must bring it; known: depth, mask, normal, segmentation, uniformer",
        ),
        ("depth=./gone", "annotate depth=./gone: no such folder"),
        ("depth=gone", "annotate depth=gone: no such folder"),
        ("depth=no-one/has-this", "no such folder, and not from the hub: "),
        ("depth={photos}", "no config.json in this folder; found target"),
        (
            "depth={segment}",
            "the architecture SegformerForSemanticSegmentation; expected",
        ),
        ("mask={depth}", "DPTForDepthEstimation; expected one for image-segmentation"),
        ("mask={ade}", "no label is 'background' (its labels: wall, cat, dog)"),
        ("depth={pickled}", "no *.safetensors in this folder"),
        ("depth={bare}", "no preprocessor_config.json in this folder"),
        ("depth={damaged}", "not valid JSON"),
        ("depth={listed}", "no settings of a model: expected an object"),
        ("depth={cut}", "cannot be loaded: "),
    ],
)
def test_a_bad_role_or_model_is_one_line(
    pair: str,
    message: str,
    photos: Path,
    depth_model: Path,
    segment_model: Path,
    tmp_path: Path,
    refused: Refused,
) -> None:
    def copy(name: str, model: Path = depth_model) -> Path:
        return shutil.copytree(model, tmp_path / name)

    places = {"photos": photos, "depth": depth_model, "segment": segment_model}
    places |= {name: copy(name) for name in ("pickled", "bare", "damaged", "listed", "cut")}
    places["ade"] = copy("ade", segment_model)
    config = places["ade"] / "config.json"
    config.write_text(config.read_text().replace("Background", "wall"))
    (places["pickled"] / "model.safetensors").rename(places["pickled"] / "pytorch_model.bin")
    (places["bare"] / "preprocessor_config.json").unlink()
    (places["damaged"] / "config.json").write_text("{")
    (places["listed"] / "config.json").write_text("[]")
    weights = places["cut"] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])

    given = ["--annotate", pair.format(**places)]
    output = tmp_path / "out"
    line = refused("data", "annotate", f"folder={photos}", "--output", output, *given)
    assert message in line
    assert not [*output.glob("[!.]*")]
    if "cut" not in pair:  # which shows when it is loaded
        words = ["--data", f"folder={photos}", "--tasks", "depth-to-image"]
        assert message in refused("train", *words, "--output", output, *given)


def test_a_model_that_can_look_at_no_picture_is_named(
    photos: Path, depth_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = shutil.copytree(depth_model, tmp_path / "scaled")
    told = model / "preprocessor_config.json"
    told.write_text(json.dumps(json.loads(told.read_text()) | {"rescale_factor": "a half"}))
    words = ["data", "annotate", f"folder={photos}", "--annotate", f"depth={model}"]
    with pytest.raises(SystemExit) as ended:
        main([*words, "--output", str(tmp_path / "out")])
    assert ended.value.code == 1
    said = capsys.readouterr().err
    assert f"{model} cannot be loaded: " in said
    assert "6 items cannot be annotated" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["scenes=4", "--annotate", "depth={depth}"], "no item has a target and lacks depth"),
        (
            ["folder={photos}", "--annotate", "depth={maps}"],
            "a folder of annotations; name a model",
        ),
        (
            ["folder={photos}", "--annotate", "depth={depth}", "--annotate", "depth={depth}"],
            "depth is given twice",
        ),
        (
            ["folder={photos}", "--annotate", "depth={depth}", "--output", "{photos}"],
            "holds 'target' and no annotations of vcdeft",
        ),
        (
            ["folder={photos}", "--annotate", "depth={copy}", "--output", "{maps}"],
            "its depth is made by",
        ),
        (
            ["folder={photos}", "--annotate", "depth={depth}", "--output", "{damaged}"],
            "annotations.json: damaged",
        ),
        (
            ["folder={photos}", "--annotate", "depth={depth}", "--output", "{file}"],
            "not writable",
        ),
    ],
)
def test_a_bad_annotation_is_one_line(
    arguments: list[str],
    message: str,
    photos: Path,
    depth_model: Path,
    tmp_path: Path,
    refused: Refused,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {"photos": photos, "depth": depth_model, "maps": tmp_path / "maps"}
    annotate(Folder(photos), {"depth": str(depth_model)}, places["maps"], spec="folder")
    capsys.readouterr()  # its bar
    places["copy"] = shutil.copytree(depth_model, tmp_path / "copy")
    places["damaged"] = shutil.copytree(places["maps"], tmp_path / "damaged")
    (places["damaged"] / "annotations.json").write_text('{"roles": 3}')
    places["file"] = tmp_path / "file"
    places["file"].touch()
    before = contents(places["maps"])
    words = [word.format(**places) for word in arguments]
    output = [] if "--output" in words else ["--output", tmp_path / "out"]
    assert message in refused("data", "annotate", *words, *output)
    assert contents(places["maps"]) == before


@pytest.mark.parametrize(
    ("data", "place", "message"),
    [
        ("scenes", "depth={maps}", "no data lacks it"),
        ("folder={other}", "depth={maps}", "not of this folder with 2"),
        ("folder={photos}", "normal={maps}", "this folder has depth"),
    ],
)
def test_annotations_that_serve_nothing_are_refused(
    data: str,
    place: str,
    message: str,
    photos: Path,
    depth_model: Path,
    tmp_path: Path,
    refused: Refused,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {"photos": photos, "maps": tmp_path / "maps"}
    places["other"] = write_photos(tmp_path / "other", 2)
    annotate(Folder(photos), {"depth": str(depth_model)}, places["maps"], spec="folder")
    capsys.readouterr()  # its bar
    words = ["--data", data.format(**places), "--annotate", place.format(**places)]
    assert message in refused("tasks", "preview", "depth-to-image", *words)
    assert message in refused("train", "--output", tmp_path / "run", *words)


def test_help_teaches_without_torch() -> None:
    code = (
        "import sys\n"
        "from visualcloze_deft.cli.app import cli\n"
        "cli.main(['data', 'annotate', '--help'], standalone_mode=False)\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--annotate depth=" in done.stdout
