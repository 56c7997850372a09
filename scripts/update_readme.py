"""Put an evaluation into README and docs: python scripts/update_readme.py runs/evaluation

Copies sheet.png to docs/images/demo.png, table.md between the marks of docs/results.md, and five
rows of it between those of README.md.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SHOWN = ("canny-to-image", "colourisation", "deblurring", "image-editing", "depth-to-image")


def put(path: Path, mark: str, table: str) -> None:
    """Replace what stands between two marks of a file."""
    begin, end = f"<!-- {mark}:begin -->\n", f"<!-- {mark}:end -->"
    text = path.read_text(encoding="utf-8")
    found = re.sub(f"{begin}.*{end}", lambda _: f"{begin}{table}{end}", text, flags=re.S)
    path.write_text(found, encoding="utf-8")


def main() -> None:
    folder = Path(sys.argv[1])
    (ROOT / "docs" / "images").mkdir(exist_ok=True)
    shutil.copyfile(folder / "sheet.png", ROOT / "docs" / "images" / "demo.png")
    table = (folder / "table.md").read_text(encoding="utf-8")
    put(ROOT / "docs" / "results.md", "table", table)
    lines = table.splitlines(keepends=True)
    rows = [line for name in SHOWN for line in lines if line.startswith(f"| {name} |")]
    note = next(line for line in lines if line.startswith("PSNR"))
    put(ROOT / "README.md", "results", "".join([*lines[:2], *rows, "\n", note]))


if __name__ == "__main__":
    main()
