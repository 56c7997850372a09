"""Ways to spoil a file. Each says what it did and what must follow: nothing that is certainly
nonsense may be accepted, and what changes no meaning must be."""

from __future__ import annotations

import copy
import io
import json
import os
import random
import struct
import tomllib
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import tomli_w
from PIL import Image, PngImagePlugin

Expected = Literal["any", "refused", "accepted"]
Kind = Literal["picture", "json", "toml", "lines", "text", "weights", "bytes"]
Typed = Sequence[str]  # patterns of dotted keys whose type is checked


@dataclass(frozen=True, kw_only=True)
class Spoiled:
    """how: what was done, in words. expected: "refused" where a command that reads the whole file
    must not end well, "accepted" where it must."""

    how: str
    expected: Expected = "any"


DEEP = 100_000
DIGITS = "9" * 5000
TEXTS = (
    "",
    " ",
    "\ud83c",  # half an emoji
    "\x1b[31mred\x1b[0m",
    "two\nlines",
    "nul\0nul",
    "$x^2$ \\frac",
    "{target} {0} {",
    "%s %(x)s %",
    "<script>alert(1)</script>|a`b",
    "../../etc/passwd",
    "/dev/zero",
    "\u202ertl",
    "\ufeffmark",
    "x" * 20_000,
    "nan",
    "٣",
    "=" * 40,
)
NUMBERS = (-1, 0, 1.5, 2**31, 2**63, 2**64, -(2**70), 10**400, 1e308, float("nan"), float("inf"))
OTHERS: tuple[Any, ...] = (None, True, False, [], {}, [[]], [None], {"": 0}, {"a": {"a": 1}})
WRONG: dict[type, tuple[Any, ...]] = {  # values of a type that nobody could have meant
    int: ("often", [], {}, [1]),
    float: ("often", [], {}, [1.0]),
    bool: ("often", [], {}),
    str: (5, {}, 0.5),
    list: (5, 0.5),
    dict: (5, "often", 0.5),
}
RAW = ("[" * DEEP + "]" * DEEP, DIGITS, "1e99999", "-" + DIGITS, "0." + DIGITS)  # as they stand
HOLE = "@@HOLE@@"


def spoil(path: Path, kind: Kind, rng: random.Random, typed: Typed = ()) -> Spoiled:
    """Change the file at `path` in one way. typed: keys of which a value of another type is
    nonsense."""
    if rng.random() < 0.12:
        return rng.choice(PLACES)(path)
    if rng.random() < (0.5 if kind in ("bytes", "weights") else 0.15):
        return rng.choice(BYTES)(path, kind, rng)
    spoiled = OF_KIND[kind](path, rng, typed)
    return spoiled or flipped(path, kind, rng)


def replace(path: Path, content: bytes) -> None:
    """Write `path` anew: the file that it is a link of stays."""
    path.unlink()
    path.write_bytes(content)


# ---- what stands at the file's place


def fifo(path: Path) -> Spoiled:
    path.unlink()
    os.mkfifo(path)
    return Spoiled(how="a pipe", expected="refused")


def loop(path: Path) -> Spoiled:
    path.unlink()
    path.symlink_to(path.name)
    return Spoiled(how="a link to itself", expected="refused")


def dangling(path: Path) -> Spoiled:
    path.unlink()
    path.symlink_to("nowhere")
    return Spoiled(how="a link that leads nowhere", expected="refused")


def endless(path: Path) -> Spoiled:
    path.unlink()
    path.symlink_to("/dev/zero")
    return Spoiled(how="a link to a device without end", expected="refused")


def folder(path: Path) -> Spoiled:
    path.unlink()
    path.mkdir()
    return Spoiled(how="a folder", expected="refused")


def gone(path: Path) -> Spoiled:
    path.unlink()
    return Spoiled(how="gone")


def linked(path: Path) -> Spoiled:
    """The file itself, reached by a link."""
    place = path.with_name(f".moved{path.suffix}")
    path.rename(place)
    path.symlink_to(place.name)
    return Spoiled(how="a link to the file")


def copied(path: Path) -> Spoiled:
    return Spoiled(how="a copy")


PLACES = (fifo, loop, dangling, endless, folder, gone, linked)


# ---- bytes


def certain(kind: Kind) -> Expected:
    """What must follow where a file of this kind is no longer one."""
    return "refused" if kind in ("picture", "json", "weights") else "any"


def cut(path: Path, kind: Kind, rng: random.Random) -> Spoiled:
    content = path.read_bytes()
    length = rng.randrange(1, max(len(content) // 2, 2))
    replace(path, content[:length])
    return Spoiled(how=f"cut to {length} of {len(content)} bytes", expected=certain(kind))


def emptied(path: Path, kind: Kind, rng: random.Random) -> Spoiled:
    replace(path, b"")
    return Spoiled(how="empty", expected=certain(kind))


def rubbish(path: Path, kind: Kind, rng: random.Random) -> Spoiled:
    replace(path, b"\xff\xfe\0" + rng.randbytes(rng.randrange(1, 3000)))
    return Spoiled(how="random bytes", expected="refused" if kind == "toml" else certain(kind))


def flipped(path: Path, kind: Kind, rng: random.Random) -> Spoiled:
    content = bytearray(path.read_bytes())
    count = rng.choice((1, 3, 20)) if content else 0
    places = [rng.randrange(len(content)) for _ in range(count)]
    for place in places:
        content[place] = rng.randrange(256)
    replace(path, bytes(content))
    return Spoiled(how=f"bytes {places} changed")


def inserted(path: Path, kind: Kind, rng: random.Random) -> Spoiled:
    content = path.read_bytes()
    place = rng.randrange(len(content) + 1)
    odd = rng.choice((b"\0", b"\xff", b"\x1b[2J", b"[" * DEEP, b"{" * DEEP, b"\xed\xa0\x80", b"\r"))
    replace(path, content[:place] + odd + content[place:])
    return Spoiled(how=f"{odd[:8]!r} put in at {place}")


BYTES = (cut, emptied, rubbish, flipped, inserted)


# ---- values


def places_in(value: Any, way: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every value in `value` but itself."""
    inside = (
        list(value.items())
        if isinstance(value, dict)
        else list(enumerate(value))
        if isinstance(value, list)
        else []
    )
    return [
        place
        for key, one in inside
        for place in ((*way, key), *places_in(one, (*way, key)))
    ]  # fmt: skip


def at(value: Any, way: Sequence[Any]) -> Any:
    for key in way:
        value = value[key]
    return value


def changed(
    value: Any, rng: random.Random, typed: Typed, *, toml: bool
) -> tuple[Any, str, Spoiled] | None:
    """`value` with one change, the text that is to stand where `HOLE` does, and what it is."""
    value = copy.deepcopy(value)
    ways = places_in(value)
    if not ways:
        return None
    way = rng.choice(ways)
    inside, key, name = at(value, way[:-1]), way[-1], ".".join(map(str, way))
    kind = rng.random()
    if kind < 0.1:
        del inside[key]
        return value, "", Spoiled(how=f"{name} taken out")
    if kind < 0.2 and isinstance(inside, dict):
        inside[rng.choice(TEXTS)[:200] or "more"] = inside[key]
        return value, "", Spoiled(how=f"a key beside {name}")
    if kind < 0.3:
        inside[key] = HOLE
        raw = rng.choice(RAW)
        many = any(fnmatchcase(name, pattern) for pattern in typed)
        return (
            value,
            raw,
            Spoiled(
                how=f"{name}: {raw[:20]}...",
                expected="refused" if many and raw[0] == "[" else "any",
            ),
        )
    checked = type(inside[key]) in WRONG and any(fnmatchcase(name, one) for one in typed)
    if kind < 0.6 and checked:
        inside[key] = rng.choice(WRONG[type(inside[key])])
        return value, "", Spoiled(how=f"{name} = {inside[key]!r}", expected="refused")
    odd = rng.choice(rng.choice((TEXTS, NUMBERS, OTHERS)))
    inside[key] = without_null(odd) if toml else odd
    return value, "", Spoiled(how=f"{name} = {repr(inside[key])[:60]}")


def without_null(value: Any) -> Any:
    """`value` for TOML, which has no null and no half of a character."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, list):
        return [without_null(one) for one in value]
    return "" if value is None else value


def json_value(path: Path, rng: random.Random, typed: Typed) -> Spoiled | None:
    text = path.read_text(encoding="utf-8")
    if rng.random() < 0.1:
        return rewritten(path, text, rng)
    if rng.random() < 0.05:
        replace(path, text.encode() * 2)
        return Spoiled(how="twice", expected="refused")
    if rng.random() < 0.05:
        odd = rng.choice((*RAW, "null", "5", "[]", "{}", '"text"', "NaN"))
        replace(path, odd.encode())
        return Spoiled(how=f"{odd[:20]} for the whole")
    found = changed(json.loads(text), rng, typed, toml=False)
    if found is None:
        return None
    value, raw, spoiled = found
    replace(path, json.dumps(value).replace(f'"{HOLE}"', raw).encode())
    return spoiled


def toml_value(path: Path, rng: random.Random, typed: Typed) -> Spoiled | None:
    text = path.read_text(encoding="utf-8")
    if rng.random() < 0.1:
        return rewritten(path, text, rng)
    if rng.random() < 0.05:
        replace(path, f"{text}\nx = {rng.choice(RAW)}\n".encode())
        return Spoiled(how="an endless value at the end", expected="refused")
    found = changed(tomllib.loads(text), rng, typed, toml=True)
    if found is None:
        return None
    value, raw, spoiled = found
    written = tomli_w.dumps(value).replace(f'"{HOLE}"', raw)
    replace(path, written.encode("utf-8", "surrogatepass"))
    return spoiled


def rewritten(path: Path, text: str, rng: random.Random) -> Spoiled:
    """The same text as another editor saves it."""
    how = rng.choice(("utf-8-sig", "crlf", "utf-16"))
    if how == "crlf":
        replace(path, text.replace("\n", "\r\n").encode())
    else:
        replace(path, text.encode(how))
    return Spoiled(how=how, expected="refused" if how == "utf-16" else "accepted")


def lines(path: Path, rng: random.Random, typed: Typed) -> Spoiled | None:
    every = path.read_text(encoding="utf-8").splitlines()
    k = rng.randrange(len(every))
    kind = rng.random()
    if kind < 0.2:
        every[k] = rng.choice(("", "null", "[]", "5", '"x"', "{", *RAW[:2]))
        spoiled = Spoiled(how=f"line {k}: {every[k][:20]}")
    elif kind < 0.3:
        every.insert(k, every[k])
        spoiled = Spoiled(how=f"line {k} twice")
    else:
        found = changed(json.loads(every[k]), rng, typed, toml=False)
        if found is None:
            return None
        value, raw, spoiled = found
        every[k] = json.dumps(value).replace(f'"{HOLE}"', raw)
    replace(path, "".join(f"{line}\n" for line in every).encode("utf-8", "surrogatepass"))
    return spoiled


def text(path: Path, rng: random.Random, typed: Typed) -> Spoiled:
    before = path.read_text(encoding="utf-8")
    if rng.random() < 0.3:
        replace(path, b"\xef\xbb\xbf" + before.replace("\n", "\r\n").encode())
        return Spoiled(how="saved by an editor of Windows", expected="accepted")
    odd = rng.choice(TEXTS)
    replace(path, (odd + before * rng.randrange(2)).encode("utf-8", "surrogatepass"))
    return Spoiled(how=f"{odd[:30]!r}")


# ---- pictures


def picture(path: Path, rng: random.Random, typed: Typed) -> Spoiled:
    return rng.choice((saved_oddly, chunk, resized))(path, rng)


def saved_oddly(path: Path, rng: random.Random) -> Spoiled:
    """The picture in another mode or format, under the same name."""
    with Image.open(path) as image:
        image.load()
    mode = rng.choice(("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "F", "LAB", "YCbCr"))
    form = rng.choice(("PNG", "JPEG", "TIFF", "GIF", "WEBP", "BMP", "PPM", "TGA", "ICO", "PDF"))
    file = io.BytesIO()
    try:
        image.convert(mode).save(file, form)
    except (OSError, ValueError):  # no such pair
        file = io.BytesIO()
        image.convert("RGB").save(file, form)
    replace(path, file.getvalue())
    return Spoiled(how=f"saved as {form}, {mode}", expected="refused" if form == "PDF" else "any")


def chunk(path: Path, rng: random.Random) -> Spoiled:
    """As a PNG with an odd chunk before its pixels."""
    with Image.open(path) as image:
        image.load()
    odd = rng.choice(
        (
            (b"zTXt", b"a\0\0" + zlib.compress(b" " * (64 << 20))),
            (b"iTXt", b"a\0\1\0\0\0" + rng.randbytes(40)),
            (b"tEXt", b"vcdeft\0" + b"[" * DEEP),
            (b"iCCP", b"a\0\0" + zlib.compress(rng.randbytes(300))),
            (b"eXIf", b"MM\0*" + rng.randbytes(60)),
            (b"eXIf", b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\xff\xff\0\0"),
            (b"acTL", struct.pack(">II", 2**31, 0)),
            (b"gAMA", b"\0\0\0\0"),
            (b"pHYs", b""),
            (b"tRNS", rng.randbytes(300)),
            (b"PLTE", rng.randbytes(7)),
            (b"IHDR", struct.pack(">IIBBBBB", 2**31 - 1, 2**31 - 1, 8, 2, 0, 0, 0)),
        )
    )
    file = io.BytesIO()
    image.convert("RGB").save(file, "PNG", pnginfo=PngImagePlugin.PngInfo())
    name, data = odd
    head, rest = file.getvalue()[:33], file.getvalue()[33:]
    whole = name + data
    put = struct.pack(">I", len(data)) + whole + struct.pack(">I", zlib.crc32(whole))
    replace(path, head + put + rest)
    return Spoiled(how=f"with a chunk {name!r} {data[:12]!r}")


def resized(path: Path, rng: random.Random) -> Spoiled:
    """Of another size, also sizes that no cell can have."""
    size = rng.choice(((1, 1), (1, 4000), (4000, 1), (3, 2), (16, 16), (2000, 1500), (17, 300)))
    with Image.open(path) as image:
        small = image.convert("RGB").resize(size)
    file = io.BytesIO()
    small.save(file, "PNG")
    replace(path, file.getvalue())
    return Spoiled(how=f"of {size[0]} x {size[1]} pixels")


# ---- weights


def weights(path: Path, rng: random.Random, typed: Typed) -> Spoiled | None:
    """A safetensors file with another header, or with numbers that are none."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header, data = content[8 : 8 + length], content[8 + length :]
    kind = rng.random()
    if kind < 0.15:
        wrong = rng.choice((0, length - 1, len(content), 2**40, 2**64 - 1))
        replace(path, struct.pack("<Q", wrong) + header + data)
        return Spoiled(how=f"a header of {wrong} bytes", expected="refused")
    if kind < 0.3:
        replace(path, content[: 8 + length] + b"\xff" * len(data))
        return Spoiled(how="no number in it is finite", expected="refused")
    if kind < 0.4:
        raw = rng.choice(RAW).encode()
        replace(path, struct.pack("<Q", len(raw)) + raw + data)
        return Spoiled(how="a header without an object", expected="refused")
    found = changed(json.loads(header), rng, typed, toml=False)
    if found is None:
        return None
    value, raw_text, spoiled = found
    new = json.dumps(value).replace(f'"{HOLE}"', raw_text).encode()
    replace(path, struct.pack("<Q", len(new)) + new + data)
    return spoiled


def some_bytes(path: Path, rng: random.Random, typed: Typed) -> Spoiled:
    return flipped(path, "bytes", rng)


OF_KIND: dict[Kind, Callable[[Path, random.Random, Typed], Spoiled | None]] = {
    "picture": picture,
    "json": json_value,
    "toml": toml_value,
    "lines": lines,
    "text": text,
    "weights": weights,
    "bytes": some_bytes,
}
