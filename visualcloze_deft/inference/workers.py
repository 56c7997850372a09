"""Processes that share a list of grids."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import torch
from tqdm import tqdm

from visualcloze_deft.errors import UserError
from visualcloze_deft.inference.records import GridJob, done
from visualcloze_deft.runtime.signals import KILL, LAUNCHER, StopRequest, exit_status, handling

SINCE = "VCDEFT_SINCE"  # when --overwrite was asked for, for the processes that share its list
WAIT = 0.5  # seconds between two looks at what other processes make


def share(
    output: Path,
    waiting: Sequence[GridJob],
    arguments: Sequence[str],
    count: int,
    *,
    since: float,
) -> None:
    """Run this command in `count` processes, each on a GPU of its own where there are any.

    Ctrl-C and SIGTERM end them, too, and so does whatever ends this one. Raises `UserError` where
    grids are not made, because so many of them failed.
    """
    gpus = torch.cuda.device_count()
    command = [sys.executable, "-m", "visualcloze_deft", *arguments]
    started = []
    for rank in range(count):
        own = {LAUNCHER: str(os.getpid()), "TQDM_DISABLE": "1", SINCE: str(since)}
        if gpus:
            own["CUDA_VISIBLE_DEVICES"] = visible_gpus(gpus)[rank]
        else:
            own["OMP_NUM_THREADS"] = str(max((os.cpu_count() or 1) // count, 1))
        started.append(subprocess.Popen(command, env=os.environ | own, stdout=subprocess.DEVNULL))
    asked = StopRequest()

    def pass_on(number: int, _: FrameType | None) -> None:
        again = asked.twice(number)
        for process in started:
            process.send_signal(KILL if again else signal.SIGTERM)

    with (
        handling(pass_on),
        tqdm(total=len(waiting), desc=f"{count} processes", unit="grid") as bar,
    ):
        while any(process.poll() is None for process in started):
            time.sleep(0.2)
            bar.update(sum(done(output, plan, since) for plan in waiting) - bar.n)
        bar.update(sum(done(output, plan, since) for plan in waiting) - bar.n)
    if asked:
        raise SystemExit(exit_status(asked.signal))
    failed = sum(process.returncode != 0 for process in started)
    if unmade := sum(not done(output, plan, since) for plan in waiting):
        raise UserError(
            f"{failed} of {count} processes failed, {unmade} grids are not made; the same "
            f"command {'without --overwrite ' if since else ''}goes on with them"
        )
    if failed:
        tqdm.write(f"{failed} of {count} processes failed; the others have made their grids")


def visible_gpus(count: int) -> list[str]:
    told = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return told.split(",") if told else [str(number) for number in range(count)]
