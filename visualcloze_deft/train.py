"""The training loop: one adapter for all tasks, under DeepSpeed, on one process or many.

Which examples a step sees is `plan`'s: the next ones, whatever the number of processes.
"""

from __future__ import annotations

import math
import shutil
import time
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import islice
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

from visualcloze_deft import adapters, checkpoint, rundir, sharded
from visualcloze_deft.batch import Drawn, Draws, Group, Own, encode
from visualcloze_deft.checkpoint import Checkpoint, Progress
from visualcloze_deft.data.mixture import Mixture, Skipped
from visualcloze_deft.engine import (
    deepspeed_config,
    gather_adapter,
    gather_moments,
    restore_moments,
    start_engine,
    torch_optimiser,
)
from visualcloze_deft.errors import UserError
from visualcloze_deft.models import Models, default_dtype, load_models
from visualcloze_deft.output import only_writer
from visualcloze_deft.plan import Step
from visualcloze_deft.preview import sample_sheet
from visualcloze_deft.settings import Optimiser, Run

ENOUGH_ITEMS = 100  # drawn before their unreadable share is judged


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What became of one example: its task, its loss, and how many items it took."""

    task: str
    error: float
    items: int
    skipped: tuple[Skipped, ...]


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
    first = process.process_index == 0
    if not prepared:
        prepare_once(run, process, resume=resume)
    with only_writer(output) if first else nullcontext():
        process.wait_for_everyone()
        train_here(run, process, resume=resume)
    process.wait_for_everyone()
    process.destroy_process_group()


def prepare_once(run: Run, process: PartialState, *, resume: bool) -> None:
    """Make the run folder in the first process; what that one refuses, all do, on every node."""
    said: list[str | None] = [None]
    if process.is_main_process:
        try:
            rundir.prepare(run, processes=process.num_processes, resume=resume)
        except UserError as mistake:
            said = [str(mistake)]
    torch.distributed.broadcast_object_list(said)
    if said[0] is not None:
        raise UserError(said[0])


def train_here(run: Run, process: PartialState, *, resume: bool) -> None:
    """This process's part of the run, in a folder that is ready."""
    output = Path(run.output)
    mixture = rundir.mixture_of(run, cache=output / rundir.INDEX)
    dtype = base_dtype(run, process.device.type)
    models = load_models(
        run.model,
        dtype=dtype,
        device=str(process.device),
        lora=run.model_lora,
        bits=run.quantise,
        clip_text=run.clip_text,
        split=sharded.splitter(deepspeed_config(run), dtype) if run.zero == 3 else None,
    )
    start = latest(output, process) if resume else None
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
        adapters.attach(models.transformer, run.adapter, seed=run.seed, whole=sharded.whole)
    engine = start_engine(models.transformer, run)
    if start is not None:
        restore_moments(engine, start)
    loop = Loop(
        run=run,
        mixture=mixture,
        models=models,
        engine=engine,
        rank=process.process_index,
        world=process.num_processes,
        start=start.progress if start else None,
    )
    loop.run_steps()
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


def latest(output: Path, process: PartialState) -> Checkpoint:
    """The newest good checkpoint; the same answer in every process."""
    found, damaged = checkpoint.newest(output / "checkpoints")
    if process.is_main_process:
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
        rank: int,
        world: int,
        start: Progress | None,
    ) -> None:
        """start: how far the run that is resumed came."""
        self.run = run
        self.mixture = mixture
        self.shown = mixture
        if run.data.hold_out:
            cache = Path(run.output) / rundir.INDEX
            self.shown = rundir.mixture_of(run, held_out=True, cache=cache)
        self.models = models
        self.engine = engine
        self.rank = rank
        self.world = world
        self.plan = rundir.plan_of(run, mixture, processes=world)
        self.step = start.step if start else 0
        self.examples = start.examples if start else 0
        self.items = self.skipped = 0
        self.output = Path(run.output)
        self.writer: SummaryWriter | None = None
        if rank == 0:
            rundir.keep_lines_until(self.output, self.step)
            self.writer = SummaryWriter(self.output / "tensorboard", purge_step=self.step + 1)

    def run_steps(self) -> None:
        run, remaining = self.run, self.run.steps - self.step
        loader = DataLoader(
            Draws(self.mixture),
            batch_sampler=Own(self.plan, first=self.examples, steps=remaining, rank=self.rank),
            collate_fn=list,
            num_workers=run.data.workers,
        )
        batches = iter(loader)
        with tqdm(
            desc="training",
            total=run.steps,
            initial=self.step,
            unit="step",
            disable=self.rank != 0,
            smoothing=0.05,
            mininterval=1.0,
        ) as bar:
            for planned in islice(self.plan.steps(self.examples), remaining):
                self.take_step(planned, batches, bar)
                done = self.step
                if done % run.save_every == 0 or done == run.steps:
                    self.save()
                if run.sheet_every and done % run.sheet_every == 0 and done < run.steps:
                    self.sheet()

    def take_step(
        self, planned: Step, batches: Iterator[list[Drawn | UserError]], bar: Any
    ) -> None:
        run = self.run
        factor = learning_rate_factor(self.step, run.steps, run.optimiser)
        for group in torch_optimiser(self.engine).param_groups:
            group["lr"] = group["full_lr"] * factor
        began = time.monotonic()
        seen: dict[int, Seen] = {}
        noise_of_dropout = (run.seed * 1_000_003 + self.step) * self.world + self.rank
        torch.manual_seed(noise_of_dropout % 2**63)
        share = len(planned.parts) / planned.examples  # parts are averaged, examples count
        for _ in range(run.accumulate):
            seen |= self.backward(self.agreed(next(batches)), share)
            self.engine.step()
        self.step += 1
        self.examples += planned.examples
        self.record(planned, seen, factor, time.monotonic() - began, bar)

    def agreed(self, drawn: Sequence[Drawn | UserError]) -> Sequence[Drawn]:
        """`drawn`, unless a reading process of any rank found a mistake: then all raise it."""
        mistake = next((str(one) for one in drawn if isinstance(one, UserError)), None)
        found = torch.tensor(float(mistake is not None), device=self.models.device)
        torch.distributed.all_reduce(found)
        if found.item():
            said: list[str | None] = [None] * self.world
            torch.distributed.all_gather_object(said, mistake)
            raise UserError(next(text for text in said if text is not None))
        return cast(Sequence[Drawn], drawn)

    def backward(self, drawn: Sequence[Drawn], share: float) -> dict[int, Seen]:
        """Gradients of one batch, each example's counted `share`; what was seen, by index."""
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
        self.engine.backward(share * errors[:count].sum() + 0 * errors[count:].sum())
        order = [index for group in groups for index in group.indices][:count]
        error_of = dict(zip(order, errors[:count].tolist(), strict=True))
        return {
            one.index: Seen(
                task=one.task,
                error=error_of[one.index],
                items=len(one.grid.strips),
                skipped=one.skipped,
            )
            for one in drawn
        }

    def as_many_as_others(self, groups: list[Group]) -> list[Group]:
        """`groups` and its last one again, until every rank has as many: under ZeRO-3 each call of
        the transformer gathers its weights from all ranks."""
        most = torch.tensor(len(groups), device=self.models.device)
        torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
        return groups + [groups[-1]] * (int(most) - len(groups))

    def record(
        self, planned: Step, seen: dict[int, Seen], factor: float, seconds: float, bar: Any
    ) -> None:
        everyone: list[dict[int, Seen]] = [{}] * self.world
        torch.distributed.all_gather_object(everyone, seen)
        merged = dict(sorted((i, one) for part in everyone for i, one in part.items()))
        if self.rank == 0:
            self.write_metrics(planned, merged, factor, seconds)
            bar.update(1)
            bar.set_postfix(loss=f"{mean_error(merged.values()):.3f}", refresh=False)
        self.count_skipped(merged)

    def write_metrics(
        self, planned: Step, seen: Mapping[int, Seen], factor: float, seconds: float
    ) -> None:
        by_task: dict[str, list[Seen]] = {}
        for one in seen.values():
            by_task.setdefault(one.task, []).append(one)
        means = {task: mean_error(found) for task, found in sorted(by_task.items())}
        loss, rate = mean_error(seen.values()), self.run.optimiser.lr * factor
        line: dict[str, object] = {
            "step": self.step,
            "examples": self.examples,
            "loss": loss,
            "lr": rate,
            "seconds": round(seconds, 4),
            "tasks": means,
        }
        if planned.tokens:
            line |= {"tokens": sum(planned.tokens), "idle": round(planned.idle, 4)}
        rundir.append_line(self.output / rundir.METRICS, line)
        assert self.writer is not None
        curves = {"loss": loss, "lr": rate} | {f"task/{task}": e for task, e in means.items()}
        for name, value in curves.items():
            self.writer.add_scalar(name, value, self.step)

    def count_skipped(self, seen: Mapping[int, Seen]) -> None:
        """List what could not be read; where it is too much, every process stops."""
        skipped = [(index, one) for index, found in seen.items() for one in found.skipped]
        self.items += sum(one.items for one in seen.values()) + len(skipped)
        self.skipped += len(skipped)
        if self.rank == 0:
            for index, one in skipped:
                line = {"step": self.step, "example": index, **asdict(one)}
                rundir.append_line(self.output / rundir.SKIPPED, line)
        most = self.run.data.skip_at_most
        if skipped and self.items >= ENOUGH_ITEMS and self.skipped > most * self.items:
            raise UserError(
                f"{self.skipped} of {self.items} items drawn could not be read, more than "
                f"data.skip_at_most = {most:g}; {self.output / rundir.SKIPPED} lists them, the "
                f"last: {skipped[-1][1].why}"
            )

    def save(self) -> None:
        moments, tensors = gather_moments(self.engine), gather_adapter(self.engine)
        if self.rank == 0:
            progress = Progress(
                step=self.step,
                examples=self.examples,
                seed=self.run.seed,
                global_batch=self.plan.size,
            )
            checkpoint.save(
                self.output / "checkpoints",
                progress,
                moments,
                lambda folder: self.write_adapter(folder, tensors, self.step),
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

    def sheet(self) -> None:
        """A picture of what the adapter makes; every process samples, rank 0 writes."""
        self.models.transformer.eval()
        page = sample_sheet(self.models, self.shown)
        self.models.transformer.train()
        if self.rank == 0:
            folder = self.output / "sheets"
            folder.mkdir(exist_ok=True)
            page.save(folder / f"step-{self.step:06d}.png")

    def finish(self) -> None:
        """Publish the adapter and the last sheet; also where a resumed run has no step left."""
        tensors = gather_adapter(self.engine)
        if self.rank == 0:
            staging = self.output / ".adapter.part"
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir()
            self.write_adapter(staging, tensors, self.run.steps)
            checkpoint.publish(staging, self.output / "adapter")
        self.sheet()
        if self.skipped and self.rank == 0:
            tqdm.write(
                f"{self.skipped} items could not be read and were replaced: "
                f"{self.output / rundir.SKIPPED}"
            )
        if self.writer is not None:
            self.writer.close()


def mean_error(seen: Collection[Seen]) -> float:
    return sum(one.error for one in seen) / len(seen)
