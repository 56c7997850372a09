"""The training loop: one adapter for all tasks, under DeepSpeed, on one process or many.

Step s of a run sees examples s * G .. (s + 1) * G - 1 (G: grids of all processes and
accumulated batches), whatever the number of processes.
"""

from __future__ import annotations

import json
import math
import shutil
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import deepspeed
import torch
import transformers
from accelerate import PartialState
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from visualcloze_deft import adapters, checkpoint, rundir
from visualcloze_deft.batch import Drawn, Draws, Group, encode
from visualcloze_deft.checkpoint import Checkpoint, Progress
from visualcloze_deft.data.mixture import Mixture
from visualcloze_deft.engine import (
    gather_adapter,
    gather_moments,
    restore_moments,
    start_engine,
    torch_optimiser,
)
from visualcloze_deft.errors import UserError
from visualcloze_deft.models import Models, default_dtype, load_models
from visualcloze_deft.output import only_writer
from visualcloze_deft.preview import sample_sheet
from visualcloze_deft.settings import Optimiser, Run


@dataclass(frozen=True, kw_only=True)
class Share:
    """Which examples this process sees: its rank of `world`, `batch` at a time."""

    rank: int
    world: int
    batch: int
    accumulate: int

    @property
    def global_batch(self) -> int:
        return self.world * self.batch * self.accumulate

    def indices(self, first_step: int, last_step: int) -> Iterator[list[int]]:
        """One list of example indices per batch of this process."""
        for step in range(first_step, last_step):
            for part in range(self.accumulate):
                start = step * self.global_batch + (part * self.world + self.rank) * self.batch
                yield list(range(start, start + self.batch))


def learning_rate_factor(step: int, steps: int, settings: Optimiser) -> float:
    """Linear warm-up, then constant or a cosine down to zero at the last step.

    >>> from visualcloze_deft.settings import Optimiser
    >>> [round(learning_rate_factor(s, 100, Optimiser(warmup=10)), 2) for s in (0, 9, 55, 99)]
    [0.1, 1.0, 0.5, 0.0]
    """
    if step < settings.warmup:
        return (step + 1) / settings.warmup
    if settings.schedule == "constant":
        return 1.0
    done = (step - settings.warmup) / max(steps - settings.warmup, 1)
    return 0.5 * (1 + math.cos(math.pi * done))


def train(run: Run, *, resume: bool, prepared: bool) -> None:
    """Train as `run` says, in every process of the launched group. Files land in `run.output`.

    prepared: whether the launcher has checked everything and made the run folder.
    """
    quiet()
    cpu = not torch.cuda.is_available()
    process = PartialState(cpu=cpu)
    # Its shared-memory operation is for inference; building it needs a compiler and leaves a lock
    # behind when killed, on which every later start would wait for ever (DeepSpeed 0.19).
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=process.backend, verbose=False)
    output = Path(run.output)
    share = Share(
        rank=process.process_index,
        world=process.num_processes,
        batch=run.batch,
        accumulate=run.accumulate,
    )
    if share.rank == 0 and not prepared:
        rundir.prepare(run, processes=share.world, resume=resume)
    with only_writer(output) if share.rank == 0 else nullcontext():
        process.wait_for_everyone()
        train_here(run, share, process, resume=resume)
    process.wait_for_everyone()
    process.destroy_process_group()


def train_here(run: Run, share: Share, process: PartialState, *, resume: bool) -> None:
    """This process's part of the run, in a folder that is ready."""
    output = Path(run.output)
    mixture = rundir.mixture_of(run)
    models = load_models(
        run.model,
        dtype=base_dtype(run, process.device.type),
        device=str(process.device),
        lora=run.model_lora,
        bits=run.quantise,
    )
    start = latest(output, share) if resume else None
    if start is not None:
        adapters.load(models.transformer, start.folder, trainable=True)
    elif run.adapter.start is not None:
        adapters.load(
            models.transformer,
            Path(run.adapter.start),
            trainable=True,
            dropout=run.adapter.dropout,
        )
    else:
        adapters.attach(models.transformer, run.adapter, seed=run.seed)
    engine = start_engine(models.transformer, run)
    if start is not None:
        restore_moments(engine, start)
    first = start.progress.step if start else 0
    loop = Loop(run=run, mixture=mixture, models=models, engine=engine, share=share, output=output)
    if share.rank == 0:
        rundir.keep_metrics_until(output, first)
        loop.writer = SummaryWriter(output / "tensorboard", purge_step=first + 1)
    loop.run_steps(first)
    loop.finish()


def quiet() -> None:
    """Keep the libraries' own bars and deprecation notices out of the training output."""
    transformers.utils.logging.disable_progress_bar()
    deepspeed.utils.logger.setLevel("WARNING")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed.*")


def base_dtype(run: Run, device: str) -> torch.dtype:
    if run.precision == "auto":
        return default_dtype(device)
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[run.precision]


def latest(output: Path, share: Share) -> Checkpoint:
    """The newest good checkpoint; the same answer in every process."""
    found, damaged = checkpoint.newest(output / "checkpoints")
    if share.rank == 0:
        for line in damaged:
            tqdm.write(line)
    return found


class Loop:
    """The steps of one process, and what it writes as rank 0."""

    def __init__(
        self,
        *,
        run: Run,
        mixture: Mixture,
        models: Models,
        engine: Any,
        share: Share,
        output: Path,
    ) -> None:
        self.run = run
        self.mixture = mixture
        self.shown = rundir.mixture_of(run, held_out=True) if run.data.hold_out else mixture
        self.models = models
        self.engine = engine
        self.share = share
        self.output = output
        self.resolution = rundir.resolution_of(run)
        self.writer: SummaryWriter | None = None

    def run_steps(self, first: int) -> None:
        run, share = self.run, self.share
        loader = DataLoader(
            Draws(self.mixture, self.resolution),
            batch_sampler=list(share.indices(first, run.steps)),
            collate_fn=_as_list,
            num_workers=run.data.workers,
        )
        batches = iter(loader)
        with tqdm(
            desc="training",
            total=run.steps,
            initial=first,
            unit="step",
            disable=share.rank != 0,
            smoothing=0.05,
            mininterval=1.0,
        ) as bar:
            for step in range(first, run.steps):
                self.take_step(step, batches, bar)
                done = step + 1
                if done % run.save_every == 0 or done == run.steps:
                    self.save(done)
                if run.sheet_every and done % run.sheet_every == 0 and done < run.steps:
                    self.sheet(done)

    def take_step(self, step: int, batches: Iterator[list[Drawn | UserError]], bar: Any) -> None:
        run, share = self.run, self.share
        factor = learning_rate_factor(step, run.steps, run.optimiser)
        for group in torch_optimiser(self.engine).param_groups:
            group["lr"] = group["full_lr"] * factor
        began = time.monotonic()
        losses: dict[int, tuple[str, float]] = {}
        noise_of_dropout = (run.seed * 1_000_003 + step) * share.world + share.rank
        torch.manual_seed(noise_of_dropout % 2**63)
        for _ in range(run.accumulate):
            losses |= self.backward(self.agreed(next(batches)))
            self.engine.step()
        self.record(step + 1, losses, factor, time.monotonic() - began, bar)

    def agreed(self, drawn: Sequence[Drawn | UserError]) -> Sequence[Drawn]:
        """`drawn`, unless a reading process of any rank found a mistake: then all raise it."""
        mistake = next((str(one) for one in drawn if isinstance(one, UserError)), None)
        found = torch.tensor(float(mistake is not None), device=self.models.device)
        torch.distributed.all_reduce(found)
        if found.item():
            said: list[str | None] = [None] * self.share.world
            torch.distributed.all_gather_object(said, mistake)
            raise UserError(next(text for text in said if text is not None))
        return cast(Sequence[Drawn], drawn)

    def backward(self, drawn: Sequence[Drawn]) -> dict[int, tuple[str, float]]:
        """Gradients of one batch; task and loss by example index."""
        run = self.run
        groups = encode(
            self.models,
            drawn,
            seed=run.seed,
            times=run.times,
            time_shift=run.time_shift,
            rollout=run.rollout,
        )
        count = len(drawn)
        if run.zero == 3:
            groups = self.as_many_as_others(groups)
        errors = self.engine(groups)
        self.engine.backward(errors[:count].mean() + 0 * errors[count:].sum())
        order = [index for group in groups for index in group.indices][:count]
        tasks = [task for group in groups for task in group.tasks][:count]
        return {
            index: (task, error)
            for index, task, error in zip(order, tasks, errors[:count].tolist(), strict=True)
        }

    def as_many_as_others(self, groups: list[Group]) -> list[Group]:
        """`groups` and its last one again, until every rank has as many: under ZeRO-3 each call of
        the transformer gathers its weights from all ranks."""
        most = torch.tensor(len(groups), device=self.models.device)
        torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
        return groups + [groups[-1]] * (int(most) - len(groups))

    def record(
        self,
        step: int,
        losses: dict[int, tuple[str, float]],
        factor: float,
        seconds: float,
        bar: Any,
    ) -> None:
        everyone: list[dict[int, tuple[str, float]]] = [{}] * self.share.world
        torch.distributed.all_gather_object(everyone, losses)
        if self.share.rank != 0:
            return
        merged = {index: pair for part in everyone for index, pair in part.items()}
        by_task: dict[str, list[float]] = {}
        for _, (task, error) in sorted(merged.items()):
            by_task.setdefault(task, []).append(error)
        loss = sum(error for _, error in merged.values()) / len(merged)
        means = {task: sum(found) / len(found) for task, found in sorted(by_task.items())}
        line = {
            "step": step,
            "examples": step * self.share.global_batch,
            "loss": loss,
            "lr": self.run.optimiser.lr * factor,
            "seconds": round(seconds, 4),
            "tasks": means,
        }
        with (self.output / rundir.METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        assert self.writer is not None
        curves = {"loss": loss, "lr": self.run.optimiser.lr * factor}
        curves |= {f"task/{task}": mean for task, mean in means.items()}
        for name, value in curves.items():
            self.writer.add_scalar(name, value, step)
        bar.update(1)
        bar.set_postfix(loss=f"{loss:.3f}", refresh=False)

    def save(self, step: int) -> None:
        moments, tensors = gather_moments(self.engine), gather_adapter(self.engine)
        if self.share.rank == 0:
            progress = Progress(
                step=step,
                examples=step * self.share.global_batch,
                seed=self.run.seed,
                global_batch=self.share.global_batch,
            )
            checkpoint.save(
                self.output / "checkpoints",
                progress,
                moments,
                lambda folder: self.write_adapter(folder, tensors, step),
            )
        torch.distributed.barrier()

    def write_adapter(self, folder: Path, tensors: dict[str, Tensor], step: int) -> None:
        adapters.save(
            self.models.transformer,
            folder,
            base=self.run.model,
            tensors=tensors,
            metadata=rundir.adapter_metadata(self.run, step),
        )

    def sheet(self, step: int) -> None:
        """A picture of what the adapter makes; every process samples, rank 0 writes."""
        self.models.transformer.eval()
        page = sample_sheet(self.models, self.shown, resolution=self.resolution)
        self.models.transformer.train()
        if self.share.rank == 0:
            folder = self.output / "sheets"
            folder.mkdir(exist_ok=True)
            page.save(folder / f"step-{step:06d}.png")

    def finish(self) -> None:
        """Publish the adapter and the last sheet; also where a resumed run has no step left."""
        tensors = gather_adapter(self.engine)
        if self.share.rank == 0:
            staging = self.output / ".adapter.part"
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir()
            self.write_adapter(staging, tensors, self.run.steps)
            checkpoint.publish(staging, self.output / "adapter")
        self.sheet(self.run.steps)
        if self.writer is not None:
            self.writer.close()


def _as_list(drawn: list[Drawn | UserError]) -> list[Drawn | UserError]:
    return drawn
