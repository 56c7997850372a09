"""The contexts that adapters were trained with, and the one that inference uses.

Between training and inference only what context sees may differ, see `base.Seen`. An adapter of a
"mixed" run knows "full" and "isolated".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_args

from visualcloze_deft.backbones.base import Seen
from visualcloze_deft.backbones.peft_files import read_metadata, weights_file
from visualcloze_deft.errors import UserError

WORDS = get_args(Seen)
KNOWN: Mapping[str, tuple[Seen, ...]] = {
    "full": ("full",),
    "isolated": ("isolated",),
    "causal": ("causal",),
    "mixed": ("full", "isolated"),
}
BASE = KNOWN["full"]  # what the published weights were trained with


def known_to(adapter: Path) -> tuple[Seen, ...]:
    """The contexts that an adapter was trained with; full where it does not say."""
    told = read_metadata(adapter).get("context", "full") if weights_file(adapter).is_file() else ""
    for mode, known in KNOWN.items():
        if told == mode:
            return known
    if told:
        raise UserError(
            f"adapter {adapter}: trained with the context {told!r}, which this version does not "
            f"know ({', '.join(KNOWN)}); install a newer one"
        )
    return BASE


def check_context(asked: str | None) -> None:
    if asked is not None and asked not in WORDS:
        raise UserError(f"context {asked!r}: give one of {', '.join(WORDS)}, or none")


def context_of(
    known: Mapping[Path, Sequence[Seen]], asked: str | None = None, *, untrained: bool = False
) -> Seen:
    """The context to use with adapters: the one asked for, else the first that all know.

    known: what each was trained with, see `known_to`. untrained: allows one that an adapter, or
    the base alone, was not trained with.
    Raises `UserError` for such a context otherwise, and for adapters that have none in common.
    """
    check_context(asked)
    wanted = [word for word in WORDS if asked in (word, None)]
    for word in wanted:
        if (untrained and asked) or all(word in own for own in [*known.values()] or [BASE]):
            return word
    if not known:
        raise UserError(
            f"context {asked!r}: the base alone was not trained with it, and its images are "
            f"worse; train an adapter with --set context={asked}, or allow it with "
            "--untrained-context"
        )
    if asked is None:
        said = ", ".join(f"{adapter}: {own[0]}" for adapter, own in known.items())
        raise UserError(
            f"adapters without a context in common ({said}); leave one out, or choose with "
            "--context and --untrained-context"
        )
    adapter = next(adapter for adapter, own in known.items() if asked not in own)
    raise UserError(
        f"context {asked!r}: the adapter {adapter} was trained with {known[adapter][0]!r} alone, "
        "and its images are worse with another; use an adapter for it, or allow it with "
        "--untrained-context"
    )
