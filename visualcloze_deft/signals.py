"""Ctrl-C and SIGTERM: the first asks a run to save and leave, the second ends it at once."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

ASKING = (signal.SIGINT, signal.SIGTERM)

Handler = Callable[[int, FrameType | None], None]


class Asked:
    """Whether this process has been asked to end; `signal` is the number it was asked with."""

    def __init__(self) -> None:
        self.signal = 0

    def __bool__(self) -> bool:
        return self.signal > 0

    def hear(self, number: int, frame: FrameType | None) -> None:
        if self:
            os._exit(exit_status(self.signal))  # asked twice
        self.signal = number


def exit_status(number: int) -> int:
    """As shells tell an end by a signal: 130 for Ctrl-C, 143 for SIGTERM."""
    return 128 + number


@contextmanager
def handled(handler: Handler) -> Iterator[None]:
    """Within, `handler` is called for the signals that ask a program to end."""
    before = {number: signal.signal(number, handler) for number in ASKING}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
