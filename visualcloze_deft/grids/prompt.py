"""The text of a grid, and what each of FLUX's two text encoders reads of it.

T5 reads up to 512 tokens. CLIP reads 77, which layout and task sentence alone may fill: what the
picture shows, said last, would then be lost to it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

ClipText = Literal["fit", "original"]
"""What CLIP is given: "fit", the content sentence before anything that does not fit beside it;
"original", all in VisualCloze's order, of which it reads the beginning."""

CONTENT_PREFIX = "The last image of the last row depicts:"  # VisualCloze's words


def layout_sentence(rows: int, columns: int) -> str:
    """VisualCloze's first sentence, word for word what its released weights were trained on."""
    return (
        f"A grid layout with {rows} rows and {columns} columns, "
        f"displaying {rows * columns} images arranged side by side."
    )


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """The sentences of a grid, as a whole its `str`; what is not said is "".

    >>> print(Prompt(rows=2, columns=2, content="a cup").of_content)
    The last image of the last row depicts: a cup
    """

    rows: int
    columns: int
    task: str = ""
    content: str = ""

    @property
    def of_content(self) -> str:
        return f"{CONTENT_PREFIX} {self.content}" if self.content else ""

    def __str__(self) -> str:
        return joined(layout_sentence(self.rows, self.columns), self.task, self.of_content)


def joined(*sentences: str) -> str:
    """The sentences that are said, in one line."""
    return " ".join(sentence for sentence in sentences if sentence)


def clip_text(prompt: Prompt, fits: Callable[[str], bool], order: ClipText = "fit") -> str:
    """What CLIP is given of `prompt`.

    With "fit" the whole where it fits, else without the layout; where that is too long still, the
    content first and of the task sentence as much as there is room for.
    """
    whole = str(prompt)
    if order == "original" or fits(whole):
        return whole
    shorter = joined(prompt.task, prompt.of_content)
    return shorter if fits(shorter) else joined(prompt.of_content, prompt.task)


def fits(tokenizer: Any) -> Callable[[str], bool]:
    """Whether a text, with the tokens around it, is within what `tokenizer`'s encoder reads."""
    return lambda text: len(tokenizer(text, verbose=False).input_ids) <= tokenizer.model_max_length


def unread(tokenizer: Any, text: str, length: int) -> str:
    """The end of `text` that does not fit into `length` tokens, the closing one included, or ""."""
    tokens = tokenizer(text, verbose=False).input_ids
    return str(tokenizer.decode(tokens[length - 1 : -1])).strip()
