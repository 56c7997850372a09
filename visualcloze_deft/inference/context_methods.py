"""The context of a pipeline's grids: kept for some steps, or as adapters were trained."""

from __future__ import annotations

from typing import Any

from visualcloze_deft.adapters.contexts import check_context, context_of
from visualcloze_deft.adapters.merging import ActiveAdapters
from visualcloze_deft.config.numbers import is_whole
from visualcloze_deft.errors import UserError
from visualcloze_deft.sampling.context import Context
from visualcloze_deft.storage.text_files import brief


class ContextMethods:
    """What a pipeline does with examples, known cells and text in the steps of sampling."""

    blend: ActiveAdapters
    transformer: Any
    _full_steps: int | None = None
    _context: str | None = None
    _untrained: bool = False

    def enable_context_cache(self, full_steps: int = 3) -> None:
        """Compute all tokens of a grid in `full_steps` sampling steps alone, evenly spaced in time.
        In the others the targets attend to what such a step kept of examples, known cells and text.

        Any weights do; images change a little, see docs/context-cache.md. As many as there are
        steps change nothing. Upsampling has no context, and goes on as it is.
        """
        if not is_whole(full_steps) or full_steps < 1:
            raise UserError(f"full_steps {brief(full_steps)}: give a whole number, 1 or more")
        self._full_steps = int(full_steps)

    def disable_context_cache(self) -> None:
        self._full_steps = None

    def set_context(self, context: str | None = None, *, untrained: bool = False) -> None:
        """What context sees: "full", all, in every step; "isolated", itself, computed once;
        "causal", the same, its examples without the query; None, as the adapters in use were
        trained, and full where they know several.

        untrained: allows one that they were not trained with. The next call raises `UserError`
        for such a context otherwise.
        """
        check_context(context)
        self._context, self._untrained = context, untrained

    @property
    def context(self) -> Context:
        """How the next call uses the tokens of examples, known cells and text."""
        blend = self.blend
        used = {blend.places[name]: blend.contexts[name] for name in blend.scales}
        seen = context_of(used, self._context, untrained=self._untrained)
        if seen != "full" and self._full_steps is not None:
            raise UserError(
                f"context cache: with context={seen!r} it is computed once anyway; call "
                "disable_context_cache(), or set_context('full')"
            )
        return Context(seen=seen, full_steps=self._full_steps)

    def context_for(self, steps: int) -> Context:
        """`context` for a call of so many steps. Raises `UserError` where a cache of diffusers is
        in its way."""
        context = self.context
        if context.cached(steps) and self.transformer.is_cache_enabled:
            raise UserError(
                "context cache: not beside a cache of diffusers; call transformer.disable_cache()"
            )
        return context
