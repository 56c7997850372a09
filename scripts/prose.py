"""Measure how prose reads: python scripts/prose.py README.md docs/*.md

For each file: words a sentence, the share of sentences over 30 words, and "what" a 1,000 words.
Code blocks, tables, headings, comments and link targets do not count. --check ends with status 1
where README is above 16 words a sentence or 8 %, or another file above 18 or 10 %.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

LONG = 30  # words of a sentence
BOUNDS = {"README.md": (16.0, 0.08)}
USUAL = (18.0, 0.10)
LEFT_OUT = frozenset({"lab-log.md", "CHANGELOG.md"})  # dated notes


def sentences(text: str) -> list[list[str]]:
    """The sentences of Markdown, as words."""
    text = re.sub(r"```.*?```|<!--.*?-->|~~~.*?~~~", "\n\n", text, flags=re.S)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    lines = ["" if re.match(r"\s*(#|\|)", line) else line for line in text.splitlines()]
    found = []
    for paragraph in re.split(r"\n\s*(?:\n|(?=[-*>] |\d+\. ))", "\n".join(lines)):
        plain = re.sub(r"[*_`>]", "", " ".join(paragraph.split()))
        for sentence in re.split(r"(?<=[.!?:])\s+(?=[A-Z(\"'0-9])", plain):
            words = [w.strip("./'-") for w in re.findall(r"[\w'./-]*\w[\w'./-]*", sentence)]
            if words:
                found.append(words)
    return found


def measured(path: Path) -> tuple[float, float, float]:
    """Words a sentence, the share of long ones, and "what" a 1,000 words."""
    found = sentences(path.read_text(encoding="utf-8"))
    words = [word.lower() for sentence in found for word in sentence]
    if not words:
        return 0.0, 0.0, 0.0
    long = sum(len(sentence) > LONG for sentence in found) / len(found)
    return len(words) / len(found), long, 1000 * words.count("what") / len(words)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    over = []
    print("| file | words a sentence | over 30 words | what, of 1,000 |\n|---|---|---|---|")
    for path in options.files:
        words, long, what = measured(path)
        print(f"| {path} | {words:.1f} | {long:.0%} | {what:.1f} |")
        most, share = BOUNDS.get(path.name, USUAL)
        if path.name not in LEFT_OUT and (words > most or long > share):
            over.append(str(path))
    if options.check and over:
        sys.exit(f"harder to read than wanted: {', '.join(over)}")


if __name__ == "__main__":
    main()
