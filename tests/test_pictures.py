"""Pictures are read as they were meant: colours by their profile, upright by the orientation tag
alone, whatever the suffix, and nothing that is no file is waited for.
"""

from __future__ import annotations

import io
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, TiffImagePlugin

from visualcloze_deft.cli import main
from visualcloze_deft.errors import UserError
from visualcloze_deft.images.reading import SUFFIXES, images_in, picture_size, read_crop, read_image

# ---- profiles

PRIMARIES = {  # x and y of red, green and blue, and the exponent
    "Display P3": ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060), 2.2),
    "Adobe RGB": ((0.640, 0.330), (0.210, 0.710), (0.150, 0.060), 2.19921875),
    "ProPhoto": ((0.7347, 0.2653), (0.1596, 0.8404), (0.0366, 0.0001), 1.8),
}
WHITE = (0.3127, 0.3290)  # D65
D50 = np.array([0.9642, 1.0, 0.8249])


def xyz(x: float, y: float) -> np.ndarray:
    return np.array([x / y, 1, (1 - x - y) / y])


def profile(name: str) -> bytes:
    """An ICC profile of three primaries, D65 and an exponent (ICC.1:2001-04, 6.3.1.2)."""
    *corners, gamma = PRIMARIES[name]
    matrix = np.stack([xyz(*corner) for corner in corners], axis=1)
    matrix = matrix * np.linalg.solve(matrix, xyz(*WHITE))
    bradford = np.array(
        [[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]]
    )
    scale = (bradford @ D50) / (bradford @ xyz(*WHITE))
    matrix = np.linalg.inv(bradford) @ np.diag(scale) @ bradford @ matrix

    def fixed(values: np.ndarray) -> bytes:
        return b"XYZ \0\0\0\0" + b"".join(struct.pack(">i", round(v * 65536)) for v in values)

    text = b"desc\0\0\0\0" + struct.pack(">I", 2) + b"x\0" + b"\0" * 78
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    tags = {b"desc": text, b"cprt": b"text\0\0\0\0x\0", b"wtpt": fixed(D50)}
    tags |= {name: fixed(matrix[:, k]) for k, name in enumerate((b"rXYZ", b"gXYZ", b"bXYZ"))}
    tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve)
    table, body = struct.pack(">I", len(tags)), b""
    for tag, data in tags.items():
        table += tag + struct.pack(">II", 132 + 12 * len(tags) + len(body), len(data))
        body += data + b"\0" * (-len(data) % 4)
    head = struct.pack(">I4sI4s4s4s", 0, b"lcms", 0x02400000, b"mntr", b"RGB ", b"XYZ ")
    head += b"\0" * 12 + b"acsp" + b"\0" * 28 + fixed(D50)[8:]
    whole = head.ljust(128, b"\0") + table + body
    return struct.pack(">I", len(whole)) + whole[4:]


def colours() -> Image.Image:
    noise = np.random.default_rng(0).integers(60, 200, (16, 16, 3), np.uint8)
    return Image.fromarray(noise)


def converted(image: Image.Image, icc: bytes) -> Image.Image:
    """`image`, which is sRGB, in the colours of another profile."""
    srgb = ImageCms.createProfile("sRGB")
    given = ImageCms.ImageCmsProfile(io.BytesIO(icc))
    found = ImageCms.profileToProfile(image, srgb, given)
    assert found is not None
    return found


def off(image: Image.Image, other: Image.Image) -> np.ndarray:
    return np.abs(np.asarray(image, np.int16) - np.asarray(other, np.int16))


@pytest.mark.parametrize("name", PRIMARIES)
@pytest.mark.parametrize("suffix", ["png", "webp", "tiff"])
def test_a_picture_of_another_profile_is_read_in_srgb(
    tmp_path: Path, name: str, suffix: str
) -> None:
    icc, path = profile(name), tmp_path / f"a.{suffix}"
    other = converted(colours(), icc)
    assert off(other, colours()).max() > 20
    lossless = {"lossless": True} if suffix == "webp" else {}
    other.save(path, icc_profile=icc, **lossless)
    found = read_image(path)
    assert off(found, colours()).mean() < 1.5
    assert np.percentile(off(found, colours()), 99) <= 6
    crop = read_crop(path, (2, 3, 12, 13), size=10)
    assert off(crop, found.crop((2, 3, 12, 13))).max() == 0


def test_a_picture_that_is_saved_again_is_not_converted_twice(tmp_path: Path) -> None:
    icc = profile("Display P3")
    converted(colours(), icc).save(tmp_path / "a.png", icc_profile=icc)
    once = read_image(tmp_path / "a.png")
    once.save(tmp_path / "b.png")
    assert off(read_image(tmp_path / "b.png"), once).max() == 0


def test_transparency_stays_where_a_profile_is_converted(tmp_path: Path) -> None:
    icc = profile("Adobe RGB")
    image = converted(colours(), icc).convert("RGBA")
    image.putalpha(Image.new("L", image.size, 0))
    image.paste(255, (0, 0, 8, 16), Image.new("L", (8, 16), 0))
    alpha = np.zeros((16, 16), np.uint8)
    alpha[:, :8] = 255
    image.putalpha(Image.fromarray(alpha))
    image.save(tmp_path / "a.png", icc_profile=icc)
    found = np.asarray(read_image(tmp_path / "a.png"))
    assert (found[:, 8:] == 255).all()
    assert off(Image.fromarray(found[:, :8]), colours().crop((0, 0, 8, 16))).mean() < 1.5


@pytest.mark.parametrize("icc", [b"", b"nothing", profile("ProPhoto")[:200], b"\0" * 4096])
def test_a_broken_profile_leaves_the_pixels_as_they_are(tmp_path: Path, icc: bytes) -> None:
    colours().save(tmp_path / "a.png", icc_profile=icc)
    assert off(read_image(tmp_path / "a.png"), colours()).max() == 0


def test_a_profile_of_another_kind_of_picture_changes_nothing(tmp_path: Path) -> None:
    grey = colours().convert("L")
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    grey.save(tmp_path / "a.png", icc_profile=lab)
    assert off(read_image(tmp_path / "a.png"), grey.convert("RGB")).max() == 0


def test_srgb_under_its_own_profile_stays_as_it_is_to_the_bit(tmp_path: Path) -> None:
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    colours().save(tmp_path / "a.png", icc_profile=icc)
    assert off(read_image(tmp_path / "a.png"), colours()).max() == 0


def test_lab_is_read_in_srgb(tmp_path: Path) -> None:
    lab = ImageCms.createProfile("LAB")
    image = ImageCms.profileToProfile(
        colours(), ImageCms.createProfile("sRGB"), lab, outputMode="LAB"
    )
    assert image is not None
    image.save(tmp_path / "a.tiff")
    assert off(read_image(tmp_path / "a.tiff"), colours()).mean() < 3


# ---- orientation

ORIENTATION = 0x0112
ODD = {  # tag, type, count and value of another entry, which Pillow cannot write again
    "text where a ratio stands": (0x011A, 2, 4, b"abc\0"),
    "bytes where a ratio stands": (0x011A, 7, 4, b"abcd"),
    "no number": (0x011A, 11, 1, struct.pack("<f", float("nan"))),
    "a negative width": (0x011A, 9, 1, struct.pack("<i", -5)),
    "text where a number stands": (0x0100, 2, 4, b"abc\0"),
    "a directory at no place": (0x8769, 4, 1, b"\xff\xff\xff\xff"),
    "an unknown type": (0x9999, 99, 1, b"abcd"),
}


def exif(*entries: tuple[int, int, int, bytes]) -> bytes:
    data = b"II*\0" + struct.pack("<IH", 8, len(entries))
    for tag, kind, count, value in entries:
        data += struct.pack("<HHI", tag, kind, count) + value
    return b"Exif\0\0" + data + b"\0" * 8


def turned_by(orientation: int, *more: tuple[int, int, int, bytes]) -> bytes:
    return exif((ORIENTATION, 3, 1, struct.pack("<I", orientation)), *more)


def marked() -> Image.Image:
    """Wider than high, its corners of four colours."""
    image = Image.new("RGB", (48, 32), "red")
    for box, colour in (
        ((24, 0, 48, 16), "lime"),
        ((0, 16, 24, 32), "blue"),
        ((24, 16, 48, 32), "white"),
    ):
        image.paste(colour, box)
    return image


CORNERS = {  # orientation -> the colours of the corners, row by row (EXIF 2.32, table 6)
    1: ("red", "lime", "blue", "white"),
    2: ("lime", "red", "white", "blue"),
    3: ("white", "blue", "lime", "red"),
    4: ("blue", "white", "red", "lime"),
    5: ("red", "blue", "lime", "white"),
    6: ("blue", "red", "white", "lime"),
    7: ("white", "lime", "blue", "red"),
    8: ("lime", "white", "red", "blue"),
}


def corners(image: Image.Image) -> tuple[str, ...]:
    names = {(255, 0, 0): "red", (0, 255, 0): "lime", (0, 0, 255): "blue"}
    names |= {(255, 255, 255): "white"}
    w, h = image.width - 4, image.height - 4
    pixels = [image.getpixel(place) for place in ((4, 4), (w, 4), (4, h), (w, h))]
    return tuple(names[tuple(255 * (v > 127) for v in pixel)] for pixel in pixels)  # type: ignore


@pytest.mark.parametrize("orientation", CORNERS)
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "avif"])
def test_a_picture_is_turned_as_its_orientation_says(
    tmp_path: Path, suffix: str, orientation: int
) -> None:
    path = tmp_path / f"a.{suffix}"
    marked().save(path, exif=turned_by(orientation), quality=100)
    found = read_image(path)
    assert corners(found) == CORNERS[orientation]
    assert found.size == picture_size(path)
    assert corners(read_crop(path, (0, 0, *found.size), size=32)) == CORNERS[orientation]


@pytest.mark.parametrize("orientation", CORNERS)
@pytest.mark.parametrize(("compression", "odd"), [(None, False), ("tiff_lzw", False), (None, True)])
def test_so_is_a_tiff(tmp_path: Path, compression: str | None, orientation: int, odd: bool) -> None:
    path = tmp_path / "a.tif"
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[ORIENTATION] = orientation
    if odd:
        tags.tagtype[0x010F] = 11
        tags[0x010F] = float("nan")  # the maker, as a number that is none
    marked().save(path, tiffinfo=tags, compression=compression)
    found = read_image(path)
    assert corners(found) == CORNERS[orientation]
    assert found.size == picture_size(path)
    assert corners(read_crop(path, (0, 0, *found.size), size=32)) == CORNERS[orientation]


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_the_rest_of_exif_may_be_anything(tmp_path: Path, odd: str, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    marked().save(path, exif=turned_by(6, ODD[odd]), quality=100)
    assert corners(read_image(path)) == CORNERS[6]
    assert picture_size(path) == (32, 48)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"Exif\0\0",
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        turned_by(6)[:20],
        turned_by(0),
        turned_by(77),
        exif((ORIENTATION, 2, 4, b"six\0")),
        exif((ORIENTATION, 3, 2, b"\6\0\6\0")),
    ],
)
def test_an_orientation_that_is_none_turns_nothing(tmp_path: Path, data: bytes) -> None:
    marked().save(tmp_path / "a.png", exif=data)
    assert corners(read_image(tmp_path / "a.png")) == CORNERS[1]


def test_any_bytes_for_exif_end_in_a_picture(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    good = bytearray(turned_by(6, *ODD.values()))
    for _ in range(200):
        data = bytearray(good)
        for place in rng.integers(6, len(data), 3):
            data[place] = rng.integers(256)
        marked().save(tmp_path / "a.jpg", exif=bytes(data))
        assert sorted(read_image(tmp_path / "a.jpg").size) == [32, 48]


def test_odd_exif_breaks_no_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for role in ("before", "target"):
        (tmp_path / role).mkdir()
        marked().save(tmp_path / role / "0.jpg", exif=turned_by(6, *ODD.values()))
    main(["data", "check", f"folder={tmp_path}", "--workers", "0"])
    said = capsys.readouterr()
    assert "before      1  32 x 48" in said.out
    assert "broken" not in said.err


# ---- suffixes, and what is no file


@pytest.mark.parametrize("suffix", sorted(SUFFIXES - {".heic", ".heif", ".hif"}))
def test_every_suffix_is_read(tmp_path: Path, suffix: str) -> None:
    form = {".avif": "AVIF", ".jp2": "JPEG2000", ".j2k": "JPEG2000", ".tga": "TGA"}.get(suffix)
    form = form or {".jfif": "JPEG", ".jpe": "JPEG", ".apng": "PNG"}.get(suffix)
    image = marked().convert("1") if suffix == ".pbm" else marked()
    image.save(tmp_path / f"a{suffix}", format=form)
    assert list(images_in(tmp_path)) == ["a"]
    assert read_image(tmp_path / f"a{suffix}").size == (48, 32)


def test_heic_is_named_where_it_cannot_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for role in ("before", "target"):
        (tmp_path / role).mkdir()
        marked().save(tmp_path / role / "0.png")
        (tmp_path / role / "1.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    with pytest.raises(SystemExit) as ended:
        main(["data", "check", f"folder={tmp_path}", "--workers", "0"])
    assert ended.value.code == 1
    said = capsys.readouterr()
    assert "before      1  48 x 32" in said.out
    assert "1.heic" in said.err
    assert "HEIC" in said.err


def test_heic_is_read_where_it_can_be(tmp_path: Path) -> None:
    heif = pytest.importorskip("pillow_heif")
    heif.register_heif_opener()
    marked().save(tmp_path / "a.heic", exif=turned_by(6), quality=-1)
    assert corners(read_image(tmp_path / "a.heic")) == CORNERS[6]
    assert picture_size(tmp_path / "a.heic") == (32, 48)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"a\.png: a pipe or a device, not an image"):
        read_image(tmp_path / "a.png")


def test_a_link_that_leads_nowhere_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").symlink_to("gone.png")
    with pytest.raises(UserError, match=r"a\.png: no such image; it is a link"):
        read_image(tmp_path / "a.png")
