"""Numbers of settings with their bounds."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

LARGEST = 10**9  # of whole numbers that count something: computing with them does not overflow
HEAVIEST = 1e6  # of weights and factors
Probability = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0, le=LARGEST)]
Positive = Annotated[int, Field(ge=1, le=LARGEST)]
Weight = Annotated[float, Field(ge=0, le=HEAVIEST)]
Factor = Annotated[float, Field(gt=0, le=HEAVIEST)]
_Momentum = Annotated[float, Field(ge=0, lt=1)]


def is_scale(value: float) -> bool:
    """Whether an adapter can be used at `value`: at most `HEAVIEST`, either way.

    >>> [is_scale(x) for x in (-0.5, 1e300, float("nan"))]
    [True, False, False]
    """
    return abs(value) <= HEAVIEST
