"""Training processes for tests: real ones, forked by a server that has imported the libraries.

Importing torch, diffusers and DeepSpeed takes a process ten seconds; a fork has them at once. Each
process finds the environment that torchrun would give it and runs `vcdeft ARGUMENTS`.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["visualcloze_deft.training.train", "visualcloze_deft.cli"])
LAUNCHED = "MASTER_ADDR MASTER_PORT RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE".split()
"""What a launcher tells a process in its environment."""


class Group:
    """The processes of one run; whatever they say, in one text, rank after rank."""

    def __init__(
        self,
        words: Sequence[object],
        *,
        processes: int = 2,
        function: Callable[..., None] | None = None,
    ) -> None:
        """`vcdeft WORDS`, or a function of a module with these arguments."""
        self.place = TemporaryDirectory()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.ranks: list[BaseProcess] = []
        for rank in range(processes):
            said = Path(self.place.name) / str(rank)
            given = rank, processes, port, [str(word) for word in words], str(said), function
            self.ranks.append(_server.Process(target=_run, args=given))
        for one in self.ranks:
            one.start()

    @property
    def said(self) -> str:
        texts = sorted(Path(self.place.name).iterdir())
        return "\n".join(path.read_text(errors="replace") for path in texts)

    def send(self, number: signal.Signals, *ranks: int) -> None:
        """Send a signal to some ranks, or to all."""
        for rank in ranks or range(len(self.ranks)):
            pid = self.ranks[rank].pid
            if pid is not None and self.ranks[rank].is_alive():
                os.kill(pid, number)

    def wait(self, seconds: float = 120) -> int:
        """The exit status of the first rank that failed; like a launcher, it then ends the others.
        A signal's is negative."""
        until = time.monotonic() + seconds
        status = 0
        while any(one.is_alive() for one in self.ranks):
            failed = [one.exitcode for one in self.ranks if one.exitcode]
            if failed and not status:
                status = int(failed[0])
                self.send(signal.SIGTERM)
                until = min(until, time.monotonic() + 10)
            if time.monotonic() > until:
                self.send(signal.SIGKILL)
                status = status or -signal.SIGKILL
            time.sleep(0.02)
        return status or next((int(one.exitcode) for one in self.ranks if one.exitcode), 0)


def forked(function: Callable[..., None], *given: object) -> BaseProcess:
    """A process that calls `function`, started."""
    process = _server.Process(target=function, args=given)
    process.start()
    return process


def vcdeft(*words: object) -> subprocess.CompletedProcess[str]:
    """`vcdeft WORDS` as a person types it: with our own launcher, all started anew."""
    command = [sys.executable, "-m", "visualcloze_deft", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def run(
    words: Sequence[object], *, processes: int = 2, function: Callable[..., None] | None = None
) -> str:
    """Run to the end, which must be a good one; what was said."""
    group = Group(words, processes=processes, function=function)
    status = group.wait()
    assert status == 0, group.said[-3000:]
    return group.said


def _run(
    rank: int,
    world: int,
    port: int,
    words: list[str],
    said: str,
    function: Callable[..., None] | None,
) -> None:
    values = ("127.0.0.1", port, rank, rank, world, world)
    place = dict(zip(LAUNCHED, values, strict=True)) | {"OMP_NUM_THREADS": 1}
    os.environ.update({name: str(value) for name, value in place.items()})
    descriptor = os.open(said, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)

    import torch

    from visualcloze_deft.cli import main

    torch.set_num_threads(1)
    multiprocessing.set_start_method(
        "fork", force=True
    )  # of reading processes, as without a server
    if function is None:
        main(words)
    else:
        function(*words)
