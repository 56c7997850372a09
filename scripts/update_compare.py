"""Put a comparison's results into its page: python scripts/update_compare.py runs/compare-scenes

Copies table.md between the marks of that name in docs/compare.md, the figures of each task folded
away, and the pictures to docs/images.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

from visualcloze_deft.comparison.report import CURVES, SCATTER, TABLE

DOCS = Path(__file__).parents[1] / "docs"


def main() -> None:
    folder = Path(sys.argv[1])
    name, page = folder.resolve().name, DOCS / "compare.md"
    text = page.read_text(encoding="utf-8")
    marks = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if not all(mark in text for mark in marks):
        raise SystemExit(f"{page}: no marks {' and '.join(marks)}")
    (DOCS / "images").mkdir(exist_ok=True)
    pictures = []
    for picture in (SCATTER, CURVES):
        copy = f"{name}-{picture}"
        shutil.copyfile(folder / picture, DOCS / "images" / copy)
        pictures.append(f"![{Path(picture).stem}](images/{copy})")
    whole, each = (folder / TABLE).read_text(encoding="utf-8").split("### Each task\n")
    folded = f"<details><summary>Each task</summary>\n{each}\n</details>"
    parts = [marks[0], "", whole.rstrip(), "", *pictures, "", folded, "", marks[1]]
    between = f"{re.escape(marks[0])}.*{re.escape(marks[1])}"
    filled = re.sub(between, lambda _: "\n".join(parts), text, flags=re.S)
    page.write_text(filled, encoding="utf-8")


if __name__ == "__main__":
    main()
