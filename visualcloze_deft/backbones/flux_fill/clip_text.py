"""What FLUX's two text encoders read of a prompt, and where it is cut.

T5 reads up to 512 tokens. CLIP reads 77, which layout and task sentence alone may fill: what the
picture shows, said last, would then be lost to it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from visualcloze_deft.grids.prompt import ClipText, Prompt, joined


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
