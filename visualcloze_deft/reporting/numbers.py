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


def rounded(value: float, *, places: int, sign: bool = False) -> str:
    """A number with three digits, but at most so many after the point, as columns show it.

    >>> [rounded(value, places=2) for value in (0.0123, 9.876, -16.82, 566.62)]
    ['0.01', '9.88', '-16.8', '567']
    >>> rounded(0.9876, places=3), rounded(2.5, places=1, sign=True)
    ('0.988', '+2.5')
    """
    own = sum(abs(value) < bound for bound in (0.9995, 9.995, 99.95))
    return f"{value:{'+' if sign else ''}.{min(own, places)}f}"


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
