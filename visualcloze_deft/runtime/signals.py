"""Ctrl-C and SIGTERM: the first asks a run to save and leave, the second ends it at once. Processes
that serve another end with it, however it ends."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

if sys.platform == "win32":
    ASKING: tuple[signal.Signals, ...] = (signal.SIGINT, signal.SIGTERM)
    KILL = signal.SIGTERM  # which ends a process there at once
else:
    ASKING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    KILL = signal.SIGKILL
ONE_REQUEST = 2.0  # seconds: launchers and queues pass one request on as several signals

LAUNCHER = "VCDEFT_LAUNCHER"  # number of the process of ours that started this one
END_WITH_PARENT = 1  # PR_SET_PDEATHSIG of <sys/prctl.h>

Handler = Callable[[int, FrameType | None], None]


class StopRequest:
    """Whether this process has been asked to end; `signal` is the number it was asked with.

    at_once: there is nothing to save yet, so the first request ends it.
    """

    def __init__(self, *, at_once: bool = False) -> None:
        self.signal = 0
        self.since = 0.0
        self.at_once = at_once

    def __bool__(self) -> bool:
        return self.signal > 0

    def twice(self, number: int) -> bool:
        """Hear a signal; whether it is a request of its own after the first."""
        if self:
            return time.monotonic() - self.since > ONE_REQUEST
        self.signal, self.since = number, time.monotonic()
        return False

    def hear(self, number: int, frame: FrameType | None) -> None:
        if self.twice(number) or self.at_once:
            os._exit(exit_status(self.signal))


def ignore_signals(worker: int) -> None:
    """For processes that only serve another: that one decides when they end."""
    end_with(os.getppid())
    for number in ASKING:
        signal.signal(number, signal.SIG_IGN)


def end_with_launcher() -> None:
    """Where a process of ours started this one to work for it: end when that one does."""
    if LAUNCHER in os.environ:
        end_with(int(os.environ[LAUNCHER]))


def end_with(parent: int) -> None:
    """Have the system kill this process when its parent ends, also by a signal that the parent
    cannot hear: without it nobody would stop what goes on. On Linux alone.

    parent: number of the process that must still be there.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(END_WITH_PARENT, KILL)
        if os.getppid() != parent:  # it ended before
            os.kill(os.getpid(), KILL)


def exit_status(number: int) -> int:
    """As shells tell an end by a signal: 130 for Ctrl-C, 143 for SIGTERM."""
    return 128 + number


@contextmanager
def handling(handler: Handler) -> Iterator[None]:
    """Within, `handler` is called for the signals that ask a program to end."""
    before = {number: signal.signal(number, handler) for number in ASKING}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
