"""The training loop: one adapter for all tasks, under DeepSpeed, on one process or many.

Which examples a step sees is `plan`'s: the next ones, whatever the number of processes.
"""

from __future__ import annotations

import math
import shutil
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any, cast

import deepspeed
import torch
import transformers
from accelerate import PartialState
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from visualcloze_deft import adapters, checkpoint, heldout, rundir
from visualcloze_deft.batch import Drawn, Draws, Group, Own, encode
from visualcloze_deft.checkpoint import Checkpoint, Progress
from visualcloze_deft.data.mixture import Mixture
from visualcloze_deft.engine import (
    adapter_norms,
    adapter_of_average,
    average,
    gather_adapter,
    gather_average,
    gather_moments,
    published,
    restore_moments,
    start_engine,
    torch_optimiser,
)
from visualcloze_deft.errors import UserError
from visualcloze_deft.models import Models, default_dtype, load_models
from visualcloze_deft.output import only_writer
from visualcloze_deft.plan import Step
from visualcloze_deft.preview import sample_sheet
from visualcloze_deft.report import write_report
from visualcloze_deft.settings import Optimiser, Run
from visualcloze_deft.watch import Seen, Watch, mean_error

ENOUGH_ITEMS = 100  # drawn before their unreadable share is judged


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


def averaging_factor(step: int, ema: float) -> float:
    """How much of the running average stays at a step: `ema`, and less of the first steps.

    >>> [round(averaging_factor(step, 0.99), 2) for step in (1, 10, 1000)]
    [0.18, 0.55, 0.99]
    """
    return min(ema, (1 + step) / (10 + step))


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
    if first and not prepared:
        rundir.prepare(run, processes=process.num_processes, resume=resume)
    with only_writer(output) if first else nullcontext():
        process.wait_for_everyone()
        train_here(run, process, resume=resume)
    process.wait_for_everyone()
    process.destroy_process_group()


def train_here(run: Run, process: PartialState, *, resume: bool) -> None:
    """This process's part of the run, in a folder that is ready."""
    output = Path(run.output)
    mixture = rundir.mixture_of(run, cache=output / rundir.INDEX)
    models = load_models(
        run.model,
        dtype=base_dtype(run, process.device.type),
        device=str(process.device),
        lora=run.model_lora,
        bits=run.quantise,
        clip_text=run.clip_text,
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
        adapters.attach(models.transformer, run.adapter, seed=run.seed)
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
        cache = Path(run.output) / rundir.INDEX
        if run.data.hold_out:
            self.shown = rundir.mixture_of(run, held_out=True, cache=cache)
        if run.watch.evaluate_every:
            self.held_out = Draws(rundir.held_out_of(run, cache=cache))
        self.models = models
        self.engine = engine
        self.rank = rank
        self.world = world
        self.plan = rundir.plan_of(run, mixture, processes=world)
        self.step = start.step if start else 0
        self.examples = start.examples if start else 0
        self.items = self.skipped = 0
        self.output = Path(run.output)
        kept = self.step if start else -1
        self.watch = Watch(run, models, rank=rank, world=world, start=kept)

    def run_steps(self) -> None:
        run, remaining = self.run, self.run.steps - self.step
        loader = DataLoader(
            Draws(self.mixture),
            batch_sampler=Own(self.plan, first=self.examples, steps=remaining, rank=self.rank),
            collate_fn=list,
            num_workers=run.data.workers,
        )
        batches = self.watch.timed(iter(loader))
        if self.step == 0:
            self.evaluate()
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
                self.evaluate()
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
        if run.ema:
            average(self.engine, averaging_factor(self.step, run.ema))
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
        tokens_of = {i: group.noise.shape[1] for group in groups for i in group.indices}
        return {
            one.index: Seen(
                task=one.task,
                error=error_of[one.index],
                tokens=tokens_of[one.index],
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
        figures: dict[str, Any] = {
            "step": self.step,
            "examples": self.examples,
            "lr": self.run.optimiser.lr * factor,
        }
        if (norm := self.engine.get_global_grad_norm()) is not None:  # ZeRO-0 does not tell
            figures["gradient_norm"] = float(norm)
        if self.watch.norms_due(self.step):
            figures["norms"] = adapter_norms(self.engine)
        everyone = self.watch.step(planned, seen, figures, seconds=seconds)
        if self.rank == 0:
            bar.update(1)
            bar.set_postfix(loss=f"{mean_error(everyone.values()):.3f}", refresh=False)
        self.count_skipped(everyone)

    def evaluate(self) -> None:
        """Where it is time, the loss on held-out grids; every process measures a share."""
        run, every = self.run, self.run.watch.evaluate_every
        if not every or (self.step % every and self.step < run.steps):
            return
        own = heldout.share(run.watch.evaluate_examples, rank=self.rank, world=self.world)
        with published(self.engine, averaged=self.has_average):
            found = heldout.losses(
                self.engine.module, self.models, self.held_out, run, own=own, agreed=self.agreed
            )
        self.watch.evaluated(self.step, self.examples, found, heldout.times_of(run).tolist())

    @property
    def has_average(self) -> bool:
        return self.run.ema > 0 and self.step > 0

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
        averaged = gather_average(self.engine) if self.run.ema else None
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
                average=averaged,
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
        with published(self.engine, averaged=self.has_average):
            page = sample_sheet(self.models, self.shown)
        if self.rank == 0:
            folder = self.output / "sheets"
            folder.mkdir(exist_ok=True)
            page.save(folder / f"step-{self.step:06d}.png")

    def finish(self) -> None:
        """Publish the adapter, the last sheet and the report; also where a resumed run has no step
        left."""
        if self.run.ema:
            self.publish("adapter-last", gather_adapter(self.engine))
            self.publish("adapter", adapter_of_average(self.engine))
        else:
            self.publish("adapter", gather_adapter(self.engine))
        self.sheet()
        self.watch.close()
        if self.rank == 0:
            write_report(self.output)
        if self.skipped and self.rank == 0:
            tqdm.write(
                f"{self.skipped} items could not be read and were replaced: "
                f"{self.output / rundir.SKIPPED}"
            )

    def publish(self, name: str, tensors: dict[str, Tensor]) -> None:
        """An adapter folder of the run, whole or not at all; rank 0 writes."""
        if self.rank == 0:
            staging = self.output / f".{name}.part"
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir()
            self.write_adapter(staging, tensors, self.run.steps)
            checkpoint.publish(staging, self.output / name)
