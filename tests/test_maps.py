"""A mask is white on its object and depth bright where it is near, however a file codes them; maps
lie on the picture that they are of.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.stats import spearmanr

from visualcloze_deft.cli import main
from visualcloze_deft.data.sources.folder import Folder
from visualcloze_deft.data.sources.insdet import View, alone
from visualcloze_deft.errors import UserError
from visualcloze_deft.images.maps import read_role
from visualcloze_deft.inference.grid_reading import read_requests
from visualcloze_deft.inference.request import request
from visualcloze_deft.task_registry.files import load_tasks

OBJECT = np.zeros((32, 32), bool)
OBJECT[8:24, 6:20] = True


def photo(seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 200, (32, 32, 3), np.uint8)
    return Image.fromarray(noise)


def palette(values: np.ndarray, colours: list[int]) -> Image.Image:
    image = Image.fromarray(values.astype(np.uint8), "P")
    image.putpalette(colours)
    return image


def cut_out(colour: Image.Image) -> Image.Image:
    image = colour.convert("RGBA")
    image.putalpha(Image.fromarray(np.where(OBJECT, 255, 0).astype(np.uint8)))
    return image


BORDER = OBJECT.copy()
BORDER[7, 6:20] = True
VOC = [0, 0, 0, 128, 0, 0, 0, 128, 0] + [0] * (252 * 3) + [224, 224, 192]
BYTES = OBJECT.astype(np.uint8)
CODED = {  # how a file codes OBJECT -> the file, and a word that `data check` has for it
    "black and white": (Image.fromarray(255 * BYTES), "0/255"),
    "one bit": (Image.fromarray(OBJECT), "0/255"),
    "0 and 1": (Image.fromarray(BYTES), "0/1"),
    "0 and 1 in 16 bits": (Image.fromarray(BYTES.astype(np.uint16)), "0/1"),
    "0 and 1 as fractions": (Image.fromarray(OBJECT.astype(np.float32)), "0/1"),
    "0 and 128": (Image.fromarray(128 * BYTES), "0/128"),
    "16 bits": (Image.fromarray(65535 * BYTES.astype(np.uint16)), "0/65535"),
    "number 7": (Image.fromarray(7 * BYTES), "numbers 0 to 7"),
    "palette": (palette(BYTES, VOC), "palette"),
    "palette with a border": (palette(np.where(BORDER & ~OBJECT, 255, BYTES), VOC), "palette"),
    "palette in another order": (palette(1 - BYTES, [0, 0, 90, 0, 0, 0]), "palette"),
    "grey palette of 0 and 1": (palette(BYTES, [0, 0, 0, 1, 1, 1]), "0/1"),
    "numbers with a border": (Image.fromarray(np.where(BORDER & ~OBJECT, 255, 3 * BYTES)), "255"),
    "colours": (palette(BYTES, VOC).convert("RGB"), "colours"),
    "cut out": (cut_out(photo()), "alpha"),
    "cut out, black": (cut_out(Image.new("RGB", (32, 32))), "alpha"),
    "cut out, grey": (cut_out(photo().convert("L").convert("RGB")).convert("LA"), "alpha"),
}


@pytest.mark.parametrize("coded", CODED)
def test_a_mask_is_white_on_its_object(tmp_path: Path, coded: str) -> None:
    image, said = CODED[coded]
    path = tmp_path / f"a.{'tiff' if image.mode == 'F' else 'png'}"
    image.save(path)
    found = read_role("mask", path)
    assert np.array_equal(np.asarray(found.convert("L")), 255 * BYTES)
    assert said in found.info["read_as"]
    found.save(tmp_path / "again.png")
    assert np.array_equal(np.asarray(read_role("mask", tmp_path / "again.png")), np.asarray(found))


def test_a_soft_mask_stays_soft_and_a_blank_one_blank(tmp_path: Path) -> None:
    ramp = np.tile(np.arange(256, dtype=np.uint8), (4, 1))
    Image.fromarray(ramp).save(tmp_path / "soft.png")
    assert np.array_equal(np.asarray(read_role("mask", tmp_path / "soft.png"))[..., 0], ramp)
    for value in (0, 255):
        Image.new("L", (4, 4), value).save(tmp_path / "blank.png")
        assert np.asarray(read_role("mask", tmp_path / "blank.png")).min() == value
        assert np.asarray(read_role("mask", tmp_path / "blank.png")).max() == value


@pytest.mark.parametrize("coded", ["0 and 1", "palette", "cut out"])
def test_every_command_reads_a_mask_alike(
    tmp_path: Path, coded: str, capsys: pytest.CaptureFixture[str]
) -> None:
    image, said = CODED[coded]
    (tmp_path / "F" / "target").mkdir(parents=True)
    (tmp_path / "F" / "mask").mkdir()
    for k in range(2):
        photo(k).save(tmp_path / "F" / "target" / f"{k}.png")
        image.save(tmp_path / "F" / "mask" / f"{k}.png")
    main(["data", "check", f"folder={tmp_path / 'F'}", "--workers", "0"])
    assert f"mask: {said}" in capsys.readouterr().out
    words = ["tasks", "example", "foreground-to-image", "--data", f"folder={tmp_path / 'F'}"]
    main([*words, "--resolution", "32", "--output", str(tmp_path / "ex")])
    shown, target = (np.asarray(Image.open(tmp_path / "ex" / f"001-1{c}.png")) for c in (1, 2))
    assert np.array_equal(shown, np.where(OBJECT[..., None], target, 255))
    image.save(tmp_path / "view.png")  # InsDet's masks, and those of grids, follow the same rule
    view = alone(View(image=tmp_path / "F/target/0.png", mask=tmp_path / "view.png"))
    assert view.size == (16, 16)
    columns = {"mask": ("mask",), "target": ("photo",)}
    task = replace(load_tasks()["depth-to-image"], name="mask-to-image", columns=columns)
    tasks = {task.name: replace(task, instructions=("From {mask} to {target}.",))}
    grid = {"task": task.name, "rows": [["view.png", None]]}
    (tmp_path / "grid.json").write_text(json.dumps(grid))
    (asked,) = read_requests(tmp_path / "grid.json", tasks)
    given = request([[image, None]], tasks, task=task.name)
    for mask in (asked.rows[0][0], given.rows[0][0]):
        assert mask is not None
        assert np.array_equal(np.asarray(mask.convert("L")), 255 * BYTES)


def test_a_mask_that_marks_nothing_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for role, image in (("target", photo()), ("mask", Image.new("L", (32, 32)))):
        (tmp_path / role).mkdir()
        image.save(tmp_path / role / "0.png")
    main(["data", "check", f"folder={tmp_path}", "--workers", "0"])
    assert "mask: all of one value in 1 items" in capsys.readouterr().out


# ---- depth

MILLIMETRES = np.linspace(500, 6000, 64 * 64).reshape(64, 64).round().astype(np.uint16)


def with_corner(values: np.ndarray) -> np.ndarray:
    found = values.copy()
    found[56:, 56:] = 0
    return found


def depth_in(folder: Path, values: np.ndarray, told: str = "") -> np.ndarray:
    """What a source makes of a depth map of these values, and of a `depth.toml`."""
    for role in ("depth", "target"):
        (folder / role).mkdir(parents=True, exist_ok=True)
    kind = "tiff" if values.dtype.kind == "f" else "png"
    Image.fromarray(values).save(folder / "depth" / f"0.{kind}")
    Image.new("RGB", (values.shape[1], values.shape[0]), "red").save(folder / "target" / "0.png")
    if told:
        (folder / "depth.toml").write_text(told)
    found = np.asarray(Folder(folder).item(0).image("depth"))
    assert (found[..., :1] == found).all()
    return found[..., 0].astype(int)


def near_is_bright(found: np.ndarray, distance: np.ndarray) -> None:
    measured = distance > 0
    assert np.ptp(found[measured]) >= 200
    assert spearmanr(found[measured], distance[measured]).statistic < -0.9
    assert (found[~measured] <= 40).all()


def test_millimetres_become_near_is_bright(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = with_corner(MILLIMETRES)
    near_is_bright(depth_in(tmp_path, values), values)
    main(["data", "check", f"folder={tmp_path}", "--workers", "0"])
    said = capsys.readouterr().out
    assert "depth: metric, in mm, near and far by percentiles" in said
    assert "0.554 to 5.94 m" in said


def test_maps_that_fill_their_range_stay_as_they_are(tmp_path: Path) -> None:
    full = np.linspace(0, 65535, 64 * 64).reshape(64, 64).round().astype(np.uint16)
    assert np.abs(depth_in(tmp_path / "16", full) - full / 257).max() <= 0.5 + 1e-9
    eight = (full // 257).astype(np.uint8)
    assert np.array_equal(depth_in(tmp_path / "8", eight), eight)


@pytest.mark.parametrize(
    ("told", "values"),
    [
        ("meaning = 'metric'", MILLIMETRES),
        ("meaning = 'metric'\nunit = 5000", MILLIMETRES * 5),
        ("meaning = 'metric'\nunit = 'm'", MILLIMETRES.astype(np.float32) / 1000),
        ("meaning = 'metric'\nnear = 0.5\nfar = 6.0", MILLIMETRES),
        ("meaning = 'disparity'", (1e6 / MILLIMETRES).astype(np.float32)),
        ("meaning = 'disparity'", (6100 - MILLIMETRES).astype(np.uint16)),
        ("meaning = 'picture'\nbright = 'far'", (MILLIMETRES // 24).astype(np.uint8)),
    ],
)
def test_what_values_mean_is_declared(tmp_path: Path, told: str, values: np.ndarray) -> None:
    found = depth_in(tmp_path, values, told)
    assert np.ptp(found) >= 200
    assert spearmanr(found.ravel(), MILLIMETRES.ravel()).statistic < -0.9


def test_near_and_far_hold_for_all_files(tmp_path: Path) -> None:
    told = "meaning = 'metric'\nnear = 1.0\nfar = 5.0"
    found = depth_in(tmp_path, np.array([[500, 1000, 3000, 5000, 9000, 0]], np.uint16), told)
    assert found[0].tolist() == [255, 255, 128, 0, 0, 0]
    zero = np.array([[0, 1000, 3000, 5000]], np.uint16)
    assert depth_in(tmp_path, zero, f"{told}\nzero = 'value'")[0].tolist() == [255, 255, 128, 0]


@pytest.mark.parametrize("values", [np.zeros((8, 8), np.uint16), np.full((8, 8), 700, np.uint16)])
def test_depth_without_any_range_is_flat(tmp_path: Path, values: np.ndarray) -> None:
    assert np.ptp(depth_in(tmp_path, values)) == 0


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ("meaning = 'far'", r"depth\.toml: meaning: input should be"),
        ("unit = 'mm'", r"depth\.toml: meaning: field required"),
        ("meaning = 'metric'\nnear = 5.0\nfar = 1.0", r"near = 5 must be less than far = 1"),
        ("meaning = 'metric'\nnear = true", r"depth\.toml: near: input should be a valid number"),
        ("meaning = 'metric'\nneer = 1", r"depth\.toml: neer: extra inputs are not permitted"),
        ("meaning = 'disparity'\nnear = 1.0", "near and far are metres, for meaning = 'metric'"),
        ("meaning = 'metric'\nbright = 'far'", "bright is for meaning = 'picture'"),
        ("meaning", r"depth\.toml: not valid TOML"),
    ],
)
def test_a_declaration_that_is_none_is_refused(tmp_path: Path, told: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        depth_in(tmp_path, MILLIMETRES, told)


def test_fractions_need_a_declaration(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no fixed range; say what they are in a depth\.toml"):
        depth_in(tmp_path, MILLIMETRES.astype(np.float32))


def test_a_grid_reads_depth_as_its_task_means_it(tmp_path: Path) -> None:
    Image.fromarray(MILLIMETRES).save(tmp_path / "a.png")
    grid = {"task": "depth-to-image", "rows": [["a.png", None]]}
    (tmp_path / "grid.json").write_text(json.dumps(grid))
    (asked,) = read_requests(tmp_path / "grid.json", load_tasks())
    given = request([[Image.fromarray(MILLIMETRES), None]], load_tasks(), task="depth-to-image")
    for image in (asked.rows[0][0], given.rows[0][0]):
        assert image is not None
        near_is_bright(np.asarray(image)[..., 0].astype(int), MILLIMETRES)


def test_pictures_of_few_levels_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    depth_in(tmp_path, (np.arange(64 * 64) % 28).reshape(64, 64).astype(np.uint8))
    main(["data", "check", f"folder={tmp_path}", "--workers", "0"])
    assert "depth: uses 27 of 255 levels" in capsys.readouterr().out


def test_files_that_are_read_in_several_ways_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    depth_in(tmp_path, MILLIMETRES)
    Image.fromarray(MILLIMETRES * 10).save(tmp_path / "depth" / "1.png")  # fills its range
    Image.new("RGB", (64, 64)).save(tmp_path / "target" / "1.png")
    main(["data", "check", f"folder={tmp_path}", "--workers", "0"])
    assert "depth: its files were read in 2 ways" in capsys.readouterr().out


# ---- maps lie on their picture


@pytest.mark.parametrize(
    ("role", "task"),
    [("depth", "depth-to-image"), ("normal", "normal-to-image"), ("canny", "canny-to-image")],
)
@pytest.mark.parametrize(
    ("size", "why"), [((32, 48), "lies on its side"), ((40, 40), "cut them alike")]
)
def test_a_map_of_another_shape_is_refused(
    tmp_path: Path,
    role: str,
    task: str,
    size: tuple[int, int],
    why: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, shape in ((role, size), ("target", (48, 32))):
        (tmp_path / name).mkdir()
        for k in range(2):
            Image.new("RGB", shape).save(tmp_path / name / f"{k}.png")
    said = f"{role} has {size[0]} x {size[1]} pixels, but target has 48 x 32"
    with pytest.raises(SystemExit) as ended:
        main(["data", "check", f"folder={tmp_path}", "--workers", "0"])
    assert ended.value.code == 1
    shown = capsys.readouterr().err
    assert said in shown
    assert why in shown
    words = ["tasks", "example", task, "--data", f"folder={tmp_path}", "--resolution", "32"]
    with pytest.raises(SystemExit) as ended:
        main([*words, "--output", str(tmp_path / "ex")])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("size", "orientation", "doubt"),
    [((32, 32), 6, True), ((48, 32), 3, True), ((48, 32), 1, False)],
)
def test_maps_that_no_shape_tells_upright_are_said(
    tmp_path: Path,
    size: tuple[int, int],
    orientation: int,
    doubt: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    for role, how in (("depth", {}), ("target", {"exif": exif})):
        (tmp_path / role).mkdir()
        Image.new("RGB", size).save(tmp_path / role / "0.png", **how)
    main(["data", "check", f"folder={tmp_path}", "--workers", "0"])
    said = "depth: 1 lie beside a target that EXIF turns" in capsys.readouterr().out
    assert said == doubt


def test_a_smaller_map_and_another_picture_are_as_they_are(tmp_path: Path) -> None:
    for role, size in (("depth", (24, 16)), ("target", (48, 32)), ("reference", (20, 30))):
        (tmp_path / role).mkdir()
        Image.new("RGB", size).save(tmp_path / role / "0.png")
    main(["data", "check", f"folder={tmp_path}", "--workers", "0"])


def test_a_picture_that_is_a_line_is_refused(tmp_path: Path) -> None:
    for role in ("before", "target"):
        (tmp_path / role).mkdir()
        for k in range(2):
            Image.new("RGB", (2000, 2)).save(tmp_path / role / f"{k}.png")
    words = ["tasks", "example", "image-editing", "--data", f"folder={tmp_path}"]
    with pytest.raises(SystemExit) as ended:
        main([*words, "--resolution", "32", "--output", str(tmp_path / "ex")])
    assert ended.value.code == 2
    with pytest.raises(UserError, match="2000 x 2 pixels: more than 16 times as long as wide"):
        request([[Image.new("RGB", (2000, 2)), None]], load_tasks())
