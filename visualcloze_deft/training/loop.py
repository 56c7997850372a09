"""The steps of a run in one process.

Which examples a step sees is `batch_schedule`'s: the next ones, whatever the number of processes.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from visualcloze_deft.backbones.attention_check import Shapes
from visualcloze_deft.backbones.base import Models
from visualcloze_deft.backbones.kernels import Kernels
from visualcloze_deft.config.run_settings import Run
from visualcloze_deft.data.mixture import Mixture
from visualcloze_deft.errors import UserError
from visualcloze_deft.runtime.signals import StopRequest, exit_status, ignore_signals
from visualcloze_deft.runtime.watchdog import Watchdog
from visualcloze_deft.sampling.encoding import PixelExample, encode, filled, kinds_in
from visualcloze_deft.training import (
    preparation,
    run_data,
    run_folder,
    validation,
)
from visualcloze_deft.training.batch_schedule import StepPlan
from visualcloze_deft.training.checkpoint import Progress
from visualcloze_deft.training.console import Console
from visualcloze_deft.training.datasets import PixelDataset, RankBatchSampler
from visualcloze_deft.training.engine import (
    adapter_norms,
    average,
    published,
    torch_optimiser,
)
from visualcloze_deft.training.faults import Faults
from visualcloze_deft.training.metrics_log import ExampleLoss, MetricsLog
from visualcloze_deft.training.outputs import RunOutputs
from visualcloze_deft.training.rate_schedules import averaging_factor, learning_rate_factor
from visualcloze_deft.training.report import write_report
from visualcloze_deft.training.samples import SampleSheets
from visualcloze_deft.training.step import Batch, Stepper, first_said, seen_in


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
        shown, cache = mixture, Path(run.output) / run_folder.INDEX
        if run.data.validation_every:
            shown = run_data.mixture_of(run, held_out=True, cache=cache)
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
        self.faults = Faults(run, first=rank == 0, start=start)
        self.outputs = RunOutputs(run, models, engine, rank=rank)
        self.sheets = SampleSheets(
            run, models, engine, shown, base=self.outputs.base, rank=rank, world=world
        )
        self.console = Console(run, first=rank == 0)
        self.stepper = Stepper(
            engine,
            run,
            rank=rank,
            world=world,
            shapes=shapes,
            chosen=chosen,
            explained=start.explained if start else {},
        )
        self.output = Path(run.output)
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
        # closed however the loop ends: reading processes, deaf to signals, end with their iterator
        with self.console.shown(self.step), closing(self.watch.timed(iter(loader))) as batches:
            if not self.watch.has_evaluated(self.step):  # a run may have been ended before it did
                self.evaluate()
            if self.step == 0:
                self.sample()
            for planned in islice(self.plan.steps(self.examples), remaining):
                self.take_step(planned, batches)
                done = self.step
                leaving = self.stopping and done < run.steps
                if not leaving:
                    self.evaluate()
                if done % run.save_every == 0 or done == run.steps or leaving:
                    self.save()
                if leaving:
                    self.leave()
                if run.sample_every and done % run.sample_every == 0 and done < run.steps:
                    self.sample()

    def take_step(
        self, planned: StepPlan, batches: Iterator[list[PixelExample | UserError]]
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
        told = torch.cat(errors).tolist()
        seen = seen_in(step, told, scheduled_sampling=run.scheduled_sampling)
        everyone = self.record(planned, seen, factor, time.monotonic() - began)
        self.faults.count_step(planned, everyone, self.stepper, step=self.step)

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
        of fewer groups than another process's, of either kind, has a sample of its own again, and
        groups of one kind have the same places in all.
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
                context=run.context,
            )
            for part in drawn
        ]
        if run.zero == 3 and self.world > 1:
            most = torch.tensor([[*kinds_in(part)] for part in groups], device=self.models.device)
            torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
            groups = [
                filled(part, counts) for part, counts in zip(groups, most.tolist(), strict=True)
            ]
        return [Batch(drawn=d, groups=g) for d, g in zip(drawn, groups, strict=True)]

    def record(
        self,
        planned: StepPlan,
        seen: dict[int, ExampleLoss],
        factor: float,
        seconds: float,
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
        everyone, line = self.watch.step(planned, seen, figures, seconds=seconds)
        if self.rank == 0:
            self.console.step(self.step, line)
        self.faults.count_skipped(everyone, step=self.step)
        return everyone

    def evaluate(self) -> None:
        """Where it is time, the loss on held-out grids; every process measures a share."""
        run, every = self.run, self.run.logging.validate_every
        if not every or (self.step % every and self.step < run.steps):
            return
        self.doing(f"the validation loss of step {self.step}")
        own = validation.share(run.logging.validation_examples, rank=self.rank, world=self.world)
        averaged = run.ema > 0 and self.step > 0
        with self.console.working("validation"), published(self.engine, averaged=averaged):
            found = validation.losses(
                self.engine.module, self.models, self.held_out, run, own=own, agreed=self.agreed
            )
        times = validation.times_of(run).tolist()
        loss = self.watch.evaluated(self.step, self.examples, found, times)
        self.console.validated(self.step, loss)

    def leave(self) -> None:
        """End early, as asked; everything is saved."""
        self.watch.close()
        if self.rank == 0:
            tqdm.write(
                f"stopped at step {self.step} of {self.run.steps}, saved; go on with: "
                f"vcdeft train --output {self.run.output} --resume"
            )
        raise SystemExit(exit_status(self.asked.signal or signal.SIGTERM))

    def save(self) -> None:
        """A checkpoint; where it cannot be written, all processes end with the reason."""
        self.watchdog.doing(f"saving step {self.step}")
        progress = Progress(
            step=self.step,
            examples=self.examples,
            seed=self.run.seed,
            global_batch=self.plan.size,
            not_finite=self.faults.not_finite,
            in_a_row=self.faults.in_a_row,
            attention=self.stepper.kernels.attention,
            attention_setting=self.run.attention,
            norms=self.stepper.kernels.norms,
            explained=self.stepper.explained,
        )
        with self.console.working("save"):
            self.together(self.outputs.save(progress))

    def sample(self) -> None:
        with self.console.working("sheet"):
            self.sheets.write(self.step, self.doing)

    def doing(self, what: str) -> None:
        """This process has come as far as that between two steps."""
        self.watchdog.doing(what)
        self.console.doing(what)

    def finish(self) -> None:
        """Publish the adapter, the last sheet and the report; also where a resumed run has no step
        left."""
        self.outputs.publish(attention=self.stepper.kernels.attention)
        if self.run.sample_grids:
            with self.console.shown(self.step, leave=False):
                self.sample()
        self.watch.close()
        if self.rank == 0:
            write_report(self.output)
        if self.faults.skipped and self.rank == 0:
            tqdm.write(
                f"{self.faults.skipped} items could not be read and were replaced: "
                f"{self.faults.list}"
            )
