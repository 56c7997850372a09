"""Start one training process per device through torch's own launcher."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

CPU_PROCESSES = 2
PREPARED = "VCDEFT_PREPARED"  # set for the processes that `launch` starts


def already_launched() -> bool:
    """Whether torchrun, accelerate or deepspeed started this process as one of a group."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def prepared() -> bool:
    """Whether this process's launcher is ours, which has checked settings and made the folder."""
    return PREPARED in os.environ


def process_count(wanted: int) -> int:
    """`wanted`, or one process per GPU, or two on a machine without GPU."""
    if wanted:
        return wanted
    import torch

    return torch.cuda.device_count() or CPU_PROCESSES


def launch(arguments: Sequence[str], *, processes: int) -> int:
    """Run `vcdeft ARGUMENTS` in `processes` processes; returns the exit status."""
    threads = max(1, (os.cpu_count() or 1) // processes)
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ, **cpu_environment()}
    environment[PREPARED] = "1"
    environment["PYTHONPATH"] = os.pathsep.join(
        part for part in (str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")) if part
    )
    environment["PATH"] = os.pathsep.join(  # ninja, with which DeepSpeed builds, lies beside python
        [str(Path(sys.executable).parent), environment.get("PATH", "")]
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={processes}", "-m", "visualcloze_deft", *arguments]
    return subprocess.run(command, env=environment, check=False).returncode


def cpu_environment() -> dict[str, str]:
    """What DeepSpeed needs to be told on a machine without GPU."""
    import torch

    return {} if torch.cuda.is_available() else {"DS_ACCELERATOR": "cpu"}
