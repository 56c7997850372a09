"""visualcloze_deft: unified in-context image generation with DEFT adapters."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from visualcloze_deft.inference.pipeline import InContextPipeline

__version__ = "0.1.0"
__all__ = ["InContextPipeline", "__version__"]


def __getattr__(name: str) -> object:
    """Import the pipeline (and with it torch) only when it is asked for."""
    if name == "InContextPipeline":
        from visualcloze_deft.inference.pipeline import InContextPipeline

        return InContextPipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
