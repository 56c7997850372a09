"""The training loop: one adapter for all tasks, under DeepSpeed, on one process or many.

Which examples a step sees is `plan`'s: the next ones, whatever the number of processes.
"""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, nullcontext
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, cast

import deepspeed
import torch
from accelerate import PartialState
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from visualcloze_deft.adapters import files, injection
from visualcloze_deft.backbones import compiled, kernels
from visualcloze_deft.backbones.attention_check import Shapes
from visualcloze_deft.backbones.base import Models
from visualcloze_deft.backbones.embedding_cache import Encodings
from visualcloze_deft.backbones.kernels import Kernels, shapes_in
from visualcloze_deft.backbones.precision import dtype_of
from visualcloze_deft.backbones.table import backbone_of
from visualcloze_deft.config.run_settings import Run
from visualcloze_deft.data.mixture import Mixture
from visualcloze_deft.errors import UserError
from visualcloze_deft.runtime.launch import device_environment
from visualcloze_deft.runtime.signals import StopRequest, exit_status, handling, ignore_signals
from visualcloze_deft.runtime.watchdog import Watchdog
from visualcloze_deft.sampling.encoding import PixelExample, encode
from visualcloze_deft.sampling.room import Room, put_back, short_of_memory
from visualcloze_deft.storage.atomic import write_png
from visualcloze_deft.training import (
    checkpoint,
    preparation,
    run_data,
    run_folder,
    validation,
    zero3,
)
from visualcloze_deft.training.batch_schedule import StepPlan
from visualcloze_deft.training.checkpoint import Progress
from visualcloze_deft.training.datasets import PixelDataset, RankBatchSampler
from visualcloze_deft.training.engine import (
    adapter_norms,
    adapter_of_average,
    average,
    deepspeed_config,
    gather_adapter,
    gather_average,
    gather_moments,
    published,
    restore_moments,
    start_engine,
    torch_optimiser,
)
from visualcloze_deft.training.joining import (
    begun,
    check_same_data,
    joined,
    latest,
    quiet,
    quiet_exit_if_peer_died,
)
from visualcloze_deft.training.metrics_log import ExampleLoss, MetricsLog, from_first, mean_error
from visualcloze_deft.training.rate_schedules import averaging_factor, learning_rate_factor
from visualcloze_deft.training.report import write_report
from visualcloze_deft.training.sample_sheets import sample_sheet
from visualcloze_deft.training.step import Batch, Stepper, first_said, kernels_at_start, seen_in

ENOUGH_ITEMS = 100  # drawn before their unreadable share is judged


def train(
    run: Run,
    *,
    resume: bool,
    prepared: bool,
    allowed: Collection[str] = (),
    divide: bool = False,
) -> None:
    """Train as the first process's `run` says, in every process of the launched group. Files land
    in `run.output`.

    prepared: whether the launcher has checked everything, made the run folder and holds its lock.
    allowed, divide: see `preparation.prepare`.
    """
    quiet()
    os.environ.update(device_environment())  # also under another launcher than ours
    cpu = not torch.cuda.is_available()
    patience = timedelta(seconds=2 * run.timeout)  # the watchdog, which can say why, comes first
    process = PartialState(cpu=cpu, timeout=patience)
    # Its shared-memory operation is for inference; building it needs a compiler and leaves a lock
    # behind when killed, on which every later start would wait for ever (DeepSpeed 0.19).
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=process.backend, verbose=False)
    asked, rank, world = StopRequest(at_once=True), process.process_index, process.num_processes
    with ExitStack() as held:
        prepare = partial(
            preparation.prepare,
            run,
            processes=world,
            resume=resume,
            allowed=allowed,
            divide=divide,
        )
        begin = partial(joined, run, held) if prepared else partial(begun, run, held, prepare)
        run = from_first(begin, rank=rank, world=world)
        held.enter_context(handling(asked.hear))
        held.enter_context(quiet_exit_if_peer_died(asked))
        process.wait_for_everyone()
        watchdog = Watchdog(Path(run.output), rank=rank, world=world, patience=run.timeout)
        with watchdog:
            train_here(run, process, resume=resume, asked=asked, watchdog=watchdog)
    process.wait_for_everyone()
    process.destroy_process_group()


def train_here(
    run: Run, process: PartialState, *, resume: bool, asked: StopRequest, watchdog: Watchdog
) -> None:
    """This process's part of the run, in a folder that is ready."""
    output = Path(run.output)
    mixture = run_data.mixture_of(run, cache=output / run_folder.INDEX)
    check_same_data(mixture, process)
    kept = run_folder.encodings_folder(run)
    dtype = dtype_of(run.precision, process.device.type)
    start = latest(output, process) if resume else None
    watchdog.doing("choosing kernels")
    tokens = mixture.least_tokens, mixture.most_tokens
    shapes = shapes_in(run, image_tokens=tokens, device=process.device)
    rank, world = process.process_index, process.num_processes
    before = start.progress if start else None
    chosen = kernels_at_start(run, shapes, before, rank=rank, world=world)
    if process.device.type == "cuda":  # the memory of its test is not the run's
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    watchdog.doing("loading the model")
    models = (
        backbone_of(run.model)
        .networks()
        .load(
            run.model,
            dtype=dtype,
            device=str(process.device),
            lora=run.model_lora,
            bits=run.quantise,
            clip_text=run.clip_text,
            rest="cpu" if run.offload_encoders else None,
            encodings=Encodings(kept) if kept else None,
            split=zero3.splitter(deepspeed_config(run), dtype) if run.zero == 3 else None,
        )
    )
    watchdog.doing("attaching the adapter")
    if start is not None:
        files.load(models.denoiser, start.folder, trainable=True)
    elif run.adapter.init_from is not None:
        files.load(
            models.denoiser,
            Path(run.adapter.init_from),
            trainable=True,
            dropout=run.adapter.dropout,
        )
    else:
        injection.attach(models.denoiser, run.adapter, seed=run.seed, whole=zero3.whole)
    kernels.use(models.denoiser, chosen)
    watchdog.doing("starting DeepSpeed")
    engine = start_engine(models.denoiser, run)
    if start is not None:
        restore_moments(engine, start)
    loop = Loop(
        run=run,
        mixture=mixture,
        models=models,
        engine=engine,
        rank=rank,
        world=world,
        start=before,
        chosen=chosen,
        shapes=shapes,
        asked=asked,
        watchdog=watchdog,
    )
    with compiled.explained() if run.compile else nullcontext():
        loop.run_steps()
        loop.finish()
    if models.encodings is not None:
        used = models.encodings.used_by_all()
        if process.is_main_process:
            tqdm.write(f"encodings {models.encodings.folder}: {used}")


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
        chosen: Kernels,
        shapes: Shapes,
        asked: StopRequest,
        watchdog: Watchdog,
    ) -> None:
        """start: how far the run that is resumed came; chosen: the kernels that the transformer
        uses; shapes: of attention, to test others; asked: whether to save and leave."""
        self.run = run
        self.mixture = mixture
        self.shown = mixture
        cache = Path(run.output) / run_folder.INDEX
        if run.data.validation_every:
            self.shown = run_data.mixture_of(run, held_out=True, cache=cache)
        if run.logging.validate_every:
            self.held_out = PixelDataset(run_data.held_out_of(run, cache=cache))
        self.models = models
        self.engine = engine
        self.rank = rank
        self.world = world
        self.plan = preparation.plan_of(run, mixture, processes=world)
        self.asked = asked
        self.stopping = False
        self.watchdog = watchdog
        self.step = start.step if start else 0
        self.examples = start.examples if start else 0
        self.not_finite = start.not_finite if start else 0
        self.in_a_row = start.in_a_row if start else 0
        self.stepper = Stepper(
            engine,
            run,
            rank=rank,
            world=world,
            shapes=shapes,
            chosen=chosen,
            explained=start.explained if start else {},
        )
        self.items = self.skipped = 0
        self.output = Path(run.output)
        self.base = run_folder.base_of(run)
        kept = self.step if start else -1
        self.watch = MetricsLog(run, models, rank=rank, world=world, start=kept)

    def run_steps(self) -> None:
        run, remaining = self.run, self.run.steps - self.step
        loader = DataLoader(
            PixelDataset(self.mixture),
            batch_sampler=RankBatchSampler(
                self.plan, first=self.examples, steps=remaining, rank=self.rank
            ),
            collate_fn=list,
            num_workers=run.data.workers,
            worker_init_fn=ignore_signals,  # a signal to all must leave the last step its data
        )
        if not self.watch.has_evaluated(self.step):  # a run may have been ended before it did
            self.evaluate()
        # closed however the loop ends: reading processes, deaf to signals, end with their iterator
        with (
            closing(self.watch.timed(iter(loader))) as batches,
            tqdm(
                desc="training",
                total=run.steps,
                initial=self.step,
                unit="step",
                disable=self.rank != 0,
                smoothing=0.05,
                mininterval=1.0,
            ) as bar,
        ):
            for planned in islice(self.plan.steps(self.examples), remaining):
                self.take_step(planned, batches, bar)
                done = self.step
                leaving = self.stopping and done < run.steps
                if not leaving:
                    self.evaluate()
                if done % run.save_every == 0 or done == run.steps or leaving:
                    self.save()
                if leaving:
                    self.leave()
                if run.sample_every and done % run.sample_every == 0 and done < run.steps:
                    self.sheet()

    def take_step(
        self, planned: StepPlan, batches: Iterator[list[PixelExample | UserError]], bar: Any
    ) -> None:
        run = self.run
        self.watchdog.doing(f"step {self.step + 1}")
        factor = learning_rate_factor(self.step, run.steps, run.optimiser)
        for group in torch_optimiser(self.engine).param_groups:
            group["lr"] = group["full_lr"] * factor
        began = time.monotonic()
        drawn = [next(batches) for _ in range(run.accumulate)]
        self.asked.at_once = False  # from here on a step is taken, and what it learns is saved
        step = self.encoded(drawn)
        share = len(planned.parts) / planned.examples  # parts are averaged, examples count
        errors = self.stepper.take(step, share, number=self.step + 1)
        self.step += 1
        if run.ema:
            stepped = self.engine.was_step_applied()
            average(self.engine, averaging_factor(self.step, run.ema) if stepped else 1.0)
        self.examples += planned.examples
        seen = seen_in(step, torch.cat(errors).tolist())
        everyone = self.record(planned, seen, factor, time.monotonic() - began, bar)
        self.count_not_finite(planned, everyone)

    def agreed(self, drawn: Sequence[PixelExample | UserError]) -> Sequence[PixelExample]:
        """`drawn`, unless a reading process of any rank found a mistake: then all raise it."""
        self.together(next((str(one) for one in drawn if isinstance(one, UserError)), None))
        return cast(Sequence[PixelExample], drawn)

    def together(self, mistake: str | None) -> None:
        """All processes raise the `mistake` that one found, and stop where one is asked to."""
        raising, stopping = mistake is not None, bool(self.asked)
        if self.world > 1:
            found = torch.tensor([float(raising), float(stopping)], device=self.models.device)
            torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
            raising, stopping = found.bool().tolist()
        self.stopping |= stopping
        if raising:
            raise UserError(cast(str, first_said(mistake, self.world)))

    def encoded(self, parts: Sequence[Sequence[PixelExample | UserError]]) -> list[Batch]:
        """The batches of a step, ready to compute; all processes raise what one could not draw.

        Under ZeRO-3 each call of the transformer gathers its weights from all processes: a batch
        of fewer groups than another process's has its last one again.
        """
        run = self.run
        self.agreed([one for part in parts for one in part])
        drawn = [cast(Sequence[PixelExample], part) for part in parts]
        groups = [
            encode(
                self.models,
                part,
                seed=run.seed,
                times=run.timestep_sampling,
                timestep_shift=run.timestep_shift,
                scheduled_sampling=run.scheduled_sampling,
            )
            for part in drawn
        ]
        if run.zero == 3 and self.world > 1:
            most = torch.tensor([len(part) for part in groups], device=self.models.device)
            torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
            groups = [
                part + [part[-1]] * (count - len(part))
                for part, count in zip(groups, most.tolist(), strict=True)
            ]
        return [Batch(drawn=d, groups=g) for d, g in zip(drawn, groups, strict=True)]

    def record(
        self,
        planned: StepPlan,
        seen: dict[int, ExampleLoss],
        factor: float,
        seconds: float,
        bar: Any,
    ) -> dict[int, ExampleLoss]:
        """Write what came of a step; returns what all processes saw, by example."""
        figures: dict[str, Any] = {
            "step": self.step,
            "examples": self.examples,
            "lr": self.run.optimiser.lr * factor,
        }
        if (norm := self.engine.get_global_grad_norm()) is not None:
            figures["gradient_norm"] = float(norm)
        if self.watch.norms_due(self.step):
            figures["norms"] = adapter_norms(self.engine)
        everyone = self.watch.step(planned, seen, figures, seconds=seconds)
        if self.rank == 0:
            bar.update(1)
            bar.set_postfix(loss=f"{mean_error(everyone.values()):.3f}", refresh=False)
        self.count_skipped(everyone)
        return everyone

    def evaluate(self) -> None:
        """Where it is time, the loss on held-out grids; every process measures a share."""
        run, every = self.run, self.run.logging.validate_every
        if not every or (self.step % every and self.step < run.steps):
            return
        self.watchdog.doing(f"the held-out loss of step {self.step}")
        own = validation.share(run.logging.validation_examples, rank=self.rank, world=self.world)
        with published(self.engine, averaged=self.has_average):
            found = validation.losses(
                self.engine.module, self.models, self.held_out, run, own=own, agreed=self.agreed
            )
        self.watch.evaluated(self.step, self.examples, found, validation.times_of(run).tolist())

    @property
    def has_average(self) -> bool:
        return self.run.ema > 0 and self.step > 0

    def count_skipped(self, seen: Mapping[int, ExampleLoss]) -> None:
        """List what could not be read; where it is too much, every process stops."""
        skipped = [(index, one) for index, found in seen.items() for one in found.skipped]
        self.items += sum(one.items for one in seen.values()) + len(skipped)
        self.skipped += len(skipped)
        if self.rank == 0:
            for index, one in skipped:
                line = {"step": self.step, "example": index, **asdict(one)}
                run_folder.append_line(self.output / run_folder.SKIPPED, line)
        most = self.run.data.skip_at_most
        if skipped and self.items >= ENOUGH_ITEMS and self.skipped > most * self.items:
            raise UserError(
                f"{self.skipped} of {self.items} items drawn could not be read, more than "
                f"data.skip_at_most = {most:g}; {self.output / run_folder.SKIPPED} lists them, the "
                f"last: {skipped[-1][1].why}"
            )

    def count_not_finite(self, planned: StepPlan, seen: Mapping[int, ExampleLoss]) -> None:
        """A step without a finite gradient changed nothing, in no process; too many end the run.

        Under every ZeRO stage the norm of all gradients decides, so all processes find the same.
        """
        if self.engine.was_step_applied():
            self.in_a_row = 0
            return
        self.not_finite += 1
        self.in_a_row += 1
        odd = [index for index, one in seen.items() if not math.isfinite(one.error)]
        first, last = planned.first, planned.first + planned.examples - 1
        where = f"examples {', '.join(map(str, odd))}" if odd else f"examples {first} to {last}"
        if self.rank == 0:
            but = "" if odd else ", whose losses are finite"
            tqdm.write(f"step {self.step} skipped, its gradient is not finite: {where}{but}")
        if self.in_a_row > self.run.not_finite_at_most:
            came = self.stepper.origin(loss_finite=not odd)
            if odd:
                blamed = f"The last in {where}: look at them (`vcdeft tasks preview`)"
            else:
                blamed = "Their losses are finite: try another --attention or precision"
            raise UserError(
                f"step {self.step}: loss or gradient not finite {self.in_a_row} times in a row, "
                f"more than not_finite_at_most = {self.run.not_finite_at_most}; the first after "
                f"{came}. {blamed}, or lower optimiser.lr and go on with another --output"
            )

    def save(self) -> None:
        """A checkpoint; where it cannot be written, all processes end with the reason."""
        self.watchdog.doing(f"saving step {self.step}")
        moments, tensors = gather_moments(self.engine), gather_adapter(self.engine)
        averaged = gather_average(self.engine) if self.run.ema else None
        mistake = None
        if self.rank == 0:
            progress = Progress(
                step=self.step,
                examples=self.examples,
                seed=self.run.seed,
                global_batch=self.plan.size,
                not_finite=self.not_finite,
                in_a_row=self.in_a_row,
                attention=self.stepper.kernels.attention,
                attention_setting=self.run.attention,
                norms=self.stepper.kernels.norms,
                explained=self.stepper.explained,
            )
            try:
                saved = checkpoint.save(
                    self.output / "checkpoints",
                    progress,
                    moments,
                    lambda folder: self.write_adapter(folder, tensors, self.step),
                    keep=self.run.keep_checkpoints,
                    average=averaged,
                )
                self.warn_of_room(checkpoint.size(saved))
            except UserError as error:
                mistake = str(error)
        self.together(mistake)

    def warn_of_room(self, needed: int) -> None:
        if warning := checkpoint.short_of_room(self.output, needed):
            tqdm.write(warning)

    def leave(self) -> None:
        """End early, as asked; everything is saved."""
        self.watch.close()
        if self.rank == 0:
            tqdm.write(
                f"stopped at step {self.step} of {self.run.steps}, saved; go on with: "
                f"vcdeft train --output {self.run.output} --resume"
            )
        raise SystemExit(exit_status(self.asked.signal or signal.SIGTERM))

    def write_adapter(self, folder: Path, tensors: dict[str, Tensor], step: int) -> None:
        used = self.stepper.kernels.attention
        files.save(
            self.models.denoiser,
            folder,
            base=self.run.model,
            tensors=tensors,
            metadata=run_folder.adapter_metadata(self.run, step, attention=used, base=self.base),
        )

    def sheet(self) -> None:
        """A picture of what the adapter makes; every process samples, rank 0 writes. Grids that
        memory is too small for are left out, in all processes, and training goes on."""
        self.watchdog.doing(f"the sheet of step {self.step}")
        room = Room(
            self.models,
            split=self.run.zero == 3 and self.world > 1,
            agree=lambda failure: first_said(failure, self.world),
        )
        with published(self.engine, averaged=self.has_average), put_back(room):
            page, left_out = sample_sheet(self.models, self.shown, room)
        if self.rank == 0:
            if room.made:
                tqdm.write(f"sheet of step {self.step}: {short_of_memory(left_out)}")
            if page is not None:
                folder = self.output / "sheets"
                folder.mkdir(exist_ok=True)
                write_png(folder / f"step-{self.step:06d}.png", page)

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
                f"{self.output / run_folder.SKIPPED}"
            )

    def publish(self, name: str, tensors: dict[str, Tensor]) -> None:
        """An adapter folder of the run, whole or not at all; rank 0 writes."""
        if self.rank == 0:
            with checkpoint.disk_errors(self.output):
                checkpoint.replace(
                    self.output / name,
                    lambda folder: self.write_adapter(folder, tensors, self.run.steps),
                )
