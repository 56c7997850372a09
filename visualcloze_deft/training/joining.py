"""How the processes of a run begin together, agree on their data, and leave quietly."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import deepspeed
import torch
import transformers
from accelerate import PartialState
from tqdm import tqdm

from visualcloze_deft.config.run_settings import Run
from visualcloze_deft.data.mixture import Mixture
from visualcloze_deft.errors import UserError
from visualcloze_deft.runtime.signals import StopRequest, exit_status
from visualcloze_deft.storage.locks import only_writer
from visualcloze_deft.training import checkpoint, preparation, run_folder
from visualcloze_deft.training.checkpoint import Checkpoint
from visualcloze_deft.training.metrics_log import from_first, gathered

LAUNCHER_NOTICES = 5.0  # seconds in which a launcher has seen that a process died


def begun(run: Run, held: ExitStack, prepare: Callable[[], Mixture]) -> Run:
    """The run in its folder, which is this process's own from before `prepare` until `held` ends:
    no launcher of ours has made it."""
    output = Path(run.output)
    held.enter_context(run_folder.run_lock(output))
    held.enter_context(only_writer(output, name=run_folder.WRITING))
    prepare()
    return preparation.as_decided(run)


def joined(run: Run, held: ExitStack) -> Run:
    """The run that our launcher has made the folder of, whose own it stays."""
    held.enter_context(only_writer(Path(run.output), name=run_folder.WRITING))
    return preparation.as_decided(run)


@contextmanager
def quiet_exit_if_peer_died(asked: StopRequest) -> Iterator[None]:
    """Where another process dies, collective operations fail here before the launcher ends this
    one too: it goes without a traceback, which would hide the reason."""
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, torch.distributed.DistError) or "gloo" in str(error)):
            raise
        until = time.monotonic() + LAUNCHER_NOTICES
        while not asked and time.monotonic() < until:
            time.sleep(0.1)
        if asked:
            raise SystemExit(exit_status(asked.signal)) from None
        raise


def check_same_data(mixture: Mixture, process: PartialState) -> None:
    """Raise `UserError` in all processes where one of them reads other data than the first: a file
    that came or went while they started would give them other steps, and they would wait for each
    other without end."""
    sources = [source for one in mixture.whole for source in one.sources]
    everyone = gathered([len(source) for source in sources], process.num_processes)
    for rank, sizes in enumerate(everyone):
        for source, first, size in zip(sources, everyone[0], sizes, strict=True):
            if first != size:
                raise UserError(
                    f"{source.name}: process 0 finds {first} items, process {rank} {size}; have "
                    "all processes see the same files, and change none while a run starts"
                )


def quiet() -> None:
    """Keep the libraries' own bars and deprecation notices out of the training output."""
    transformers.utils.logging.disable_progress_bar()
    deepspeed.utils.logger.setLevel("WARNING")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed.*")
    for harmless in ("Attempting to run cuBLAS, but there was no current CUDA context", "barrier"):
        warnings.filterwarnings("ignore", category=UserWarning, message=harmless)


def latest(output: Path, process: PartialState) -> Checkpoint:
    """The newest good checkpoint, as the first process finds it."""

    def found() -> Checkpoint:
        good, damaged = checkpoint.newest(output / "checkpoints")
        for line in damaged:
            tqdm.write(line)
        return good

    return from_first(found, rank=process.process_index, world=process.num_processes)
