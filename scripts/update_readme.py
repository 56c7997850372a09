"""Put an evaluation into the README: python scripts/update_readme.py runs/evaluation

Copies sheet.png to docs/images/demo.png and table.md between the README's table marks.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def main() -> None:
    folder = Path(sys.argv[1])
    (ROOT / "docs" / "images").mkdir(exist_ok=True)
    shutil.copyfile(folder / "sheet.png", ROOT / "docs" / "images" / "demo.png")
    readme = ROOT / "README.md"
    table = (folder / "table.md").read_text(encoding="utf-8")
    marked = f"<!-- table:begin -->\n{table}<!-- table:end -->"
    text = readme.read_text(encoding="utf-8")
    text = re.sub(r"<!-- table:begin -->.*<!-- table:end -->", lambda _: marked, text, flags=re.S)
    readme.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
