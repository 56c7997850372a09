"""Pictures to look at."""

from __future__ import annotations

from PIL import Image, ImageChops

from visualcloze_deft.reporting.contact_sheet import draw_grid


def test_captions_show_letters_beyond_ascii_and_not_boxes() -> None:
    cells = [[Image.new("RGB", (64, 64), "teal")] * 2]
    missing = draw_grid(cells, title="\uffff")
    for letter in "éßñøŁΩЖ":
        shown = draw_grid(cells, title=letter)
        assert ImageChops.difference(shown, missing).getbbox(), letter
