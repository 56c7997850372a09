"""The contexts of a call's grids, where they are computed once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from visualcloze_deft.backbones.base import ContextCache, Part
from visualcloze_deft.backbones.flux_fill.model import Models
from visualcloze_deft.grids.grid import Grid
from visualcloze_deft.grids.prompt import Prompt
from visualcloze_deft.inference.example_parts import ExampleParts, key_of
from visualcloze_deft.sampling.context import Context
from visualcloze_deft.sampling.denoising import Conditions, context_of, examples_of


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A grid of a call. number: its own in the call."""

    grid: Grid
    prompt: Prompt
    number: int


class Contexts:
    """Computes each context once for all seeds of its grids, and examples once for all grids that
    have the same. The latest is kept."""

    def __init__(
        self, models: Models, context: Context, examples: ExampleParts, *, guidance: float
    ) -> None:
        self.models = models
        self.context = context
        self.examples = examples
        self.guidance = guidance
        self.latest: tuple[tuple[int, ...], ContextCache] | None = None

    def of(self, shown: Sequence[Shown], given: Conditions) -> ContextCache:
        """That of grids of one shape, in this order. given: what they are generated from."""
        numbers = tuple(one.number for one in shown)
        if self.latest is None or self.latest[0] != numbers:
            self.latest = None  # its memory is free before the next one takes some
            cache = context_of(
                self.models,
                given,
                guidance=self.guidance,
                context=self.context,
                examples=self._examples(shown, given) if self.context.seen == "causal" else None,
            )
            self.latest = numbers, cache
        return self.latest[1]

    def _examples(self, shown: Sequence[Shown], given: Conditions) -> Part:
        keys = [key_of(one.grid, one.prompt, guidance=self.guidance) for one in shown]
        return self.examples.of(
            keys, lambda k: examples_of(self.models, given.some([k]), guidance=self.guidance)
        )
