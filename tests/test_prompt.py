"""The text of a grid: what is left out, and what CLIP keeps of it."""

from __future__ import annotations

import pytest

from visualcloze_deft.backbones.flux_fill.clip_text import clip_text, unread
from visualcloze_deft.grids.prompt import CONTENT_PREFIX, Prompt, layout_sentence

LAYOUT = layout_sentence(2, 3)
TASK = "From the depth map [IMAGE1] and the reference [IMAGE2] to the photo [IMAGE3]."


class Words:
    """A tokenizer whose tokens are words, one more at each end."""

    model_max_length = 20

    def __call__(self, text: str, *, verbose: bool) -> Words:
        self.input_ids = ["<", *text.split(), ">"]
        return self

    def decode(self, tokens: list[str]) -> str:
        return " ".join(tokens)


def up_to(words: int):  # type: ignore[no-untyped-def]
    return lambda text: len(text.split()) <= words


def said(content: str = "", task: str = TASK) -> Prompt:
    return Prompt(rows=2, columns=3, task=task, content=content)


def test_empty_parts_of_the_text_are_left_out() -> None:
    assert str(said(task="")) == LAYOUT
    assert str(said()) == f"{LAYOUT} {TASK}"
    assert str(said("a cup")) == f"{LAYOUT} {TASK} {CONTENT_PREFIX} a cup"
    assert str(said("a cup", task="")) == f"{LAYOUT} {CONTENT_PREFIX} a cup"


def test_clip_reads_the_whole_where_it_fits() -> None:
    assert clip_text(said("a cup"), up_to(99)) == str(said("a cup"))


def test_clip_loses_the_layout_first_then_the_end_of_the_task_and_the_content_never() -> None:
    whole = said("a red cup on a table")
    without_layout = f"{TASK} {whole.of_content}"
    room = len(without_layout.split())
    assert clip_text(whole, up_to(room)) == without_layout
    assert clip_text(whole, up_to(room - 1)) == f"{whole.of_content} {TASK}"


@pytest.mark.parametrize("words", [1, 20, 99])
def test_the_original_order_is_kept_on_demand(words: int) -> None:
    assert clip_text(said("a cup"), up_to(words), "original") == str(said("a cup"))


def test_what_is_cut_is_said() -> None:
    text = " ".join(map(str, range(25)))
    assert unread(Words(), text, 20) == "18 19 20 21 22 23 24"
    assert unread(Words(), text, 27) == ""
