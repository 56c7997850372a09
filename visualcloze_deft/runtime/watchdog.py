"""Signs of life: a process that gets no further ends the run with its reason, not in silence.

Each process writes what it does into a small file of the run folder. A thread watches this
process's own progress: a rank that waits for another in a collective operation is as stuck as the
one that hangs, and says which it is.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path
from types import TracebackType

SIGNS = ".ranks"  # folder in the run folder: a file a rank
EVERY = 1.0  # seconds between two writes of a sign: steps may be shorter
STUCK = 70  # exit status; EX_SOFTWARE of sysexits.h
AFTER = 2.0  # seconds a rank waits more for each rank before it: one of them speaks


class Watchdog:
    """Ends this process where `doing` has not been called for `patience` seconds."""

    def __init__(self, output: Path, *, rank: int, world: int, patience: float) -> None:
        self.folder = output / SIGNS
        self.rank = rank
        self.world = world
        self.patience = patience
        self.task = "starting"
        self.since = time.monotonic()
        self.written = 0.0
        self.ended = threading.Event()

    def __enter__(self) -> Watchdog:
        self.folder.mkdir(exist_ok=True)
        self.doing(self.task)
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.ended.set()

    def doing(self, task: str) -> None:
        """This process has come as far as `task`, e.g. "step 12"."""
        self.task, self.since = task, time.monotonic()
        if self.since - self.written >= EVERY:
            self.written = self.since
            self._sign(task)

    def _sign(self, task: str) -> None:
        try:
            (self.folder / str(self.rank)).write_text(task, encoding="utf-8")
        except OSError:  # a full disk, a folder gone: the next save says so
            return

    def _watch(self) -> None:
        allowed = self.patience + AFTER * self.rank
        looked = time.monotonic()
        while not self.ended.wait(min(1.0, self.patience / 4)):
            slept, looked = time.monotonic() - looked, time.monotonic()
            if slept > self.patience / 2:  # the whole process was suspended, and the others with it
                self.since += slept
            if looked - self.since > allowed:
                break
        if self.ended.is_set():
            return
        try:
            print(f"vcdeft: {self.reason()}", file=sys.stderr, flush=True)
        finally:
            os._exit(STUCK)  # the main thread is inside a library and cannot be asked

    def reason(self) -> str:
        """One line: how long this process has waited, and where each other was last seen."""
        waited = time.monotonic() - self.since
        others = "; ".join(self.last_seen(rank) for rank in range(self.world) if rank != self.rank)
        return (
            f"process {self.rank} got no further for {waited:.0f} s at {self.task}"
            + (f" ({others})" if others else "")
            + "; the last checkpoint is whole, go on with --resume; `timeout` sets the patience"
        )

    def last_seen(self, rank: int) -> str:
        path = self.folder / str(rank)
        try:
            task, ago = path.read_text(encoding="utf-8"), time.time() - path.stat().st_mtime
        except OSError:
            return f"process {rank} was never seen"
        return f"process {rank} was at {task} {ago:.0f} s ago"
