"""What texts call the one thing that is learned, and pictures of others of its class."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from visualcloze_deft.data.base import Item, Source, photos_of, units_of
from visualcloze_deft.data.eligible import EligibleItems
from visualcloze_deft.errors import UserError
from visualcloze_deft.task_registry.task import Task

PHRASINGS = ("a photo of {}", "a picture of {}", "an image of {}", "a photograph of {}", "{}")
ANOTHER = "another"  # the role of a picture of another thing of the target's class
SAME_CLASS = Task(
    name="same-class",
    group="subject-driven",
    summary="Another thing of the class of the one in a photo.",
    columns={ANOTHER: ("photo of one",), "target": ("photo of another",)},
    targets=("target",),
    instructions=(f"From the {{{ANOTHER}}} to the {{target}}, same class, not the same one.",),
    content="caption",
    path=Path(__file__),
)
"""What is trained on class pictures of which no two show the same thing. Nobody asks for it."""


@dataclass(frozen=True, kw_only=True)
class Naming:
    """trigger: the word that stands for one thing. class_word: what it is. "" for none of them."""

    trigger: str = ""
    class_word: str = ""

    @property
    def name(self) -> str:
        """
        >>> Naming(trigger="sks", class_word="dog").name, Naming(class_word="owl").name
        ('sks dog', 'an owl')
        """
        if not self.trigger and self.class_word:
            return f"{'an' if self.class_word[0].lower() in 'aeiou' else 'a'} {self.class_word}"
        return " ".join(filter(None, (self.trigger, self.class_word)))

    def caption(self, text: str) -> str:
        """A caption with the trigger: where it stands already, else before the class word, else in
        front of all.

        >>> sks = Naming(trigger="sks", class_word="dog")
        >>> sks.caption("a dog on grass"), sks.caption("asleep"), sks.caption("my sks dog")
        ('a sks dog on grass', 'sks dog, asleep', 'my sks dog')
        """
        if not self.trigger or _place(self.trigger, text):
            return text
        if self.class_word and (found := _place(self.class_word, text)):
            return f"{text[: found.start()]}{self.trigger} {text[found.start() :]}"
        return f"{self.name}, {text}"

    def item(self, item: Item) -> Item:
        """`item` with the name in its caption; without a caption, with `PHRASINGS` of the name."""
        if caption := item.texts.get("caption"):
            return replace(item, texts={**item.texts, "caption": self.caption(caption)})
        if not self.name:
            return item
        said = tuple(phrase.replace("{}", self.name) for phrase in PHRASINGS)
        texts = {**item.texts, "caption": said[0]}
        return replace(item, texts=texts, phrasings={"caption": said})


def _place(word: str, text: str) -> re.Match[str] | None:
    """Where `word` first stands in `text` as a word of its own, small or capital."""
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE)


class Named:
    """`source` with the texts that `naming` gives its items."""

    def __init__(self, source: Source, naming: Naming) -> None:
        self.name = source.name
        self.roles = source.roles
        self.source = source
        self.naming = naming
        self.units = units_of(source)
        self.photos = photos_of(source)

    def __len__(self) -> int:
        return len(self.source)

    @property
    def kinds(self) -> Mapping[frozenset[str], Sequence[int]]:
        return self.source.kinds

    def item(self, index: int) -> Item:
        return self.naming.item(self.source.item(index))


class Classmates:
    """Pairs of different pictures of one class: each target of `source` once, beside another one.

    Raises `UserError` where fewer than two items have a target.
    """

    roles = frozenset({ANOTHER, "target"})

    def __init__(self, source: Source, *, seed: int) -> None:
        self.name = source.name
        self.able = EligibleItems(source, ["target"])
        if len(self.able) < 2:
            raise UserError(
                f"subject.class_data: {source.name} has {len(self.able)} pictures of the class in "
                "the role target; give two or more"
            )
        circle = np.random.default_rng([seed, *b"class"]).permutation(len(self.able))
        self.photos: NDArray[np.intp] = np.stack([np.roll(circle, 1), circle], axis=1)

    def __len__(self) -> int:
        return len(self.able)

    @cached_property
    def kinds(self) -> dict[frozenset[str], range]:
        return {self.roles: range(len(self))}

    def item(self, index: int) -> Item:
        another, target = (self.able.item(int(place)) for place in self.photos[index])
        return replace(
            target,
            key=f"{another.key}, {target.key}",
            images={ANOTHER: another.images["target"], "target": target.images["target"]},
        )
