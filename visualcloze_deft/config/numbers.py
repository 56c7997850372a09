"""Numbers of settings with their bounds."""

from __future__ import annotations

from math import isfinite
from typing import Annotated, TypeGuard

from pydantic import Field

LARGEST = 10**9  # of whole numbers that count something: computing with them does not overflow
HEAVIEST = 1e6  # of weights and factors
Probability = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0, le=LARGEST)]
Positive = Annotated[int, Field(ge=1, le=LARGEST)]
Weight = Annotated[float, Field(ge=0, le=HEAVIEST)]
Factor = Annotated[float, Field(gt=0, le=HEAVIEST)]
_Momentum = Annotated[float, Field(ge=0, lt=1)]


def is_whole(value: object) -> TypeGuard[int]:
    """Whether `value` is a whole number; True and False are none.

    >>> [is_whole(x) for x in (3, 3.0, True, "3")]
    [True, False, False, False]
    """
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether `value` is a finite number.

    >>> [is_number(x) for x in (3, 0.5, float("nan"), "3")]
    [True, True, False, False]
    """
    return isinstance(value, float | int) and not isinstance(value, bool) and isfinite(value)


def is_scale(value: object) -> bool:
    """Whether an adapter can be used at `value`: at most `HEAVIEST`, either way.

    >>> [is_scale(x) for x in (-0.5, 1e300, float("nan"))]
    [True, False, False]
    """
    return is_number(value) and abs(value) <= HEAVIEST
