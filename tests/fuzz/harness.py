"""`vcdeft WORDS` in a fork of this process, which has the libraries already, and what was wrong
with how it ended."""

from __future__ import annotations

import os
import resource
import select
import signal
import socket
import sys
import time
import traceback
import unicodedata
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mutations import Expected

MOST = 400  # characters of a message
LIMIT = 60.0  # seconds of a command
MEMORY = 3 << 30  # bytes that a command may take beside those that it begins with
ROOM = 256 << 20  # bytes of a file that it writes
GOOD, BROKEN, MISTAKE = 0, 1, 2  # exit statuses; 1 where 'data check' and 'annotate' found damage
TRACEBACK = "Traceback (most recent call last)"
LAID_OUT = frozenset("\n\r\t")
IN_A_GROUP = (["train"], ["data", "cache"])  # commands that would start processes


@dataclass(frozen=True, kw_only=True)
class Done:
    """How a command ended. status: negative for a signal, None where it was still running."""

    status: int | None
    out: str
    err: str

    @property
    def said(self) -> str:
        return self.out + self.err


def call(words: Sequence[str], folder: Path, *, room: int = ROOM) -> Done:
    """`vcdeft WORDS` in `folder`, to its end or for `LIMIT` seconds. Processes of it that are still
    there then are ended. room: bytes that a file takes; what is more fails, as on a full disk."""
    pipes = [os.pipe() for _ in range(2)]  # which no limit of a file's size holds for
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        _become(words, folder, room, [writing for _, writing in pipes])
    for _, writing in pipes:
        os.close(writing)
    status, said = _followed(pid, [reading for reading, _ in pipes])
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    if status is None:
        os.waitpid(pid, 0)
    out, err = (text.decode("utf-8", "replace") for text in said)
    return Done(status=status, out=out, err=err)


def _followed(pid: int, readings: list[int]) -> tuple[int | None, list[bytes]]:
    """The exit status of a process, None where it takes too long, and what it said."""
    until = time.monotonic() + LIMIT
    said = dict.fromkeys(readings, b"")
    status: int | None = None
    while status is None and time.monotonic() < until:
        ended, code = os.waitpid(pid, os.WNOHANG)
        status = os.waitstatus_to_exitcode(code) if ended else None
        while ready := select.select(readings, [], [], 0 if ended else 0.01)[0]:
            parts = {reading: os.read(reading, 1 << 16) for reading in ready}
            for reading, part in parts.items():
                said[reading] += part
            if not all(parts.values()):
                break
    for reading in readings:
        os.close(reading)
    return status, [*said.values()]


def _become(words: Sequence[str], folder: Path, room: int, said: Sequence[int]) -> None:
    """What the fork does: never returns. said: where its output and its errors go."""
    status = 70
    try:
        os.setsid()
        os.chdir(folder)
        for number, descriptor in enumerate(said, 1):
            os.dup2(descriptor, number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
        sys.stderr = os.fdopen(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY,) * 2)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
        os.environ.update(group_of(words))
        status = _run(words)
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(status)


def _run(words: Sequence[str]) -> int:
    from visualcloze_deft.cli import main

    try:
        main(words)
    except SystemExit as ended:
        if ended.code is None or isinstance(ended.code, int):
            return ended.code or 0
        print(ended.code, file=sys.stderr)
        return 1
    return 0


def group_of(words: Sequence[str]) -> dict[str, str]:
    """For a command that would start processes, the environment of a group of one process."""
    if not any(list(words[: len(command)]) == command for command in IN_A_GROUP):
        return {}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {
        "RANK": 0,
        "WORLD_SIZE": 1,
        "LOCAL_RANK": 0,
        "LOCAL_WORLD_SIZE": 1,
        "MASTER_PORT": port,
    }
    return {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"}


def faults(done: Done, words: Sequence[str], *, expected: Expected) -> list[str]:
    """What is wrong with how `vcdeft WORDS` ended."""
    if done.status is None:
        return [f"runs longer than {LIMIT:.0f} s"]
    found = []
    if TRACEBACK in done.said:
        found.append("a traceback")
    elif done.status not in (GOOD, BROKEN, MISTAKE):
        found.append(f"exit status {done.status}")
    elif done.status == BROKEN and list(words[:1]) != ["data"]:
        found.append("exit status 1")
    elif expected == "refused" and done.status == GOOD:
        found.append("nonsense was accepted")
    elif expected == "accepted" and done.status != GOOD:
        found.append("what is right was refused")
    if done.status == MISTAKE and not done.err.strip():
        found.append("refused without a word")
    lines = [line for text in done.err.splitlines() for line in text.split("\r")]
    if TRACEBACK not in done.said and (longest := max(map(len, lines), default=0)) > MOST:
        found.append(f"a message of {longest} characters")
    if odd := {c for c in done.said if unicodedata.category(c) == "Cc"} - LAID_OUT:
        found.append(f"control characters {sorted(odd)!r}")
    return found
