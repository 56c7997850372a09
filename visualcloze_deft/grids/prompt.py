"""The text of a grid: layout, task and content."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

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


def of_task(prompt: Prompt | str) -> Prompt | str:
    """What all prompts of a task share: without the content. A text of one's own stays whole."""
    return prompt if isinstance(prompt, str) else replace(prompt, content="")


def joined(*sentences: str) -> str:
    """The sentences that are said, in one line."""
    return " ".join(sentence for sentence in sentences if sentence)
