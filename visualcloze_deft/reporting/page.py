"""One page of HTML that opens without a server, from sections of tables, words and pictures."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import jinja2
from PIL import Image

TEMPLATE = Path(__file__).with_name("page.html")
WIDEST = 1800  # pixels of a picture


@dataclass(frozen=True, kw_only=True)
class Table:
    rows: Sequence[Sequence[object]]
    head: Sequence[str] = ()
    kind: Literal["table"] = "table"


@dataclass(frozen=True, kw_only=True)
class Text:
    """A paragraph."""

    text: str
    kind: Literal["text"] = "text"


@dataclass(frozen=True, kw_only=True)
class Code:
    """Lines as they are, such as settings."""

    text: str
    kind: Literal["code"] = "code"


@dataclass(frozen=True, kw_only=True)
class Drawings:
    """Drawings of ours as SVG, beside each other."""

    svgs: Sequence[str]
    kind: Literal["drawings"] = "drawings"


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture in the page itself, no wider than `WIDEST`."""

    image: Image.Image
    alt: str
    kind: Literal["picture"] = "picture"

    @property
    def source(self) -> str:
        small = self.image.convert("RGB")
        small.thumbnail((WIDEST, small.height))
        file = io.BytesIO()
        small.save(file, format="JPEG", quality=90)
        return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


Part = Table | Text | Code | Drawings | Picture


@dataclass(frozen=True, kw_only=True)
class Section:
    title: str = ""
    parts: Sequence[Part] = field(default_factory=tuple)


def page(title: str, sections: Sequence[Section]) -> str:
    """The page as a whole; all text is escaped, drawings are taken as they are."""
    made = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = made.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(title=title, sections=sections)
