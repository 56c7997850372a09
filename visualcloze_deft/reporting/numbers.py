"""Numbers as people read them."""

from __future__ import annotations

import math


def three_digits(value: float | None) -> str:
    """A number with three significant digits, a large one in full; None is not finite.

    >>> [three_digits(v) for v in (0.5, 0.012345, 12.34, 999.7, 12345.6, 0, -2e-7)]
    ['0.500', '0.0123', '12.3', '1,000', '12,346', '0', '-2.00e-07']
    >>> three_digits(None)
    'not finite'
    """
    if value is None or not math.isfinite(value):
        return "not finite"
    if value == 0:
        return "0"
    if abs(value) >= 999.5:
        return f"{value:,.0f}"
    return f"{value:#.3g}".removesuffix(".")


def decimals(mean: float, *, at_most: int) -> int:
    """Places after the point of a mean and its interval, with which it has three digits.

    >>> [decimals(mean, at_most=2) for mean in (0.2, -16.8, 131.8)]
    [2, 1, 0]
    >>> decimals(0.9876, at_most=3)
    3
    """
    places = 3 if abs(mean) < 0.9995 else 2 if abs(mean) < 9.995 else 1 if abs(mean) < 99.95 else 0
    return min(places, at_most)


def duration(seconds: float) -> str:
    """A time as a clock shows it.

    >>> duration(75.4), duration(3 * 3600 + 62)
    ('1:15', '3:01:02')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def counted_as(number: int, thing: str) -> str:
    """A number of things.

    >>> counted_as(1, "grid"), counted_as(1200, "grid")
    ('1 grid', '1,200 grids')
    """
    return f"{number:,} {thing}" + ("s" if number != 1 else "")
