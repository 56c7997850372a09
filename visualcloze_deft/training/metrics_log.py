"""What a user watches: a line of figures for each step, and the same as curves in trackers."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import torch
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from tqdm import tqdm

from visualcloze_deft.backbones.base import Models, Split
from visualcloze_deft.backbones.compiled import Compiling
from visualcloze_deft.backbones.flops import peak
from visualcloze_deft.backbones.table import backbone_of
from visualcloze_deft.config import overrides
from visualcloze_deft.config.run_settings import Run, Tracker
from visualcloze_deft.data.example import Skipped
from visualcloze_deft.errors import UserError, reading
from visualcloze_deft.storage import jsonl
from visualcloze_deft.training import resume, run_folder
from visualcloze_deft.training.batch_schedule import StepPlan
from visualcloze_deft.training.checkpoint import disk_errors
from visualcloze_deft.training.validation import ValidationLosses

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class ExampleLoss:
    """What became of one example: its task, loss and image tokens, and how many items it took.
    exact: its weight in the loss without scheduled samples. split: of its tokens, where its context
    is computed once."""

    task: str
    error: float
    tokens: int
    items: int
    skipped: tuple[Skipped, ...]
    exact: float = 1.0
    split: Split | None = None


class OfTask(Protocol):
    """Something that has a task and a loss."""

    @property
    def task(self) -> str: ...
    @property
    def error(self) -> float: ...


@dataclass(frozen=True, kw_only=True)
class Share:
    """What one process tells of a step. waited: seconds for data. memory: bytes."""

    seen: dict[int, ExampleLoss]
    waited: float
    memory: int


class MetricsLog:
    """The figures of a run: every process measures, the first one writes."""

    def __init__(self, run: Run, models: Models, *, rank: int, world: int, start: int) -> None:
        """start: the last step whose lines and curves stay, -1 for none."""
        self.run = run
        self.models = models
        self.rank = rank
        self.first = rank == 0
        self.world = world
        self.output = Path(run.output)
        self.peak = peak_of(models)
        self.flops = flops_of(run, models) if self.peak else None
        self.waited = 0.0
        self.compiling = Compiling() if run.compile else None
        self.trackers: list[GeneralTracker] = []
        if self.first:
            resume.keep_lines_until(self.output, start)
            self.trackers = [started(name, run, start) for name in run.logging.trackers]

    def timed(self, batches: Iterator[T]) -> Generator[T, None, None]:
        """`batches`; what each takes to come counts as waiting for data."""
        began = time.monotonic()
        for batch in batches:
            self.waited += time.monotonic() - began
            yield batch
            began = time.monotonic()

    def has_evaluated(self, step: int) -> bool:
        """Whether the loss on held-out grids of `step` is written already; every process must ask.

        The first process, which may just have shortened the file, looks for all.
        """
        path = self.output / run_folder.EVALUATION
        return from_first(
            lambda: any(line["step"] == step for line in jsonl.read_lines(path)),
            rank=self.rank,
            world=self.world,
        )

    def norms_due(self, step: int) -> bool:
        every = self.run.logging.norms_every
        return every > 0 and step % every == 0

    def step(
        self,
        planned: StepPlan,
        seen: dict[int, ExampleLoss],
        figures: Mapping[str, Any],
        *,
        seconds: float,
    ) -> tuple[dict[int, ExampleLoss], dict[str, Any]]:
        """Write a step's line and curves. Returns what all processes saw, by index, and the line,
        which the first process alone has.

        figures: what the loop alone knows, "step" and "examples" first.
        """
        own = Share(seen=seen, waited=self.waited, memory=memory_used(self.models.device))
        self.waited = 0.0
        shares = gathered(own, self.world)
        merged = {i: one for part in shares for i, one in part.seen.items()}
        merged = dict(sorted(merged.items()))
        line: dict[str, Any] = {}
        if self.first:
            waited = sum(part.waited for part in shares) / len(shares)
            line = {
                **figures,
                "seconds": round(seconds, 4),
                **task_means(merged.values()),
                **self.rates(merged.values(), seconds),
                "waiting": round(waited / seconds, 4),
                "memory": max(part.memory for part in shares),
            }
            if self.run.scheduled_sampling:
                line["exact"] = exact_loss(merged.values())
            if planned.tokens:
                line |= {"tokens": sum(planned.tokens), "idle": round(planned.idle, 4)}
            if self.compiling:
                line["compiling"] = round(self.compiling.share, 4)
            self.write(run_folder.METRICS, line)
        return merged, line

    def rates(self, seen: Collection[ExampleLoss], seconds: float) -> dict[str, float]:
        """Examples and image tokens per second, and which share of the GPUs' peak that is."""
        found = {
            "examples_per_second": len(seen) / seconds,
            "tokens_per_second": sum(one.tokens for one in seen) / seconds,
        }
        if self.peak is not None and self.flops is not None:
            needed = sum(self.flops(one) for one in seen)
            found["utilisation"] = needed / (seconds * self.world * self.peak)
        return {name: round(value, 4) for name, value in found.items()}

    def evaluated(
        self, step: int, examples: int, own: dict[int, ValidationLosses], times: Collection[float]
    ) -> float:
        """Write the loss on held-out grids, from what each process measured; returns its mean."""
        shares = gathered(own, self.world)
        merged = dict(sorted((i, one) for part in shares for i, one in part.items()))
        if self.first:
            columns = zip(*(one.errors for one in merged.values()), strict=True)
            by_time = {
                f"{t:.3f}": sum(column) / len(column)
                for t, column in zip(times, columns, strict=True)
            }
            line = {"step": step, "examples": examples, **task_means(merged.values())}
            self.write(run_folder.EVALUATION, line | {"times": by_time}, prefix="evaluation/")
        return mean_error(merged.values())

    def write(self, file: str, line: Mapping[str, Any], *, prefix: str = "") -> None:
        """A line of `file`, and its numbers as curves."""
        run_folder.append_line(self.output / file, line)
        with disk_errors(self.output):
            for tracker in self.trackers:
                tracker.log(curves(line, prefix), step=line["step"])

    def close(self) -> None:
        if self.first and self.compiling:
            tqdm.write(str(self.compiling))
        with disk_errors(self.output):
            for tracker in self.trackers:
                tracker.finish()


def curves(line: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of a line by the name of their curve.

    >>> curves({"step": 3, "loss": 0.5, "tasks": {"depth": 0.4}}, "evaluation/")
    {'evaluation/loss': 0.5, 'evaluation/task/depth': 0.4}
    """
    named = {singular(name): value for name, value in line.items() if name != "step"}
    flat = overrides.flat(named)
    return {f"{prefix}{name.replace('.', '/', 1)}": float(value) for name, value in flat.items()}


def singular(name: str) -> str:
    return {"tasks": "task", "norms": "norm", "times": "time"}.get(name, name)


def gathered(own: T, world: int) -> list[T]:
    """What every process has, in order of ranks."""
    everyone = [own] * world
    if world == 1:  # no collective operation, for which a GPU would wait
        return everyone
    torch.distributed.all_gather_object(everyone, own)
    return everyone


def from_first(decide: Callable[[], T], *, rank: int, world: int) -> T:
    """What the first process decides, in all; every process must call it.

    For decisions by files or the clock, on which processes may differ. Where `decide` raises
    `UserError`, all processes do.
    """
    if world == 1:
        return decide()
    said: list[T | UserError | None] = [None]
    if rank == 0:
        try:
            said = [decide()]
        except UserError as mistake:
            said = [mistake]
    torch.distributed.broadcast_object_list(said)
    if isinstance(said[0], UserError):
        raise said[0]
    return cast(T, said[0])


def task_means(seen: Collection[OfTask]) -> dict[str, Any]:
    """The mean loss, and that of each task."""
    by_task: dict[str, list[OfTask]] = {}
    for one in seen:
        by_task.setdefault(one.task, []).append(one)
    means = {task: mean_error(found) for task, found in sorted(by_task.items())}
    return {"loss": mean_error(seen), "tasks": means}


def exact_loss(seen: Collection[ExampleLoss]) -> dict[str, float]:
    """The mean loss without scheduled samples and its weight, near 1; no loss where all are."""
    weight = sum(one.exact for one in seen)
    if not weight:
        return {"weight": 0.0}
    loss = sum(one.exact * one.error for one in seen if one.exact) / weight
    return {"loss": loss, "weight": round(weight / len(seen), 4)}


def mean_error(seen: Collection[OfTask]) -> float:
    return sum(one.error for one in seen) / len(seen)


def memory_used(device: torch.device) -> int:
    """The most bytes so far: of the GPU's memory in tensors, or of this process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # which Windows, where nothing is trained, does not have

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def flops_of(run: Run, models: Models) -> Callable[[ExampleLoss], float] | None:
    """Operations of a sample; None where they are not counted."""
    backbone = backbone_of(run.model)
    if backbone.flops is None:
        return None
    count, text = backbone.flops, backbone.text_tokens(run.model)
    return lambda one: count(models.denoiser.config, one.tokens, text, one.split)


def peak_of(models: Models) -> float | None:
    """What the device can do in the base's precision, where it is known."""
    if models.device.type != "cuda" or models.denoiser.dtype != torch.bfloat16:
        return None
    return peak(torch.cuda.get_device_name(models.device))


def started(name: Tracker, run: Run, start: int) -> GeneralTracker:
    """accelerate's tracker of this name, ready for steps after `start`; what TensorBoard has of
    later ones is taken out."""
    kind, output = LOGGER_TYPE_TO_CLASS[name], Path(run.output)
    options: dict[str, Any] = {}
    place = [output] if kind.requires_logging_directory else []
    if name == "tensorboard":
        options["purge_step"] = start + 1
    if name == "wandb":  # which goes on with what it finds in `dir`
        options |= {"name": output.name, "dir": str(output)}
        options |= {"resume": "auto"} if start >= 0 else {}
    called = "tensorboard" if name == "tensorboard" else run.logging.project
    own = run.logging.tracker_options.get(name, {})
    with reading(
        f"logging.tracker_options.{name}",
        f"{name} does not start with {', '.join(own) or 'its defaults'}",
    ):
        tracker = kind(called, *place, **(options | own))
        tracker.start()
    return tracker
