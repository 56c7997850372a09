"""What check_gpu.py, smoke_gpu.py and bench_gpu.py share: rows, worker processes and tables.

A script lists cases, the most telling first. Each case is a function call in a worker process, and
its result is a row, written to rows.jsonl at once. Any exception ends the worker: the row then
holds the last line of its error output, and the next worker takes the cases that are left. So an
illegal memory access, after which a process cannot use the GPU any more, costs one row.

Nothing here imports torch: the workers do.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

ROWS, ERRORS = "rows.jsonl", "errors.txt"
FIXED = ("section", "name", "verdict", "seconds")
START = 300.0  # seconds that a worker may take to import its module
OK, FAULT, NOTED, LEFT_OUT = "ok", "FAULT", "noted", "left out"
SPARE = 2  # workers that import ahead: an import takes as long as many a case
PATIENCE = 5  # times the limits, with --small: a CPU has other work as well
LENGTH = 240  # characters of an error that a row holds

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row: `work`, a function of the worker's module, called with `given`, returns its figures.

    A figure "fault" that is not empty, or a crash, is a fault of a required case; of another it is
    noted. limit: seconds. process: cases of one name share a worker until it crashes.
    """

    section: str
    name: str
    work: str
    given: dict[str, Any] = field(default_factory=dict)
    required: bool = True
    limit: float = 60
    process: str = ""


def options(description: str, *, minutes: float, output: str) -> argparse.ArgumentParser:
    """The options that all three scripts have."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path(output), help="folder for the rows")
    parser.add_argument("--minutes", type=float, default=minutes, help="stop after this time")
    parser.add_argument(
        "--only", default="", help="only rows whose 'section: name' this regular expression matches"
    )
    parser.add_argument("--small", action="store_true", help="tiny sizes, for a CPU")
    parser.add_argument(
        "--table", action="store_true", help="print the rows of an earlier run as Markdown"
    )
    return parser


class Sheet:
    """The rows of one run, in a new rows.jsonl."""

    def __init__(self, folder: Path, minutes: float) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.path = folder / ROWS
        self.path.write_text("")
        self.began = time.monotonic()
        self.until = self.began + 60 * minutes

    @property
    def left(self) -> float:
        """Seconds."""
        return self.until - time.monotonic()

    def add(self, row: Row) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        shown = "  ".join(f"{name} {short(value)}" for name, value in figures_of(row).items())
        at = f"[{time.monotonic() - self.began:4.0f} s]"
        print(at, f"{row['verdict']:8s} {row['section']}: {row['name']}  {shown}", flush=True)


def result(case: Case, figures: Row, seconds: float) -> Row:
    """The row of a case that returned `figures`."""
    failed = OK if not figures.get("fault") else FAULT if case.required else NOTED
    verdict = LEFT_OUT if "left out" in figures else failed
    head = {"section": case.section, "name": case.name, "verdict": verdict}
    return {**head, "seconds": round(seconds, 1), **figures}


def chosen(cases: Iterable[Case], only: str) -> list[Case]:
    """The cases that the expression `only` matches; the machine is always described."""
    found = re.compile(only)
    return [c for c in cases if found.search(f"{c.section}: {c.name}") or c.section == "machine"]


def finished(sheet: Sheet, missed: int) -> int:
    """Print all tables; the exit status: 1 where a required case failed."""
    rows = read(sheet.folder)
    print(f"\n{tables(rows)}")
    faults = sum(row["verdict"] == FAULT for row in rows)
    noted = sum(row["verdict"] == NOTED for row in rows)
    print(f"{len(rows)} rows: {faults} faults, {noted} noted; {missed} not reached; {sheet.path}")
    return 1 if faults else 0


def run(cases: Sequence[Case], module: str, asked: argparse.Namespace) -> int:
    """Run the cases in workers that import `module`; the exit status."""
    if asked.table:
        print(tables(read(asked.output)))
        return 0
    sheet = Sheet(asked.output, asked.minutes)
    queue = chosen(cases, asked.only)
    workers = Workers(module, sheet.folder / ERRORS, spare=0 if asked.small else SPARE)
    try:
        while queue and sheet.left > 0:
            case = queue.pop(0)
            began = time.monotonic()
            worker = workers.of(case.process, further=len(queue))
            limit = min(case.limit * (PATIENCE if asked.small else 1), max(sheet.left, 1.0))
            figures = worker.call(case, limit)
            if sheet.left <= 0 and "fault" in figures:
                figures = {"left out": "no time left"}
            sheet.add(result(case, figures, time.monotonic() - began))
    finally:
        workers.end()
    return finished(sheet, len(queue))


class Workers:
    """The worker in use and `spare` more, which import the module meanwhile."""

    def __init__(self, module: str, log: Path, *, spare: int) -> None:
        self.module, self.log, self.spare = module, log, spare
        self.process = ""
        self.now: Worker | None = None
        self.next: list[Worker] = []
        log.write_text("")

    def of(self, process: str, *, further: int) -> Worker:
        """A worker for cases of this process name. further: how many cases follow."""
        if self.now is None or self.now.ended or process != self.process:
            if self.now is not None:
                self.now.end()
            self.now = self.next.pop(0) if self.next else Worker(self.module, self.log)
            self.process = process
        while len(self.next) < min(self.spare, further):
            self.next.append(Worker(self.module, self.log))
        return self.now

    def end(self) -> None:
        for worker in [self.now, *self.next] if self.now else []:
            worker.end()


class Worker:
    """A process that imports a module and calls its functions, one after the other."""

    def __init__(self, module: str, log: Path) -> None:
        self.log = log
        self.began = time.monotonic()
        self.ready = False
        with log.open("ab") as errors:
            self.process = subprocess.Popen(
                [sys.executable, __file__, module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment(),
            )

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    def call(self, case: Case, limit: float) -> Row:
        """The figures of a case, or its fault where the worker crashes or takes too long."""
        if not self.ready:
            answer = self.answer(START, said=0)
            if "fault" in answer:
                return answer
            self.ready = True
        assert self.process.stdin is not None
        said = self.log.stat().st_size
        with suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps([case.work, case.given]).encode() + b"\n")
            self.process.stdin.flush()
        return self.answer(limit, said=said)

    def answer(self, limit: float, *, said: int) -> Row:
        """The next line that the worker writes. said: bytes of the log that are older."""
        stdout = self.process.stdout
        assert stdout is not None
        readable, *_ = select.select([stdout], [], [], limit)
        line = stdout.readline() if readable else b""
        if line:
            found: Row = json.loads(line)
            return found
        if not readable:
            self.end()
            return {"fault": f"no result after {limit:.0f} s"}
        status = self.process.wait()
        return {"fault": f"exit {status}: {last_line(self.log, after=said)}"[:LENGTH]}

    def end(self) -> None:
        """End the worker and the processes that it started."""
        kill(self.process)
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):
                pipe.close()


def environment() -> dict[str, str]:
    """Of the processes that are started: they import this checkout's package."""
    found = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, found))}


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and all that it started, in whatever session: torch's launcher opens more."""
    with suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                child.kill()
    process.kill()
    process.wait()


def serve(module: str) -> None:
    """The worker: read calls from stdin, write figures to stdout. Other output goes to stderr."""
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    functions = vars(importlib.import_module(module))
    channel.write("{}\n")
    for line in sys.stdin:
        work, given = json.loads(line)
        channel.write(json.dumps(functions[work](**given)) + "\n")


def last_line(log: Path, *, after: int = 0) -> str:
    """The last line of an error output that says something: an exception's, not a warning's."""
    with log.open("rb") as file:
        file.seek(after)
        lines = file.read().decode(errors="replace").splitlines()
    said = [line.strip() for line in lines if line.strip() and not line.startswith(" ")]
    named = [line for line in said if "Error" in line.split(" ")[0] or line.startswith("vcdeft:")]
    return (named or said or ["it said nothing"])[-1]


# Tables


def read(folder: Path) -> list[Row]:
    """The rows of an earlier run, or of one that is under way."""
    return [json.loads(line) for line in (folder / ROWS).read_text("utf-8").splitlines()]


def figures_of(row: Row) -> Row:
    return {name: value for name, value in row.items() if name not in FIXED}


def short(value: Any) -> str:
    """
    >>> [short(v) for v in (0.123456, 12345.6, 17, "a|b", {"q": 0.5})]
    ['0.1235', '12,346', '17', 'a/b', 'q 0.5']
    """
    if isinstance(value, dict):
        return ", ".join(f"{name} {short(one)}" for name, one in value.items())
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value).replace("|", "/")


def tables(rows: Sequence[Row]) -> str:
    """One Markdown table for each section, in order; a column for each figure that any row has."""
    sections: dict[str, list[Row]] = {}
    for row in rows:
        sections.setdefault(row["section"], []).append(row)
    return "\n".join(f"### {name}\n\n{table(found)}" for name, found in sections.items())


def table(rows: Sequence[Row]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in figures_of(row)))
    lines = [f"| {' | '.join(['', 'verdict', *names, 's'])} |", "|" + "---|" * (len(names) + 3)]
    for row in rows:
        cells = [short(row[name]) if name in row else "" for name in names]
        lines.append(
            f"| {' | '.join([row['name'], row['verdict'], *cells, short(row['seconds'])])} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    serve(sys.argv[1])
