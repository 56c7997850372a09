"""Draw README's first picture: python scripts/draw_grid.py --adapter runs/demo/adapter

Three grids of scenes that no training saw: an example row, below it the query and what the model
generates for it, in a red frame. Writes docs/images/grid.png.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from families import families
from PIL import Image, ImageDraw

from visualcloze_deft.data.mixture import Mixture
from visualcloze_deft.data.queries import query_of
from visualcloze_deft.data.sources.scenes import Scenes
from visualcloze_deft.inference.pipeline import InContextPipeline
from visualcloze_deft.reporting.contact_sheet import INK, MARK, caption_font
from visualcloze_deft.sampling.examples import complete_examples

SEED = 1  # of the scenes; training uses those of seed 0
SHOWN = {"depth-to-image": 3, "image-editing": 5, "image-to-depth": 7}  # task: number of its query
CELL, GAP, EDGE = 128, 10, 30
WORDS = {
    "depth-to-image": "depth map to photo",
    "image-editing": "edit",
    "image-to-depth": "photo to depth map",
}


def drawn(rows: list[list[Image.Image | None]], title: str) -> Image.Image:
    """One grid with words: what is shown, what is asked, and an arrow between the columns."""
    step = CELL + 4 * GAP
    page = Image.new("RGB", (EDGE + 2 * step, 2 * (CELL + GAP) + 2 * EDGE), "white")
    pen = ImageDraw.Draw(page)
    font = caption_font(13)
    pen.text((EDGE, 6), title, fill=INK, font=font)
    for r, row in enumerate(rows):
        y = EDGE + r * (CELL + GAP)
        for c, image in enumerate(row):
            x = EDGE + c * step
            if image is not None:
                page.paste(image.convert("RGB").resize((CELL, CELL)), (x, y))
            if (r, c) == (1, 1):
                pen.rectangle((x - 3, y - 3, x + CELL + 2, y + CELL + 2), outline=MARK, width=3)
        middle, start = y + CELL // 2, EDGE + CELL + GAP
        pen.line((start, middle, start + 2 * GAP, middle), fill=INK, width=2)
        tip = [(start + 2 * GAP, middle - 5), (start + 2 * GAP, middle + 5)]
        pen.polygon([*tip, (start + 3 * GAP - 4, middle)], fill=INK)
        said = "example" if r == 0 else "query"
        label = Image.new("RGB", (CELL, 18), "white")
        ImageDraw.Draw(label).text((0, 0), said, fill=INK, font=font)
        page.paste(label.rotate(90, expand=True), (8, y))
    pen.text((EDGE + step, EDGE + 2 * (CELL + GAP) + 2), "generated", fill=MARK, font=font)
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapter", required=True)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--output", type=Path, default=Path("docs/images/grid.png"))
    options = parser.parse_args()
    models = InContextPipeline.from_pretrained(options.model, adapter=options.adapter).models
    side, tasks = models.resolution, families()
    mixture = Mixture(tasks, [Scenes(size=side, seed=SEED)], seed=SEED, resolution=side)
    pages = []
    for name, index in SHOWN.items():
        example = query_of(mixture, tasks[name], index=index)
        [[made]] = complete_examples(models, [example], steps=options.steps, batch=1)
        words = example.content if name == "image-editing" else WORDS[name]
        pages.append(drawn([list(example.rows[0]), [example.rows[-1][0], made]], words))
    page = Image.new("RGB", (sum(p.width for p in pages), pages[0].height), "white")
    for k, one in enumerate(pages):
        page.paste(one, (k * one.width, 0))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    page.save(options.output)


if __name__ == "__main__":
    main()
