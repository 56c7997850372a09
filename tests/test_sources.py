"""Sources read what stands in a folder, say what is wrong with it, and give the claimed roles."""

from __future__ import annotations

import gc
import io
import json
import os
import pickle
import re
import shutil
import struct
import warnings
import zlib
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image, ImageChops, ImageColor

from visualcloze_deft.cli import main
from visualcloze_deft.config.source_specs import PROCEDURAL
from visualcloze_deft.data.base import Part, units_of
from visualcloze_deft.data.sources import SOURCES, graph200k_hub, open_source
from visualcloze_deft.data.sources.dreambooth import DreamBooth
from visualcloze_deft.data.sources.folder import Folder
from visualcloze_deft.data.sources.graph200k import Graph200K
from visualcloze_deft.data.sources.insdet import LIGHT_GREY, InsDet
from visualcloze_deft.errors import UserError
from visualcloze_deft.images.depth import declared
from visualcloze_deft.images.reading import picture_size, read_crop, read_image

REAL = Path(os.environ.get("VCDEFT_DATA", ""))
real_data = pytest.mark.skipif(
    not os.environ.get("VCDEFT_DATA"), reason="VCDEFT_DATA names no folder of real data"
)


def paint(path: Path, colour: str = "red", size: tuple[int, int] = (8, 8)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def png_of_size(path: Path, width: int, height: int) -> Path:
    """A PNG whose header promises more, or less, than its data holds."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = b"IDAT" + zlib.compress(b"\0" * 100)
    chunks = [header, pixels, b"IEND"]
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + b"".join(
            struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
            for chunk in chunks
        )
    )
    return path


def one_line(raised: pytest.ExceptionInfo[UserError]) -> str:
    message = str(raised.value)
    assert "\n" not in message
    return message


# ---- reading one picture


def test_any_picture_is_read_as_rgb(tmp_path: Path) -> None:
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"):
        Image.new(mode, (5, 3)).save(tmp_path / "a.png")
        image = read_image(tmp_path / "a.png")
        assert (image.mode, image.size) == ("RGB", (5, 3))


def test_a_jpeg_for_print_is_read_as_rgb(tmp_path: Path) -> None:
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "a.jpg")
    red, green, blue = np.array(read_image(tmp_path / "a.jpg"))[4, 4]
    assert red > 200
    assert max(green, blue) < 60


def test_a_picture_is_turned_upright(tmp_path: Path) -> None:
    image = Image.new("RGB", (6, 4), "black")
    image.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise: the corner goes to the upper right
    image.save(tmp_path / "a.png", exif=exif)
    upright = read_image(tmp_path / "a.png")
    assert upright.size == picture_size(tmp_path / "a.png") == (4, 6)
    assert upright.getpixel((3, 0)) == (255, 255, 255)
    assert read_crop(tmp_path / "a.png", (3, 0, 4, 1), size=1).getpixel((0, 0)) == (255, 255, 255)


def test_transparency_is_laid_over_white(tmp_path: Path) -> None:
    Image.new("RGBA", (1, 1), (255, 0, 0, 0)).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png").getpixel((0, 0)) == (255, 255, 255)
    Image.new("L", (1, 1), 7).save(tmp_path / "key.png", transparency=7)
    assert read_image(tmp_path / "key.png").getpixel((0, 0)) == (255, 255, 255)


def test_a_transparent_colour_of_a_palette_becomes_white(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "a.png", transparency=b"\0\xff")
    found = read_image(tmp_path / "a.png")
    assert [found.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (0, 0, 255)]


@pytest.mark.parametrize("name", ["moving.gif", "moving.webp", "moving.png", "pages.tiff"])
def test_of_a_moving_picture_the_first_one_is_read(tmp_path: Path, name: str) -> None:
    first, *others = (Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue"))
    lossless = {"lossless": True} if name.endswith("webp") else {}
    first.save(tmp_path / name, save_all=True, append_images=others, **lossless)
    with Image.open(tmp_path / name) as image:
        assert image.n_frames == 3
    assert read_image(tmp_path / name).getpixel((4, 4)) == (255, 0, 0)


def test_sixteen_bits_keep_their_order_in_eight(tmp_path: Path) -> None:
    values = np.array([[0, 257, 32768, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "depth.png")
    assert np.array(read_image(tmp_path / "depth.png"))[0, :, 0].tolist() == [0, 1, 128, 255]


def test_values_without_a_range_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.ones((2, 2), np.float32)).save(tmp_path / "depth.tiff")
    with pytest.raises(UserError, match=r"depth\.tiff: its values have no fixed range"):
        read_image(tmp_path / "depth.tiff")


def test_a_crop_is_that_part_of_the_picture(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    crop = read_crop(tmp_path / "a.png", (5, 2, 25, 18), size=4)
    assert np.array_equal(np.array(crop), noise[2:18, 5:25])


def test_a_large_crop_of_a_jpeg_is_decoded_small_but_not_too_small(tmp_path: Path) -> None:
    image = Image.radial_gradient("L").resize((400, 300)).convert("RGB")
    image.save(tmp_path / "a.jpg", quality=95)
    box = (101, 50, 301, 250)
    small = read_crop(tmp_path / "a.jpg", box, size=40)
    assert small.size == (50, 50)
    expected = np.array(image.crop(box).resize((50, 50), Image.Resampling.BOX), np.float64)
    assert np.abs(np.array(small) - expected).mean() < 3


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.png", None, "no such image"),
        ("empty.png", b"", "an empty file"),
        ("notes.png", b"Dear diary, ...", "not an image"),
        ("cut.jpg", "truncated", "cannot be read as an image: image file is truncated"),
        ("none.png", (0, 8), "cannot be read as an image|an image of 0 x 8 pixels|not an image"),
        ("large.png", (10_001, 10_000), "more than 100 million pixels"),
        ("bomb.png", (100_000, 100_000), "more than 100 million pixels"),
    ],
)
def test_a_bad_file_is_named(
    tmp_path: Path, name: str, content: bytes | str | tuple[int, int] | None, message: str
) -> None:
    path = tmp_path / name
    if isinstance(content, tuple):
        png_of_size(path, *content)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "truncated":
        Image.effect_noise((64, 64), 50).save(path)
        path.write_bytes(path.read_bytes()[:-500])
    with (
        warnings.catch_warnings(action="error"),
        pytest.raises(UserError, match=message) as raised,
    ):
        read_image(path)
    assert one_line(raised).startswith(str(path))


def test_a_folder_is_no_image(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a folder, not an image"):
        read_image(tmp_path)


def test_a_picture_just_below_the_limit_raises_no_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)  # Pillow warns from here on
    path = paint(tmp_path / "a.png")
    with warnings.catch_warnings(action="error"):
        assert read_image(path).size == (8, 8)


def test_no_file_stays_open(tmp_path: Path) -> None:
    good = paint(tmp_path / "good.png")
    cut = tmp_path / "cut.png"
    cut.write_bytes(good.read_bytes()[:-30])
    gc.collect()  # of what other tests left
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always", ResourceWarning)
        images = [read_image(good)]
        with pytest.raises(UserError):
            read_image(cut)
        images.clear()
        gc.collect()
    assert [str(warning.message) for warning in seen] == []


# ---- folder


def pair(root: Path) -> Path:
    paint(root / "a.png", "red")
    paint(root / "b.png", "blue")
    return root


def table(root: Path, *rows: object) -> Path:
    return write(pair(root) / "rows.jsonl", "\n".join(json.dumps(row) for row in rows))


def test_a_table_names_roles_and_texts(tmp_path: Path) -> None:
    row = {"depth": "a.png", "target": "b.png", "caption": "a blue square", "instruction": "paint"}
    path = table(tmp_path, row)
    for place in (path, tmp_path):
        source = Folder(place)
        assert len(source) == 1
        assert source.roles == {"depth", "target"}
        item = source.item(0)
        assert item.image("target").getpixel((0, 0)) == (0, 0, 255)
        assert item.texts == {"caption": "a blue square", "instruction": "paint"}


def test_the_last_image_of_an_edit_is_the_target(tmp_path: Path) -> None:
    two = {"task": "relighting", "images": ["a.png", "b.png"], "prompt": "make it blue"}
    three = {"task": "try-on", "images": ["a.png", "a.png", "b.png"], "prompt": None}
    source = Folder(table(tmp_path, two, three))
    assert list(source.item(0).images) == ["before", "target"]
    assert list(source.item(1).images) == ["image_1", "image_2", "target"]
    assert source.item(0).image("before").getpixel((0, 0)) == (255, 0, 0)
    assert source.item(0).image("target").getpixel((0, 0)) == (0, 0, 255)
    assert source.item(0).texts == {"caption": "make it blue", "instruction": "make it blue"}
    assert source.item(1).texts == {}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"target": "b.png"', "not valid JSON"),
        pytest.param("[" * 100_000, "not valid JSON", id="deep"),
        ("\xff", "not valid JSON"),
        ("[1, 2]", "expected an object"),
        ('{"caption": "nothing to see"}', "names no picture"),
        ('{"target": 3}', "target must be the path of a picture, not 3"),
        ('{"target": ["b.png"]}', "target must be the path of a picture"),
        ('{"target": "b.png", "caption": null}', "caption must be text, not None"),
        ('{"target": "c.png"}', "target: no such file"),
        ('{"target": "."}', "target: no such file"),
        ('{"target": ""}', "target: no such file"),
        ('{"target": "../b.png"}', r"target: \.\./b\.png leads out of"),
        ('{"target": "deep/../../b.png"}', "leads out of"),
        ('{"depth": "b.png", "target": "/etc/passwd"}', "target: /etc/passwd leads out of"),
        ('{"images": ["b.png", "../b.png"]}', r"target: \.\./b\.png leads out of"),
        ('{"images": "b.png"}', "images must be a list of paths"),
        ('{"images": []}', "images must be a list of paths"),
        ('{"images": ["b.png", 1]}', "images must be a list of paths"),
        ('{"images": ["b.png"], "prompt": 1}', "prompt must be text or null"),
        ('{"images": ["b.png"], "promt": "x"}', "unknown key 'promt' .*did you mean prompt"),
    ],
)
def test_a_broken_row_names_its_line(tmp_path: Path, line: str, message: str) -> None:
    path = pair(tmp_path) / "rows.jsonl"
    path.write_bytes(b'{"target": "b.png"}\n\n' + line.encode("latin-1"))
    with pytest.raises(UserError, match=message) as raised:
        Folder(tmp_path)
    assert one_line(raised).startswith(f"{path}, line 3: ")


def test_a_path_may_be_written_in_any_way_that_stays_in_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "mine"
    for name in ("b.png", "..odd/b.png"):
        paint(root / name, "blue")
    (root / "link").symlink_to(paint(tmp_path / "other" / "b.png", "blue").parent)
    paths = ["b.png", "./deep/../b.png", str(root / "b.png"), "../mine/b.png"]
    paths += ["..odd/b.png", "link/b.png", "link/../b.png"]
    write(root / "rows.jsonl", "\n".join(json.dumps({"target": path}) for path in paths))
    monkeypatch.chdir(tmp_path)
    for place in (root, Path("mine"), Path("./mine/rows.jsonl"), Path("other/../mine")):
        source = Folder(place)
        for k in range(len(paths)):
            assert source.item(k).image("target").getpixel((0, 0)) == (0, 0, 255)
    monkeypatch.chdir(root)
    assert len(Folder(Path("."))) == len(paths)


def test_a_neighbour_of_almost_the_same_name_is_another_folder(tmp_path: Path) -> None:
    paint(tmp_path / "mine2" / "b.png")
    write(tmp_path / "mine" / "rows.jsonl", json.dumps({"target": "../mine2/b.png"}))
    with pytest.raises(UserError, match="leads out of"):
        Folder(tmp_path / "mine")


@pytest.mark.parametrize("layout", ["table", "subfolders", "suffixes"])
def test_names_may_have_spaces_and_any_letters(tmp_path: Path, layout: str) -> None:
    root = tmp_path / "meine Bilder 😀"
    name = "ein schöner Käfer 猫"
    if layout == "subfolders":
        paint(root / "target" / f"{name}.PNG")
    else:
        paint(root / f"{name}_target.PNG")
    if layout == "table":
        row = json.dumps({"target": f"{name}_target.PNG", "caption": "a"}, ensure_ascii=False)
        write(root / "rows.jsonl", row)
    else:
        write(root / f"{name}.txt", "a")
    item = Folder(root).item(0)
    assert item.image("target").size == (8, 8)
    assert item.texts == {"caption": "a"}
    assert layout == "table" or item.key == name


def test_subfolders_are_roles_and_stems_are_items(tmp_path: Path) -> None:
    for stem in ("0002", "0001"):
        paint(tmp_path / "depth" / f"{stem}.png")
        paint(tmp_path / "target" / f"{stem}.jpg")
    write(tmp_path / "caption" / "0001.txt", "a square\n")
    write(tmp_path / "instruction" / "0001.txt", "paint it")
    source = Folder(tmp_path)
    assert [source.item(k).key for k in range(len(source))] == ["0001", "0002"]
    assert source.roles == {"depth", "target"}
    assert source.item(0).texts == {"caption": "a square", "instruction": "paint it"}
    assert source.item(1).texts == {}


def test_suffixes_are_roles_also_those_of_two_words(tmp_path: Path) -> None:
    for name in ("my_cup_view", "my_cup_view_turned", "my_cup_target", "b_target"):
        paint(tmp_path / f"{name}.png")
    write(tmp_path / "my_cup.txt", "a cup")
    write(tmp_path / "my_cup_instruction.txt", "turn it")
    source = Folder(tmp_path)
    assert [source.item(k).key for k in range(len(source))] == ["b", "my_cup"]
    assert set(source.item(1).images) == {"view", "view_turned", "target"}
    assert source.item(1).texts == {"caption": "a cup", "instruction": "turn it"}


def test_a_folder_of_targets_alone_is_enough_for_derived_roles(tmp_path: Path) -> None:
    paint(tmp_path / "target" / "a.png")
    assert Folder(tmp_path).roles == {"target"}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "found nothing"),
        (["notes.txt", "deep/er/a.png"], r"found deep, notes\.txt"),
        (["depth/1.png", "target/0001.png"], r"depth/1\.png: stands alone"),
        (["0001.png", "0001_target.png"], r"0001\.png: expected a role at the end"),
        (["depth/1.png", "target/1.png", "1_target.png"], "keep one layout"),
        (["target/1.png", "target/1.jpg"], "has the same stem"),
    ],
)
def test_a_folder_without_a_layout_is_refused(
    tmp_path: Path, files: list[str], message: str
) -> None:
    for name in files:
        write(tmp_path / name, "")
    with pytest.raises(UserError, match=message) as raised:
        Folder(tmp_path)
    assert one_line(raised).startswith(str(tmp_path))


def test_a_text_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    paint(tmp_path / "a_target.png")
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"a\.txt: cannot be read as UTF-8"):
        Folder(tmp_path)


# ---- graph200k


def graph(root: Path, **changes: object) -> Path:
    """A Graph200K of one item, with some keys of it replaced."""
    names = ["target", "reference", "sam2_mask", "foreground", "edit_0", "edit_1", "style", "art"]
    for name in names:
        paint(root / f"{name}.png")
    condition = {
        "target": "target.png",
        "reference": "reference.png",
        "sam2_mask": "sam2_mask.png",
        "foreground": "foreground.png",
        "openpose": None,
        "ReduxStyle": {},
        "qwen_2_5_meta": [{"name": "bird"}],
        "FillEdit": {"image_path": ["edit_0.png", "edit_1.png"], "name": "owl", "description": "x"},
        "InstantStyle": {"image_path": ["style.png"], "style_path": ["art.png"]},
    }
    row = {
        "quality_assessment": {"objectConsistency": 3},
        "description": {"item": "A red bird.", "description_0": "It sings."},
        "condition": condition,
    }
    write(root / "data.json", json.dumps([row | changes]))
    return root


def test_graph200k_conditions_have_our_roles(tmp_path: Path) -> None:
    source = Graph200K(graph(tmp_path))
    assert source.roles == set(source.item(0).images)
    assert source.roles == {
        *("target", "reference", "segmentation", "mask"),
        *("before", "style_image", "style_reference"),
    }
    assert len(Graph200K(tmp_path / "data.json")) == 1


def test_graph200k_edits_lead_to_the_target(tmp_path: Path) -> None:
    graph(tmp_path)
    paint(tmp_path / "edit_0.png", "green")
    item = Graph200K(tmp_path).item(0)
    assert item.image("before").getpixel((0, 0)) == (0, 128, 0)
    assert item.texts == {
        "caption": "A red bird. It sings.",
        "instruction": "replace the owl with a red bird",
    }


@pytest.mark.parametrize(
    "quality", [None, {}, {"objectConsistency": None}, {"objectConsistency": 2}]
)
def test_graph200k_leaves_out_a_reference_of_another_subject(
    tmp_path: Path, quality: object
) -> None:
    assert "reference" not in Graph200K(graph(tmp_path, quality_assessment=quality)).roles


def test_graph200k_names_the_item_whose_path_leads_out(tmp_path: Path) -> None:
    path = graph(tmp_path) / "data.json"
    good = {"condition": {"target": str(tmp_path / "target.png")}}
    write(path, json.dumps([good, good, {"condition": {"target": "../../target.png"}}]))
    with pytest.raises(UserError, match=r"item 2: target: .* leads out of"):
        Graph200K(tmp_path)
    write(path, json.dumps([good]))
    assert Graph200K(tmp_path).item(0).image("target").size == (8, 8)


def test_graph200k_without_words_has_no_texts(tmp_path: Path) -> None:
    assert Graph200K(graph(tmp_path, description=None)).item(0).texts == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"condition": None}, "expected an object with the key 'condition'"),
        ({"condition": {"depth": "target.png"}}, "the condition 'target' is missing"),
        ({"condition": {"target": 3}}, "target must be a path or null, not 3"),
        ({"condition": {"target": "gone.png"}}, r"no such file .*gone\.png"),
        ({"condition": {"target": "../target.png"}}, r"target: \.\./target\.png leads out of"),
        (
            {"condition": {"target": "target.png", "depth": "/etc/passwd"}},
            "depth: /etc/passwd leads out of",
        ),
        (
            {"condition": {"target": "target.png", "FillEdit": {"image_path": ["../a.png"]}}},
            r"FillEdit: image_path: \.\./a\.png leads out of",
        ),
        (
            {"condition": {"target": "target.png", "dpeth": "target.png"}},
            "unknown condition 'dpeth'; did you mean depth",
        ),
        ({"condition": {"target": "target.png", "FillEdit": "a.png"}}, "must be an object"),
        (
            {"condition": {"target": "target.png", "InstantStyle": {"image_path": ["art.png"]}}},
            "InstantStyle: style_path must be a list of paths, not None",
        ),
        ({"description": "a bird"}, "description must be an object or null"),
        ({"description": {"item": 3}}, "description: item cannot be 3"),
        (
            {"quality_assessment": {"objectConsistency": "good"}},
            "quality_assessment: objectConsistency cannot be 'good'",
        ),
    ],
)
def test_a_broken_graph200k_item_is_named(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message) as raised:
        Graph200K(graph(tmp_path, **changes))
    assert one_line(raised).startswith(f"{tmp_path / 'data.json'}, item 0: ")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"no such file; expected the data\.json .* found nothing"),
        ("[", "not valid JSON"),
        ("[]", "expected a list of items"),
        ('{"condition": {}}', "expected a list of items"),
    ],
)
def test_a_data_json_that_is_none_is_refused(
    tmp_path: Path, content: str | None, message: str
) -> None:
    if content is not None:
        write(tmp_path / "data.json", content)
    with pytest.raises(UserError, match=message):
        Graph200K(tmp_path)


# ---- dreambooth


def test_dreambooth_pairs_are_ordered_and_of_one_subject(tmp_path: Path) -> None:
    for name in ("cat2/00", "cat2/01", "cat2/02", "red_toy/00", "red_toy/01", "lone/00"):
        paint(tmp_path / "dataset" / f"{name}.jpg")
    source = DreamBooth(tmp_path)
    keys = [source.item(k).key for k in range(len(source))]
    assert len(set(keys)) == len(keys) == 3 * 2 + 2 * 1
    assert keys[-2:] == ["red_toy 00-01", "red_toy 01-00"]
    assert len(DreamBooth(tmp_path / "dataset")) == len(source)


def test_subjects_are_held_out_whole(tmp_path: Path) -> None:
    for name in ("cat2/00", "cat2/01", "cat2/02", "lone/00", "red_toy/00", "red_toy/01"):
        paint(tmp_path / f"{name}.jpg")
    trained, asked = (
        Part(DreamBooth(tmp_path), every=2, held_out=held_out) for held_out in (False, True)
    )
    subjects = [{one.item(k).key.split()[0] for k in range(len(one))} for one in (trained, asked)]
    assert subjects == [{"cat2"}, {"red_toy"}]
    assert units_of(asked).tolist() == [1, 1]  # they still share photos


def test_dreambooth_captions_name_the_class_or_the_folder(tmp_path: Path) -> None:
    for name in ("red_toy2/00", "red_toy2/01"):
        paint(tmp_path / f"{name}.jpg")
    assert DreamBooth(tmp_path).item(0).texts == {"caption": "a red toy"}
    write(
        tmp_path / "prompts_and_classes.txt",
        "Classes\n\nsubject_name,class\nred_toy2,stuffed animal\n\nPrompts\n'a {0}, {1}'\n",
    )
    assert DreamBooth(tmp_path).item(0).texts == {"caption": "a stuffed animal"}


def test_dreambooth_without_pairs_or_classes_is_refused(tmp_path: Path) -> None:
    paint(tmp_path / "cat" / "00.jpg")
    with pytest.raises(UserError, match="two or more photos each; found cat"):
        DreamBooth(tmp_path)
    paint(tmp_path / "cat" / "01.jpg")
    write(tmp_path / "prompts_and_classes.txt", "cat: cat")
    with pytest.raises(UserError, match="expected a line 'subject_name,class'"):
        DreamBooth(tmp_path)


def test_a_declaration_that_is_a_link_to_nowhere_is_not_passed_over(tmp_path: Path) -> None:
    for name in ("cat/00.jpg", "cat/01.jpg"):
        paint(tmp_path / "dogs" / name)
    insdet(tmp_path / "insdet")
    for path in (
        tmp_path / "dogs" / "prompts_and_classes.txt",
        tmp_path / "insdet" / "Scenes" / "same_place.jsonl",
        tmp_path / "depth.toml",
    ):
        path.symlink_to(path.name)
    for read in (
        lambda: DreamBooth(tmp_path / "dogs"),
        lambda: InsDet(tmp_path / "insdet"),
        lambda: declared(tmp_path),
    ):
        with pytest.raises(UserError, match="cannot be read: Too many levels of symbolic links"):
            read()


# ---- insdet

EDGES = ("xmin", "ymin", "xmax", "ymax")


def voc(*values: object) -> str:
    """An annotation of `values`: width and height, then the name and the edges of one box."""
    width, height, name, *edges = values
    box = "".join(f"<{e}>{v}</{e}>" for e, v in zip(EDGES, edges, strict=True))
    return (
        f"<annotation><size><width>{width}</width><height>{height}</height></size>"
        f"<object><name>{name}</name><bndbox>{box}</bndbox></object></annotation>"
    )


def insdet(root: Path, *, views: int = 2) -> Path:
    """One object, a red 10 x 20 block on green, in `views` views, and a scene of 100 x 80."""
    for k in range(1, views + 1):
        photo, mask = Image.new("RGB", (40, 30), "green"), Image.new("L", (40, 30), 0)
        photo.paste("red", (25, 5, 35, 25))
        mask.paste(255, (25, 5, 35, 25))
        folder = root / "Objects" / "007_red_block"
        for name in ("images", "masks"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        photo.save(folder / "images" / f"{k:03}.png")
        mask.save(folder / "masks" / f"{k:03}.png")
    scene = Image.new("RGB", (100, 80), "blue")
    scene.paste("red", (60, 30, 70, 50))
    scene.paste("white", (0, 0, 50, 80))
    (root / "Scenes/easy/desk_001").mkdir(parents=True)
    scene.save(root / "Scenes/easy/desk_001/rgb_000.jpg", quality=100, subsampling=0)
    write(root / "Scenes/easy/desk_001/rgb_000.xml", voc(100, 80, "007_red_block", 60, 30, 70, 50))
    return root


def scene_xml(root: Path) -> Path:
    return root / "Scenes/easy/desk_001/rgb_000.xml"


def test_objects_and_places_are_held_out_whole(tmp_path: Path) -> None:
    insdet(tmp_path, views=3)
    for old, new in (
        ("Objects/007_red_block", "Objects/008_blue_block"),
        ("Scenes/easy/desk_001", "Scenes/easy/desk_002"),
    ):
        shutil.copytree(tmp_path / old, tmp_path / new)
    trained, asked = (
        Part(InsDet(tmp_path), every=2, held_out=held_out) for held_out in (False, True)
    )
    assert len(trained) == len(asked) == 3 + 1  # pairs of views, and a box
    for part, name, desk in (
        (trained, "007_red_block", "desk_001"),
        (asked, "008_blue_block", "desk_002"),
    ):
        kinds = {roles: [part.item(k).key for k in own] for roles, own in part.kinds.items()}
        (turned,) = (keys for roles, keys in kinds.items() if "view_turned" in roles)
        (placed,) = (keys for roles, keys in kinds.items() if "hole" in roles)
        assert {key.split()[0] for key in turned} == {name}
        assert [key.split("/")[0] for key in placed] == [desk]


def test_a_view_is_a_tight_centred_square_on_light_grey(tmp_path: Path) -> None:
    source = InsDet(insdet(tmp_path))
    assert source.roles == {"view", "view_turned", "target", "hole", "box"}
    item = source.item(0)
    assert item.texts == {"caption": "a red block"}
    view = np.array(item.image("view"))
    expected = np.full((20, 20, 3), LIGHT_GREY, np.uint8)
    expected[:, 5:15] = (255, 0, 0)
    assert np.array_equal(view, expected)


def test_a_view_without_a_mask_is_the_whole_photo(tmp_path: Path) -> None:
    insdet(tmp_path)
    (tmp_path / "Objects/007_red_block/masks/001.png").unlink()
    assert InsDet(tmp_path).item(0).image("view").size == (40, 30)


@pytest.mark.parametrize(
    ("views", "first", "last"),
    [(24, "001-004", "024-003"), (2, "001-002", "002-001"), (5, "001-002", "005-001")],
)
def test_a_turn_is_45_degrees_or_one_view(
    tmp_path: Path, views: int, first: str, last: str
) -> None:
    source = InsDet(insdet(tmp_path, views=views))
    assert len(source) == views + 1
    assert source.item(0).key == f"007_red_block {first}"
    assert source.item(views - 1).key == f"007_red_block {last}"


def test_the_hole_hides_the_object_and_nothing_else_changes(tmp_path: Path) -> None:
    source = InsDet(insdet(tmp_path))
    item = source.item(len(source) - 1)
    target, hole = item.image("target"), item.image("hole")
    assert target.size == hole.size == (44, 44)  # 2.2 times the longer side of the box
    changed = ImageChops.difference(target, hole).getbbox()
    assert changed == (15, 10, 30, 35)  # the box, 17..27 x 12..32, and 2 pixels around it
    assert np.array(hole.crop(changed)).min() == np.array(hole.crop(changed)).max() == 128
    assert item.texts == {"caption": "a red block"}


@pytest.mark.parametrize(
    "box", [(0, 0, 10, 20), (90, 60, 100, 80), (-3, 70, 9, 99), (1, 1, 99, 79)]
)
def test_a_crop_stays_in_the_picture_and_holds_its_box(
    tmp_path: Path, box: tuple[int, int, int, int]
) -> None:
    write(scene_xml(insdet(tmp_path)), voc(100, 80, "007_red_block", *box))
    source = InsDet(tmp_path)
    [target, hole] = (source.item(2).image(role) for role in ("target", "hole"))
    assert target.width <= 100
    assert target.height <= 80
    inside = min(box[2], 100) - max(box[0], 0), min(box[3], 80) - max(box[1], 0)
    assert (np.array(hole) == 128).all(axis=-1).sum() >= inside[0] * inside[1]


def test_boxes_of_unknown_objects_are_passed_over(tmp_path: Path) -> None:
    write(scene_xml(insdet(tmp_path)), voc(100, 80, "001_stranger", 60, 30, 70, 50))
    assert InsDet(tmp_path).roles == {"view", "view_turned"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("<annotation>", "not valid XML"),
        ('<!DOCTYPE a [<!ENTITY b "c">]>' + voc(100, 80, "x", 1, 1, 2, 2), "a document type"),
        (voc(80, 100, "x", 1, 1, 2, 2), "80 x 100 pixels, but rgb_000.jpg has 100 x 80"),
        (voc("", 80, "x", 1, 1, 2, 2), "size/width must be a number, found ''"),
        (voc(100, 80, "x", 1, 1, "two", 2), "bndbox/xmax must be a number, found 'two'"),
        (voc(100, 80, "x", 5, 5, 5, 9), "no pixel of the box 5, 5, 5, 9 lies in the picture"),
        (voc(100, 80, "x", 9, 5, 5, 9), "no pixel of the box 9, 5, 5, 9 lies in the picture"),
        (voc(100, 80, "x", 5, 9, 9, 5), "no pixel of the box 5, 9, 9, 5 lies in the picture"),
        (voc(100, 80, "x", 5, 90, 9, 99), "no pixel of the box 5, 90, 9, 99 lies in the picture"),
        (voc(100, 80, "x", "nan", 5, 9, 9), "no pixel of the box nan"),
        (voc(100, 80, "x", 200, 5, 300, 9), "no pixel of the box 200"),
    ],
)
def test_a_broken_annotation_is_named(tmp_path: Path, content: str, message: str) -> None:
    path = write(scene_xml(insdet(tmp_path)), content)
    with pytest.raises(UserError, match=message) as raised:
        InsDet(tmp_path)
    assert one_line(raised).startswith(str(path))


def test_entities_are_refused_in_any_encoding(tmp_path: Path) -> None:
    text = '<!DOCTYPE a [<!ENTITY b "c">]>' + voc(100, 80, "x", 1, 1, 2, 2)
    scene_xml(insdet(tmp_path)).write_bytes(text.encode("utf-16"))
    with pytest.raises(UserError, match="cannot be read as UTF-8"):
        InsDet(tmp_path)


def test_an_annotation_without_its_picture_is_named(tmp_path: Path) -> None:
    scene_xml(insdet(tmp_path)).with_suffix(".jpg").unlink()
    with pytest.raises(UserError, match=r"its picture rgb_000\.jpg is missing"):
        InsDet(tmp_path)


def test_a_mask_that_does_not_fit_is_named(tmp_path: Path) -> None:
    item = InsDet(insdet(tmp_path)).item(0)
    mask = tmp_path / "Objects/007_red_block/masks/001.png"
    Image.new("L", (40, 30), 0).save(mask)
    with pytest.raises(UserError, match=r"001\.png: no white pixel"):
        item.image("view")
    Image.new("L", (30, 40), 255).save(mask)
    with pytest.raises(UserError, match=r"001\.png: \(30, 40\) pixels"):
        item.image("view")


def test_insdet_shows_places_from_two_sides_and_backgrounds(tmp_path: Path) -> None:
    insdet(tmp_path)
    place = tmp_path / "Scenes" / "easy" / "room_001"
    place.mkdir(parents=True)
    for k, colour in enumerate(("red", "green", "blue", "white")):
        Image.new("RGB", (40, 30), colour).save(place / f"rgb_{k:03d}.jpg")
    assert "place" not in InsDet(tmp_path).roles  # neighbours in a folder may be different rooms
    photos = json.dumps([f"easy/room_001/rgb_00{k}.jpg" for k in range(3)])
    write(tmp_path / "Scenes" / "same_place.jsonl", photos)
    (tmp_path / "Background").mkdir()
    Image.new("RGB", (40, 30), "white").save(tmp_path / "Background" / "000.jpg")
    source = InsDet(tmp_path)
    items = {item.key: item for item in map(source.item, range(len(source)))}
    pairs = {key: item for key, item in items.items() if key.startswith("room_001")}
    assert list(pairs) == [f"room_001 rgb_00{a}-rgb_00{b}" for a, b in ("01", "12", "20")]
    last = pairs["room_001 rgb_002-rgb_000"]
    assert last.image("place").getpixel((5, 5))[2] > 200
    assert last.image("place_moved").getpixel((5, 5))[0] > 200
    assert items["background 000"].image("target").size == (40, 30)


def test_insdets_box_is_white_where_the_object_stands(tmp_path: Path) -> None:
    write(scene_xml(insdet(tmp_path)), voc(100, 80, "007_red_block", 45, 30, 55, 50))
    source = InsDet(tmp_path)
    item = next(one for one in map(source.item, range(len(source))) if "box" in one.images)
    box, hole, target = (np.array(item.image(role)) for role in ("box", "hole", "target"))
    assert box.shape == target.shape
    white, filled = (box == 255).all(axis=2), (np.abs(hole.astype(int) - target) > 30).any(axis=2)
    assert 0.05 < white.sum() / white.size < 0.2  # 10 x 20 of 44 x 44, edges included
    assert (white <= ((hole == 128).all(axis=2) | filled)).all()  # the hole is a little larger


@pytest.mark.parametrize("workers", [0, 2])
def test_a_check_reads_all_and_names_what_is_broken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], workers: int
) -> None:
    for role in ("depth", "target"):
        (tmp_path / role).mkdir()
        for k in range(3):
            Image.new("RGB", (20 + k, 10)).save(tmp_path / role / f"{k}.png")
    words = ["data", "check", f"folder={tmp_path}", "--workers", str(workers)]
    main(words)
    said = capsys.readouterr().out
    assert "3 items" in said
    assert re.search(r"depth +3  21 x 10 \(10 to 22 a side\)", said)
    assert re.search(r"restoration +32 with 3 items", said)
    (tmp_path / "depth" / "1.png").write_bytes(b"")
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 1
    shown = capsys.readouterr()
    assert "broken: 1, depth: " in shown.err
    assert "1.png: an empty file" in shown.err
    assert re.search(r"depth +2 ", shown.out)
    with pytest.raises(SystemExit) as ended:
        main(["data", "check", "folder=nowhere"])
    assert ended.value.code == 2


def test_a_check_of_scenes_ends(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("visualcloze_deft.cli.data.CHECKED_SCENES", 2)  # each takes a second
    main(["data", "check", "scenes", "--workers", "2"])
    assert "2 items" in capsys.readouterr().out


def test_a_data_preview_shows_items(tmp_path: Path) -> None:
    main(["data", "preview", "scenes", "--count", "2", "--output", str(tmp_path / "x.png")])
    assert Image.open(tmp_path / "x.png").width > 600


def test_an_insdet_without_objects_is_refused(tmp_path: Path) -> None:
    paint(tmp_path / "Photos" / "000.jpg")
    with pytest.raises(UserError, match="expected the folders Objects and Scenes; found Photos"):
        InsDet(tmp_path)
    paint(tmp_path / "Objects" / "001_cup" / "001.jpg")
    with pytest.raises(
        UserError, match=r"001_cup: expected the folder images in it; found 001\.jp"
    ):
        InsDet(tmp_path)
    paint(tmp_path / "Objects" / "001_cup" / "images" / "001.jpg")
    with pytest.raises(UserError, match="no object with two views"):
        InsDet(tmp_path)


# ---- graph200k as a table


def png(colour: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (24, 16), colour).save(file, "PNG")
    return file.getvalue()


def graph_rows() -> dict[str, list[object]]:
    """Four rows of the published columns: complete; without style; reference of another subject;
    target alone. Pictures of one colour per column."""
    colours = dict(zip(graph200k_hub.COLUMNS, ImageColor.colormap, strict=False))
    rows: dict[str, list[object]] = {}
    for column, colour in colours.items():
        whole = {"bytes": png(colour), "path": None}
        rows[column] = [whole] * 3 + [whole if column == "target" else None]
        if "Style" in column:
            rows[column][1] = None
    rows["description"] = [{"item": "A fox.", "description_0": "In snow."}] * 4
    rows["quality_assessment"] = [{"objectConsistency": k} for k in (5, 3, 2, 5)]
    return rows


def write_table(folder: Path, form: str) -> str:
    """The rows as the hub's parquet, as what `save_to_disk` writes, or with texts as JSON."""
    rows = graph_rows()
    if form == "json":
        for name in ("description", "quality_assessment"):
            rows[name] = [json.dumps(value) for value in rows[name]]
    table = datasets.Dataset.from_dict(rows)
    if form != "json":  # pictures as a feature of the library, else plain cells
        for column in graph200k_hub.COLUMNS:
            table = table.cast_column(column, datasets.Image())
    if form == "disk":
        table.save_to_disk(str(folder / "table"))
        return str(folder / "table")
    (folder / "data").mkdir()
    table.to_parquet(folder / "data" / "test-00000-of-00001.parquet")
    return f"{folder}@test"


@pytest.mark.parametrize("form", ["parquet", "disk", "json"])
def test_a_published_graph200k_is_read_without_unpacking(tmp_path: Path, form: str) -> None:
    source = open_source(f"graph200k={write_table(tmp_path, form)}", size=32, seed=0)
    everything = frozenset(graph200k_hub.COLUMNS.values())
    assert source.roles == everything == Graph200K.may_have
    assert len(source) == 4
    style = {role for role in everything if "style" in role or "redux" in role}
    expected = [everything, everything - style, everything - {"reference"}, {"target"}]
    assert [set(source.item(k).images) for k in range(4)] == [set(roles) for roles in expected]
    told = {k: roles for roles, indices in source.kinds.items() for k in indices}
    assert [told[k] for k in range(4)] == [frozenset(roles) for roles in expected]
    colours = dict(zip(graph200k_hub.COLUMNS, ImageColor.colormap, strict=False))
    for column, role in graph200k_hub.COLUMNS.items():
        if role == "mask":  # which is read as one, in grey
            continue
        found = source.item(0).image(role).getpixel((3, 3))
        assert found == ImageColor.getrgb(colours[column]), column
    assert source.item(0).texts["caption"] == "A fox. In snow."
    again = pickle.loads(pickle.dumps(source))  # as a worker process gets it
    assert again.item(1).image("depth").tobytes() == source.item(1).image("depth").tobytes()


def test_a_broken_cell_names_its_item_and_role(tmp_path: Path) -> None:
    rows = graph_rows()
    rows["depth"][1] = {"bytes": png("red")[:-30], "path": None}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "train.parquet")
    source = open_source(f"graph200k={tmp_path}", size=32, seed=0)
    with pytest.raises(UserError, match=r"item 1, depth: cannot be read as an image"):
        source.item(1).image("depth")


def test_a_table_in_the_wrong_place_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"expected data.json, train\*.parquet"):
        open_source(f"graph200k={tmp_path}", size=32, seed=0)
    datasets.Dataset.from_dict({"text": ["a"]}).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(UserError, match="expected Graph200K's columns, target among them"):
        open_source(f"graph200k={tmp_path}", size=32, seed=0)
    (tmp_path / "train.parquet").write_bytes(b"nothing")
    with pytest.raises(UserError):
        open_source(f"graph200k={tmp_path}", size=32, seed=0)


# ---- the table of sources


def example(name: str, root: Path) -> str:
    """A spec of each source, with a tiny folder for it."""
    if name == "scenes":
        return "scenes=3"
    if name == "subject":
        return name
    if name == "graph200k":
        graph(root)
    elif name == "insdet":
        insdet(root)
    elif name == "dreambench-plus":
        paint(root / "data" / "images" / "animal" / "00.jpg")
        write(root / "data" / "captions" / "animal" / "00.txt", "fox\na fox at sea\na fox in snow")
    else:
        names = {"folder": "a_depth a_target", "dreambooth": "cat/00 cat/01", "photos": "00 01"}
        for stem in names[name].split():
            paint(root / f"{stem}.jpg")
    return f"{name}={root}"


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_keeps_the_promises_of_a_source(name: str, tmp_path: Path) -> None:
    source = open_source(example(name, tmp_path), size=16, seed=0)
    assert source.name == name
    items = [source.item(k) for k in range(len(source))]
    assert source.roles == {role for item in items for role in item.images}
    assert len({item.key for item in items}) == len(items)
    told = {k: roles for roles, indices in source.kinds.items() for k in indices}
    assert told == {k: frozenset(item.images) for k, item in enumerate(items)}
    again = pickle.loads(pickle.dumps(source)).item(0)  # as a worker process gets it
    for role, make in items[0].images.items():
        assert make().mode == "RGB"
        assert np.array_equal(np.array(make()), np.array(again.image(role)))


@pytest.mark.parametrize("name", [name for name in SOURCES if name not in PROCEDURAL])
def test_opening_a_source_decodes_no_picture(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = example(name, tmp_path)
    monkeypatch.setattr(Image.Image, "load", pytest.fail)
    source = open_source(spec, size=16, seed=0)
    source.item(len(source) - 1)


@pytest.mark.parametrize("name", [name for name in SOURCES if name not in PROCEDURAL])
def test_an_empty_folder_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"expected .*found nothing") as raised:
        open_source(f"{name}={tmp_path}", size=16, seed=0)
    assert one_line(raised).startswith(str(tmp_path))


def test_scenes_are_as_many_as_asked_for() -> None:
    assert len(open_source("scenes=7", size=16, seed=0)) == 7
    assert len(open_source("scenes", size=16, seed=0)) == 1_000_000


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("folders=x", "unknown data source 'folders'; did you mean folder"),
        ("", "unknown data source ''; known: dreambench-plus, dreambooth, folder"),
        ("scenes=0", "scenes=0: the number of scenes must be a whole number above 0"),
        ("scenes=-1", "whole number above 0"),
        ("scenes=many", "whole number above 0"),
        (f"scenes={'9' * 20}", "whole number above 0"),
        (f"subject={'9' * 5000}", "expected subject=N"),
        ("scenes=1e3", "whole number above 0"),
        ("subject=cube", "subject=cube: expected subject=N, or subject=N/views"),
        ("subject=0/pictures", "expected subject=N"),
        ("subject=0/2/views", "expected subject=N"),
        *(
            (name, f"'{name}' needs a path: {name}=PATH")
            for name in SOURCES
            if name not in PROCEDURAL
        ),
        *((f"{name}=/no/where", "no such") for name in SOURCES if name not in PROCEDURAL),
    ],
)
def test_a_spec_that_opens_nothing_is_refused(spec: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        open_source(spec, size=16, seed=0)
    one_line(raised)


# ---- real data


@real_data
@pytest.mark.parametrize(
    ("spec", "count", "roles"),
    [
        ("graph200k", 17, "target reference depth canny normal segmentation before mask"),
        ("dreambooth", 192, "reference target"),
        ("dreambench_plus", 6, "reference"),
        ("insdet", 9, "view view_turned hole target box"),
        ("pairs", 53, "before target image_1 image_2"),
    ],
)
def test_real_folders_are_read(spec: str, count: int, roles: str) -> None:
    kind = "folder" if spec == "pairs" else spec.replace("_", "-")
    source = open_source(f"{kind}={REAL / spec}", size=64, seed=0)
    assert len(source) == count
    assert source.roles >= set(roles.split())
    item = source.item(len(source) - 1)
    for role in item.images:
        assert item.image(role).mode == "RGB"


@real_data
def test_a_real_edit_keeps_the_surroundings() -> None:
    item = Graph200K(REAL / "graph200k").item(16)
    before, target = (np.array(item.image(role), np.float64) for role in ("before", "target"))
    assert np.abs(before - target)[:, :64].mean() < 8
    assert np.abs(before - target)[200:400, 200:300].mean() > 30


@real_data
def test_a_real_hole_lies_in_the_middle_of_its_crop() -> None:
    source = InsDet(REAL / "insdet")
    items = map(source.item, range(len(source)))
    item = next(item for item in items if "hole" in item.images)
    box = ImageChops.difference(item.image("target"), item.image("hole")).getbbox()
    assert box is not None
    middle = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    assert middle == pytest.approx([side / 2 for side in item.image("target").size], abs=2)
