"""One page of HTML that opens without a server, and its parts."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape

from PIL import Image

WIDEST = 1800  # pixels of the sheet


PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.45 system-ui, sans-serif; color: #222; margin: 2em auto; max-width: 1240px;
  padding: 0 1em; }}
h1, h2 {{ font-weight: 600; margin: 1.2em 0 .4em; }}
table {{ border-collapse: collapse; }}
td, th {{ padding: .15em 1.2em .15em 0; text-align: left; vertical-align: top; }}
th {{ border-bottom: 1px solid #ccc; font-weight: 600; }}
.curves {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(520px, 1fr)); gap: 1em; }}
.curves svg, img {{ width: 100%; height: auto; }}
pre {{ background: #f5f5f5; padding: 1em; overflow-x: auto; font-size: 13px; }}
</style></head><body>
{body}
</body></html>
"""


def table(rows: Sequence[Sequence[object]], *, head: Sequence[str] = ()) -> str:
    """An HTML table of `rows` below `head`."""
    lines = ["".join(f"<th>{escape(word)}</th>" for word in head)] if head else []
    lines += ["".join(f"<td>{escape(str(cell))}</td>" for cell in row) for row in rows]
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def jpeg(page: Image.Image, *, alt: str) -> str:
    """A picture in the page itself, no wider than `WIDEST`."""
    small = page.convert("RGB")
    small.thumbnail((WIDEST, small.height))
    file = io.BytesIO()
    small.save(file, format="JPEG", quality=90)
    code = base64.b64encode(file.getvalue()).decode()
    return f'<img alt="{escape(alt)}" src="data:image/jpeg;base64,{code}">'
