"""Start one training process per device through torch's own launcher."""

from __future__ import annotations

import logging
import os
import signal
import sys
import uuid
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import FrameType

import psutil

from visualcloze_deft.errors import UserError
from visualcloze_deft.runtime.gpus import check_alike, gpus_here
from visualcloze_deft.runtime.signals import KILL, LAUNCHER, StopRequest, exit_status, handling

logger = logging.getLogger(__name__)

CPU_PROCESSES = 2
ENDED_AS_ASKED = (exit_status(signal.SIGTERM), -signal.SIGTERM, -KILL)
# What sets torch's allocator: the last, for all kinds of device, where none of the others does.
ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
# What tells a process its place in a group; DeepSpeed looks for a missing one through MPI.
GROUP = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
LEAST_MOST, OF_A_CORE = 8, 4  # processes that a machine without GPU is trusted with


def already_launched() -> bool:
    """Whether torchrun, accelerate or deepspeed started this process as one of a group.

    A part of `GROUP` that tells of no other process, as containers and notebooks leave it, counts
    for nothing. Raises `UserError` where one does, or a number is none.
    """
    here = rank()
    world = _number("WORLD_SIZE", 1)
    missing = [name for name in GROUP if not os.environ.get(name)]
    if not missing:
        _number("LOCAL_RANK", 0)
        _number("MASTER_PORT", 0)
        if here >= world:
            raise UserError(f"RANK={here} with WORLD_SIZE={world}: ranks are less than that")
        return True
    if here > 0 or world > 1:
        told = f"RANK={here}" if here > 0 else f"WORLD_SIZE={world}"
        raise UserError(
            f"{told} is set in the environment, but not {', '.join(missing)}: unset what is left "
            "over, or start with torchrun, accelerate launch or deepspeed, which set all"
        )
    return False


def forget_group() -> None:
    """Take what is left over of a group out of the environment, where libraries would find it."""
    for name in GROUP:
        os.environ.pop(name, None)


def rank() -> int:
    """This process's number in its group; 0 where there is none."""
    return _number("RANK", 0)


@cache
def say_once(line: str) -> None:
    """A warning, in the first process of a group: the others, and those that share a list with the
    one that started them, find the same."""
    if rank() == 0 and (not prepared() or "RANK" in os.environ):
        logger.warning("%s", line)


def _number(name: str, default: int) -> int:
    """A variable of the environment; empty is as unset."""
    told = os.environ.get(name) or str(default)
    if not (told.isascii() and told.isdecimal() and len(told) < 10):
        raise UserError(f"{name}={told[:40]!r} in the environment is no number; unset it")
    return int(told)


def prepared() -> bool:
    """Whether this process's launcher is ours, which has checked settings and made the folder."""
    return LAUNCHER in os.environ


def check_processes(wanted: int) -> None:
    """Raise `UserError` where this machine cannot do with so many processes."""
    if gpus := len(gpus_here()):
        if wanted > gpus:
            raise UserError(
                f"--processes {wanted}: this machine has {gpus} GPUs; one process uses one"
            )
        return
    cores = os.cpu_count() or 1
    most = max(LEAST_MOST, OF_A_CORE * cores)
    if wanted > most:
        raise UserError(
            f"--processes {wanted}: this machine has {cores} CPU cores and no GPU; give at most "
            f"{most}"
        )


def process_count(wanted: int) -> int:
    """`wanted`, or one process per GPU, or two on a machine without GPU.

    Raises `UserError` where they are too many, or the GPUs used differ in memory.
    """
    check_processes(wanted)
    gpus = gpus_here()
    check_alike(gpus[: wanted or None])
    return wanted or len(gpus) or CPU_PROCESSES


def launch(arguments: Sequence[str], *, processes: int) -> int:
    """Run `vcdeft ARGUMENTS` in `processes` processes of this machine; returns the exit status.

    The first process that fails ends the others; its exit status is the answer, and where a signal
    ended it, a line says so. Ctrl-C and SIGTERM are passed on once, so that the processes save and
    leave; the second time they are killed. Where this thread ends otherwise, they are killed, too.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    forget_group()
    os.environ.update(environment(processes))  # the started processes inherit it
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        signals_to_handle="",  # its own handler gives the processes 30 seconds, then kills
    )
    asked = StopRequest()

    def pass_on(number: int, frame: FrameType | None) -> None:
        again = asked.twice(number)
        children = psutil.Process().children()
        if not children:  # none is started yet, so none would hear it
            raise SystemExit(exit_status(number))
        for child in children:
            with suppress(psutil.NoSuchProcess):
                child.send_signal(KILL if again else signal.SIGTERM)

    try:
        with handling(pass_on):
            elastic_launch(config, sys.executable)("-m", "visualcloze_deft", *arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if asked and failure.exitcode in ENDED_AS_ASKED:
            return exit_status(asked.signal)
        if failure.exitcode < 0:
            print(f"vcdeft: {killed(rank, failure.signal_name())}", file=sys.stderr)
            return exit_status(-failure.exitcode)
        return max(failure.exitcode, 1)
    return 0


def killed(rank: int, by: str) -> str:
    """What to say where a signal ended a process."""
    memory = ", as systems do where memory runs out" if by == "SIGKILL" else ""
    return (
        f"process {rank} was ended by {by}{memory}; the others have been stopped, the last "
        "checkpoint is whole: go on with --resume"
    )


def environment(processes: int) -> dict[str, str]:
    """What the started processes need to find in their environment."""
    threads = max(1, (os.cpu_count() or 1) // processes)
    here, python = Path(__file__).parents[1], Path(sys.executable).parent
    found = {
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(here), os.environ.get("PYTHONPATH")])),
        # ninja, with which DeepSpeed builds its operations, lies beside python
        "PATH": os.pathsep.join(filter(None, [str(python), os.environ.get("PATH")])),
        LAUNCHER: str(os.getpid()),
    }
    return found | device_environment()


def device_environment() -> dict[str, str]:
    """On NVIDIA's GPUs, memory in segments that grow, unless the user has set torch's allocator:
    grids of changing shapes leave holes in segments of fixed size, until hours later none is large
    enough. On a machine without GPU, what DeepSpeed needs to be told."""
    import torch

    if not torch.cuda.is_available():
        return {"DS_ACCELERATOR": "cpu"}
    if torch.version.hip is not None or any(name in os.environ for name in ALLOCATOR):
        return {}
    return {ALLOCATOR[-1]: "expandable_segments:True"}
